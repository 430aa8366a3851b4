"""Hostile requests, and the law that a server keeps to under them: see `driver.py`."""
