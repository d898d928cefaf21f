"""CUDA graphs: recording, checking, keeping and replaying them."""
