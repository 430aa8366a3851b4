"""The workloads of a comparison, made once and saved before anything is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from shoal.loadtest.arrivals import due_times
from shoal.loadtest.errors import WorkloadError
from shoal.loadtest.records import Load
from shoal.loadtest.storage import Storage
from shoal.loadtest.workload import WorkloadRequest, read_workload, write_workload
from shoal.loadtest.workloads import make_workload

Tokenize = Callable[[str], list[int]]


class Sending(NamedTuple):
    """A saved workload, and the load that it is sent as."""

    workload: Path
    load: Load


class WorkloadFiles:
    """The files of a comparison's workloads.

    A workload "NAME:CLIENT" is one client's requests of NAME; in an open loop they are sent when they
    are in the whole of it.  So a client can be measured alone.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def missing(self, names: Sequence[str]) -> list[str]:
        """Of the workloads of these names, those that are not saved yet."""
        whole = dict.fromkeys(name.partition(":")[0] for name in names)
        return [name for name in whole if not self._storage.workload_file(name).exists()]

    def make(self, name: str, num_requests: int, seed: int, tokenize: Tokenize, max_model_len: int) -> None:
        """Generate a workload.

        Raises:
            WorkloadError: there is none of this name.
        """
        write_workload(
            self._storage.workload_file(name), make_workload(name, num_requests, seed, tokenize, max_model_len)
        )

    def copy(self, name: str, requests: Sequence[WorkloadRequest]) -> None:
        """Take a workload that was saved elsewhere."""
        write_workload(self._storage.workload_file(name), requests)

    def sending(self, name: str, load: Load) -> Sending:
        """What is sent to put a server under a load of this workload.

        Raises:
            WorkloadError: the workload has no such client.
        """
        whole, _, client = name.partition(":")
        file = self._storage.workload_file(whole)
        return self._alone(file, name, client, load) if client else Sending(file, load)

    def _alone(self, file: Path, name: str, client: str, load: Load) -> Sending:
        requests = read_workload(file)
        if load.rate:
            times = due_times(load, requests)
            requests = [replace(request, arrival_time=time) for request, time in zip(requests, times, strict=True)]
        own = [request for request in requests if request.client == client]
        if not own:
            clients = ", ".join(sorted({request.client for request in requests}))
            raise WorkloadError(f"workload {name}: no request is of client {client!r}; clients are {clients}")
        part = self._storage.workload_file(f"{name} {load.rate:g}" if load.rate else name)
        write_workload(part, own)
        return Sending(part, replace(load, rate=0.0))  # at the times in the file
