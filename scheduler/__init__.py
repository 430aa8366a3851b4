"""Decides what runs in the next step.  Standard library only."""
