"""Ahead-of-time compilation: how many registers, and how much shared memory, each kernel needs on each GPU."""
