"""Bundled pipelines, and the recipes that trained them."""
