"""All that knows diffusers."""
