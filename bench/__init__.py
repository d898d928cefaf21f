"""Measurements: commands to run from the root of a checkout, see README.md. Importing this does nothing."""
