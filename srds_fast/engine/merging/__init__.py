"""Network calls of several rows as one call, by rules that are found by trying."""
