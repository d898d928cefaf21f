"""Measurements: commands to run from the root of a checkout, `python -m bench.rows` and others; imports nothing.

rows: c(rows) of every network. workloads: what is timed end to end. engines: our engines side by side. peers: stock
loops, diffusers' ParaDiGMS and every method of ours, at equal difference. methods: waves and rows for a quality.
policy: a robot policy. never_slower: where nothing can win. kernels: bandwidths. host_time: what a loop costs on the
host. busy: how busy a GPU is. gpu_check.sh runs all that needs a GPU.
"""
