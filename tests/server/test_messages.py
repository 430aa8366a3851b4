"""What the two processes say to each other arrives as it was sent."""

from __future__ import annotations

import string

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.output import (
    FinishReason,
    Pooling,
    RequestOutput,
    SamplingParams,
    SchedulerStats,
    SchedulingParams,
    TokenLogprobs,
)
from shoal.server.engine.messages import (
    Abort,
    Command,
    EngineRequest,
    Loading,
    News,
    Ready,
    Report,
    StartFailed,
    Stop,
    Submit,
)
from shoal.server.engine.packing import decode_hook, encode_hook, pack

names = st.text(string.printable, max_size=12)
token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=8)
floats = st.floats(allow_nan=False)
params = st.builds(
    SamplingParams,
    max_tokens=st.integers(0, 2**31),
    temperature=floats,
    logit_bias=st.dictionaries(st.integers(0, 2**31), floats, max_size=4),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.frozensets(st.integers(0, 2**31), max_size=4),
    num_logprobs=st.none() | st.integers(0, 20),
    pooling=st.none() | st.builds(Pooling, st.sampled_from(["last", "mean", "cls"]), st.integers(1, 2**31)),
)
scheduling = st.builds(
    SchedulingParams, client=names, priority=st.integers(-1000, 1000), ttft_slo_ms=st.none() | floats
)
requests = st.builds(
    EngineRequest,
    names,
    token_ids.map(pack),
    params,
    age=floats,
    output_token_ids=token_ids,
    scheduling=scheduling,
    speculates=st.booleans(),
    end_after=st.none() | st.integers(1, 2**31),
)
logprobs = st.none() | st.lists(st.builds(TokenLogprobs, floats, st.integers(1, 2**31), token_ids, st.lists(floats)))
outputs = st.builds(
    RequestOutput,
    names,
    token_ids,
    finish_reason=st.none() | st.sampled_from(FinishReason),
    logprobs=logprobs,
    prompt_logprobs=logprobs,
    embedding=st.none() | st.binary(max_size=8),
    error=st.none() | names,
)
counts = st.integers(0, 2**31)
stats = st.builds(SchedulerStats, counts, counts, floats, counts, counts, counts)
limits = st.builds(
    SchedulerConfig,
    num_blocks=st.integers(1, 2**31),
    max_model_len=st.integers(1, 2**31),
    enable_prefix_caching=st.booleans(),
)
commands = st.builds(Submit, st.lists(requests, max_size=3)) | st.builds(Abort, st.lists(names)) | st.builds(Stop)
reports = (
    st.builds(Ready, limits, counts, counts, names, st.none() | names)
    | st.builds(Loading, names)
    | st.builds(StartFailed, names, st.none() | names)
    | st.builds(News, st.lists(outputs, max_size=3), stats)
)


@given(command=commands)
def test_commands(command: Command) -> None:
    sent = msgspec.msgpack.encode(command, enc_hook=encode_hook)
    assert msgspec.msgpack.decode(sent, type=Command, dec_hook=decode_hook) == command


@given(report=reports)
def test_reports(report: Report) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=Report) == report
