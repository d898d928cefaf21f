"""Several processes, one sample: every process runs the same waves on the same state, and evaluates its share of each.

`ranks` holds the processes and what they send each other; `call` is one call that they make together; `digests` tells
whether they were given the same.
"""
