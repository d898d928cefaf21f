"""Engines: what runs the waves of a program. One file each."""
