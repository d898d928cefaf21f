"""`sample()`: the solvers for any denoiser."""
