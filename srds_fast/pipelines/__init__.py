"""Everything that knows diffusers: the drop-in, and the two ways it runs a pipeline's loop."""
