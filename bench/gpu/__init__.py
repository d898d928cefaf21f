"""One command for everything that needs a GPU."""
