"""Solver cores: sans-IO generators, a file or folder for each method. See `contract`."""
