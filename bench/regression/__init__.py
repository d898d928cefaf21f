"""Counts that are the same on every machine, and are gated."""
