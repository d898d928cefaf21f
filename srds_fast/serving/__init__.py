"""Serve a compiled pipeline over HTTP: OpenAI's images API, on Ray Serve or in one process."""
