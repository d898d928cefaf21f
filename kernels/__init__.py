"""Fused operations of the solvers, one folder each: the plain PyTorch reference beside the Triton kernel.

    common/             what the operations share: argument checks, memory layouts, which implementation runs
    wave_update/        one wave of SRDS, CHORDS or the sequential sampler, in one launch
    fixed_point_wave/   one wave of a method that moves all grid points, in two or three launches
    aot/                ahead-of-time compilation of every kernel, which needs no GPU

This package knows tensors and coefficients; it knows neither pipelines nor solvers. Importing it, or a public function
of one of its folders, does not import Triton: the first call that runs a kernel does.
"""
