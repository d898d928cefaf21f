"""Network calls that were recorded once, repeated for the rows of waves."""
