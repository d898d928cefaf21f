"""All code that depends on diffusers: the compiled pipeline, and its two ways to run a pipeline's loop."""
