"""Recording calls with Nsight, and reading what was recorded."""
