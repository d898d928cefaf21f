"""Methods compared at an equal difference to the sequential sample."""
