"""Real servers under faults, for as long as one likes: `python -m tests.chaos --help`."""
