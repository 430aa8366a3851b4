"""Shoal, a miniature LLM inference server.

The rooms lie at the top of the source tree and are linked into this package, so that only one name is installed.
"""
