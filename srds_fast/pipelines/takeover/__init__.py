"""The pipeline's loop, recorded in one turn and then run by ours."""
