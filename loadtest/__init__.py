"""Measures, compares, simulates and draws: load tests of a running server, and its digital twin."""
