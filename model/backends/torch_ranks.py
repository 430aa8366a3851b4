"""What ranks send each other: columns that are gathered, experts' outputs, hidden states from stage to stage.

Nothing here computes a number that a single process would not have: parts are put beside each other, bit for bit.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import ProcessGroupGloo

from shoal.model.backends.split import Shard

# A rank that is lost closes its connections; one that is slow is waited for.
PATIENCE = timedelta(minutes=10)


class Ranks:
    """The ranks of one stage, as one of them sees them.

    Args:
        group: a process group of torch, which joins the ranks; the order of its members is that of their parts.

    Attributes:
        num_bytes_sent: by this rank.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.index, self.size = group.rank(), group.size()
        self.num_bytes_sent = 0

    def gather(self, x: Tensor) -> Tensor:
        """Put the columns of all ranks beside each other: [n, width] to [n, size * width]."""
        return self.gather_rows(x).transpose(0, 1).reshape(x.shape[0], -1)

    def gather_rows(self, x: Tensor) -> Tensor:
        """What all ranks have: [n, width] to [size, n, width]."""
        all_rows = x.new_empty(self.size * x.shape[0], x.shape[1])
        if x.numel():
            _wait(self._group._allgather_base(all_rows, x.contiguous()))
            self.num_bytes_sent += (self.size - 1) * x.nbytes
        return all_rows.view(self.size, *x.shape)

    def own(self, x: Tensor) -> Tensor:
        """This rank's part of the columns: [n, size * width] to [n, width]."""
        part: Tensor = x.chunk(self.size, dim=-1)[self.index]
        return part

    def pick(self, x: Tensor) -> Tensor:
        """The rows of all ranks together, each of which is 0 on all ranks but one: [n, width].

        Bits are added as integers: in numbers, 0 and -0 would make 0.
        """
        bits = x.contiguous().view(torch.uint8)
        _wait(self._group.allreduce([bits]))
        self.num_bytes_sent += 2 * (self.size - 1) * bits.nbytes // self.size
        return bits.view(x.dtype)


class Spread(NamedTuple):
    """How the layers of a stage are spread over its ranks.

    Attributes:
        columns: whether ranks share heads and columns.
        whole_experts: whether each expert is on one rank, and not some of its columns on each.
    """

    ranks: Ranks
    columns: bool
    whole_experts: bool


class Stages:
    """All ranks, as one of them sees them: what goes from one to another.

    Args:
        group: joins all ranks.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.num_bytes_sent = 0

    def send(self, x: Tensor, rank: int) -> None:
        _wait(self._group.send([x.contiguous()], rank, 0))
        self.num_bytes_sent += x.nbytes

    def receive(self, x: Tensor, rank: int) -> Tensor:
        """Fill `x` with what a rank sends."""
        _wait(self._group.recv([x], rank, 0))
        return x


class Links(NamedTuple):
    """What joins a rank to the others; `ranks` are those of its stage, None if it is alone there."""

    ranks: Ranks | None
    stages: Stages

    @property
    def num_bytes_sent(self) -> int:
        """By this rank, of the model's numbers."""
        return self.stages.num_bytes_sent + (self.ranks.num_bytes_sent if self.ranks else 0)


def open_store() -> tuple[Store, int]:
    """Where ranks find each other, and the port on which it listens."""
    store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
    return store, store.port


def find_store(host: str, port: int) -> Store:
    return TCPStore(host, port, is_master=False, wait_for_workers=False)


def connect(store: Store, shard: Shard, device: str, host: str) -> Links:
    """Join the other ranks; returns when they have joined too.

    Args:
        host: address of this machine at which the others reach it.
    """

    def group(name: str, rank: int, size: int) -> Any:
        own = PrefixStore(name, store)
        if device != "cpu":
            from torch.distributed import ProcessGroupNCCL  # noqa: PLC0415 (torch for CPUs has none)

            torch.cuda.set_device(device)
            return ProcessGroupNCCL(own, rank, size, ProcessGroupNCCL.Options())
        gloo: Any = ProcessGroupGloo  # of which torch's stubs do not know all
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = PATIENCE
        return gloo(own, rank, size, options)

    split = shard.split
    stage = group(f"stage {shard.stage}", shard.member, split.stage_size) if split.stage_size > 1 else None
    return Links(Ranks(stage) if stage else None, Stages(group("all", shard.rank, split.num_ranks)))


def processor(device: str) -> str:
    """What computes on this machine, as far as numbers may depend on it."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    vendor = "unknown"
    with suppress(OSError, IndexError):
        vendor = Path("/proc/cpuinfo").read_text().split("vendor_id")[1].split()[1]
    return f"{vendor} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()
