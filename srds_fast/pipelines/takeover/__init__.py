"""Takeover: one turn of the pipeline's loop is recorded, then our own loop runs all waves."""
