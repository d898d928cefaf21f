"""Takeover: the network calls of a few turns of the pipeline's loop are repeated by a loop of our own, in waves."""
