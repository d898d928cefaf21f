"""The pipeline's own loop, run once per wave."""
