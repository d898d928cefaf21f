"""What is measured: networks, samplers, problems with a known answer, and methods with fixed settings."""
