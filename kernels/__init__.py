"""Fused operations of the solvers, a folder each: the plain PyTorch reference beside the Triton kernel.

Importing this package, or a public function from one of its folders, does not import Triton: a call that runs a kernel
does.
"""
