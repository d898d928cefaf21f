"""Adapters for other people's packages. They use `sample` and `compile`."""
