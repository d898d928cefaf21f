"""Modular pipelines of diffusers: what differs from the other pipelines, in one call of a compiled pipeline."""
