"""Reads checkpoints, whatever their format, into a `ModelRecord`."""
