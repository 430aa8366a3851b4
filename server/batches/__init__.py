"""Durable batches: many requests in a file, answered in idle capacity, whatever happens to the server meanwhile."""
