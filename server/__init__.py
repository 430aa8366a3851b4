"""Talks to the world: HTTP, settings, processes."""
