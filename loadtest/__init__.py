"""Measures, compares and draws: load tests of the scheduling policies."""
