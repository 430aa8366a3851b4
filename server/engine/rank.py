"""A rank that is not the first: `python -m shoal.server.engine.rank ADDRESS MODEL DEVICE THREADS SECONDS`.

It joins the engine at the address, for which it waits that long, by the secret on its standard input.  It loads its
part of the model, and computes its part of each step that it is told of.  It ends with the engine: when the connection
ends.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from dataclasses import replace

from shoal.model.backends.split import Shard, Split
from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.model.checkpoint.load import load_checkpoint
from shoal.scheduler.errors import ConfigError, ShoalError
from shoal.server.cli import REFUSED
from shoal.server.engine.rank_secret import acquaint
from shoal.server.engine.rank_wire import Hello, Loaded, RankSocket, Refused, Step, StrangerError, Welcome

RETRY_SECONDS = 0.5
ANSWER_SECONDS = 30.0  # in which an engine says that it is one; it takes ranks one after the other


def join(address: str, hello: Hello, seconds: float, secret: bytes = b"") -> tuple[RankSocket, Welcome]:
    """Join the engine at an address, for which one waits this long.

    Raises:
        ConfigError: there is none, it does not know the secret, or it does not take this rank.
    """
    engine = RankSocket(_connect(address, seconds))
    try:
        engine.socket.settimeout(ANSWER_SECONDS)
        acquaint(engine, secret, "rank")
        engine.socket.settimeout(None)
        engine.send(hello)
        match engine.receive():  # comes when all ranks have joined
            case Welcome() as welcome:
                return engine, welcome
            case Refused(message):
                raise ConfigError(message, param="address")
        raise StrangerError("ended the connection")
    except ConfigError:
        engine.close()
        raise
    except (StrangerError, OSError) as error:
        engine.close()
        raise ConfigError(f"what listens at {address} {error}", param="address") from error


def _connect(address: str, seconds: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=max(seconds, RETRY_SECONDS))
        except (OSError, ValueError, OverflowError) as error:
            if time.monotonic() > deadline or not isinstance(error, ConnectionError | TimeoutError):
                raise ConfigError(f"no engine at {address}: {error}", param="address") from error
            time.sleep(RETRY_SECONDS)
        else:
            connection.settimeout(None)
            return connection


def run(address: str, model: str, device: str, threads: int | None, *, secret: bytes, seconds: float) -> None:
    """Be a rank of the engine at an address, until that ends.

    Raises:
        ConfigError, CheckpointError: it cannot be.
    """
    from shoal.model.backends.torch_parallel import ParallelBackend  # noqa: PLC0415
    from shoal.model.backends.torch_ranks import connect, find_store  # noqa: PLC0415

    checkpoint = resolve_checkpoint(model)
    record = load_checkpoint(checkpoint)
    engine, welcome = join(address, Hello.of(checkpoint, device), seconds, secret)
    try:
        config = replace(record.config.within(welcome.max_model_len), keeps_all=welcome.keeps_all)
        shard = Shard(Split(*welcome.split), welcome.rank)
        store = find_store(address.rpartition(":")[0].strip("[]"), welcome.store_port)
        backend = ParallelBackend(
            replace(record, config=config),
            shard,
            connect(store, shard, device, engine.host),
            lambda batch, num_layers: None,
            device=device,
            dtype=welcome.dtype,
            num_blocks=welcome.num_blocks,
            block_size=welcome.block_size,
            num_threads=threads,
        )
    except Exception as error:
        engine.refuse(str(error))
        raise
    engine.send(Loaded())
    while isinstance(step := engine.receive(), Step):
        backend.follow(step.batch(config.hidden_size), step.num_layers)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which are the engine's: it ends this process
        signal.signal(number, signal.SIG_IGN)
    address, model, device, threads, seconds = sys.argv[1:]
    secret = sys.stdin.buffer.read()
    try:
        run(address, model, device, int(threads) or None, secret=secret, seconds=float(seconds))
    except ShoalError as error:
        print(f"rank: {error.message}", file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
