"""`sample()`: parallel-in-time sampling with any denoiser."""
