"""Lockstep: the pipeline's own loop turns once per wave."""
