"""Recording calls with Nsight, and how busy a GPU is."""
