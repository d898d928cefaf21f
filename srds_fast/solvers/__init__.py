"""Solver cores: sans-IO generators, one file each. See `core` for their contract."""
