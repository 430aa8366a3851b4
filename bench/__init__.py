"""Benchmarks: `python -m bench`.  They print tables for people, and one JSON line last."""
