"""What can go wrong in a load test."""

from __future__ import annotations


class LoadTestError(Exception):
    """Root of all errors of this room that are meant for a user; its text says what is wrong, and what is right."""


class WorkloadError(LoadTestError):
    """A workload is unknown, or its file is broken."""


class ServerDiedError(LoadTestError):
    """The server under test ended in the middle of a run, or did not start."""


class TraceError(LoadTestError):
    """A step trace is not there, or its file is broken."""
