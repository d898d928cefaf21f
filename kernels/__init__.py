"""Fused operations of the solvers, one file each: the plain PyTorch reference beside the Triton kernel."""
