"""What is asked of a server: requests with the lengths of their outputs, saved as JSON lines, and the six workloads.

A workload is a function of a seed, and of the tokenizer that counts.  Lengths are those for a context of 1,024 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count, islice
from math import ceil, exp, log, sqrt
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta, Struct

from shoal.loadtest import text
from shoal.loadtest.records import LoadTestError, RequestRecord, read_lines
from shoal.loadtest.text import Prompt, Tokenize

Name = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[float, Meta(ge=0)]
Limit = Annotated[float, Meta(gt=0)]


class WorkloadRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request of a workload.

    Attributes:
        request_id: unique in its workload.
        session: requests of one session follow each other, each after the answer to the one before; a request alone
            is a session of its own.
        client: whose request it is, sent as `user`; empty if nobody's.
        prompt: its text; if empty, the tokens are sent.
        prompt_token_ids: the prompt in tokens of the model that the workload was made for; the twin needs them.
        num_output_tokens: length of the output, which the server enforces (`end_after`).
        max_tokens: the limit that the request names: the same in a whole workload, so that it says nothing of lengths.
        temperature, seed: of sampling.
        priority, ttft_slo_ms, tpot_slo_ms: for the policy; None leaves an objective to the server.
        arrival_time: seconds after the start at which an open loop sends the request; None where the load decides.
    """

    request_id: Name
    session: Name
    client: str = ""
    prompt: str = ""
    prompt_token_ids: Annotated[list[Annotated[int, Meta(ge=0, lt=2**31)]], Meta(min_length=1)]
    num_output_tokens: Count
    max_tokens: Count
    temperature: NotNegative = 0.0
    seed: int = 0
    priority: int = 0
    ttft_slo_ms: Limit | None = None
    tpot_slo_ms: Limit | None = None
    arrival_time: NotNegative | None = None

    def record(self, sent_at: float) -> RequestRecord:
        """What is measured of the request, before there is anything."""
        return RequestRecord(request_id=self.request_id, client=self.client, priority=self.priority, sent_at=sent_at)

    def __post_init__(self) -> None:
        if self.num_output_tokens > self.max_tokens:
            raise ValueError(f"num_output_tokens is {self.num_output_tokens}, above max_tokens, {self.max_tokens}")


def write_workload(path: Path, requests: Iterable[WorkloadRequest]) -> None:
    """Save requests, one JSON object a line."""
    path.write_bytes(b"".join(msgspec.json.encode(request) + b"\n" for request in requests))


def read_workload(path: Path) -> list[WorkloadRequest]:
    """Read what `write_workload` saved.

    Raises:
        LoadTestError: the file cannot be read or has no request; or a line is broken, whose number and field are named.
    """
    requests: list[WorkloadRequest] = list(read_lines(path, WorkloadRequest))
    if not requests:
        raise LoadTestError(f"the workload {path} is empty: it must have at least one request")
    lines: dict[str, int] = {}
    for number, request in enumerate(requests, 1):
        if (first := lines.setdefault(request.request_id, number)) != number:
            raise LoadTestError(f"{path}, line {number}: request_id {request.request_id!r} is that of line {first} too")
    return requests


# -- the six workloads -------------------------------------------------------------------------------------------------

MIN_MODEL_LEN = 1024
Fields = dict[str, Any]  # of a request, as `_fields` names them


def make_workload(
    name: str, num_requests: int, seed: int, tokenize: Tokenize, max_model_len: int
) -> list[WorkloadRequest]:
    """Make a workload; the same arguments make the same one, and more requests begin with the same ones.

    Args:
        tokenize: as the server tokenizes the prompt of a completion.

    Raises:
        LoadTestError: there is no such workload, or no room for it in the model's context.
    """
    if name not in WORKLOADS:
        raise LoadTestError(f"unknown workload {name!r}; there are {', '.join(WORKLOADS)}")
    if max_model_len < MIN_MODEL_LEN:
        raise LoadTestError(f"workloads need a context of {MIN_MODEL_LEN} tokens; max_model_len is {max_model_len}")
    maker = Maker(Random(f"{name} {seed}"), tokenize)
    requests: list[WorkloadRequest] = []
    for index, fields in enumerate(islice(WORKLOADS[name](maker), num_requests)):
        named: Fields = dict.fromkeys(("request_id", "session"), f"{name}-{index:05}")
        requests.append(WorkloadRequest(**named | {"seed": maker.rng.getrandbits(31)} | fields))
    return requests


def _fields(prompt: Prompt, num_output_tokens: int, max_tokens: int, **others: Any) -> Fields:
    lengths: Fields = {"num_output_tokens": num_output_tokens, "max_tokens": max_tokens}
    return {"prompt": prompt[0], "prompt_token_ids": prompt[1]} | lengths | others


class Maker(NamedTuple):
    """What workloads are made with.

    Attributes:
        rng: Python's own, whose numbers stay the same from release to release.
    """

    rng: Random
    tokenize: Tokenize

    def prose(self, num_tokens: int, opening: str = "") -> Prompt:
        return text.prompt(text.prose, self.rng, num_tokens, self.tokenize, opening)

    def temperature(self) -> float:
        """Half of the requests are greedy."""
        return 0.0 if self.rng.random() < 0.5 else 0.8

    def log_normal(self, median: float, sigma: float, most: int) -> int:
        """A length: log-normal, rounded up, at most `most`."""
        return _length(log(median) + self.rng.gauss(0, sigma), most)


def _length(logarithm: float, most: int) -> int:
    return min(ceil(exp(min(logarithm, log(most)))), most)


def uniform(maker: Maker) -> Iterator[Fields]:
    """All requests are alike, 128 tokens in and 128 out.

    This is the control: batches of such requests end together, so that static batching should lose little.
    """
    while True:
        yield _fields(maker.prose(128), 128, 128, temperature=maker.temperature())


CHAT_MAX_TOKENS, CHAT_MAX_PROMPT_TOKENS = 640, 384
CHAT_OUTPUT_MEDIAN, CHAT_OUTPUT_SIGMA = 45.0, 1.2
CHAT_SHARE = 0.25  # of the variance of the logarithm of an answer's length: the client's, and the kind's as well
CHAT_NUM_CLIENTS = 8
# From those that ask for the shortest answer to those that ask for the longest.
CHAT_KINDS = (
    "Name what this is about: ",
    "Give a title to this: ",
    "Is the following right? ",
    "Summarize in a few words: ",
    "List what is said here: ",
    "Describe what this does: ",
    "Explain step by step: ",
    "Write a manual from these notes: ",
)


def chat(maker: Maker) -> Iterator[Fields]:
    """Short questions, and answers of very different lengths, as in public traces of chats.

    **Lengths.**  Prompts are log-normal with the mean of LMSYS-Chat-1M (69.5 tokens, Zheng et al. 2023) and sigma 1.
    Answers have the shape of Azure's conversation trace (Patel et al. 2024, Splitwise), whose median of 129 tokens and
    mean of 211 make a log-normal distribution of sigma sqrt(2 ln(211 / 129)) = 0.99.  They are scaled to a median of 45
    for a context of 1,024 tokens.  Sigma is 1.2, because a public chat has more models and kinds of users than one
    service.  They are cut at 640 tokens, which one in seventy reaches.

    **What can be predicted.**  Half of the variance of the logarithm of an answer's length: a quarter is the client's
    (some want short answers, some long ones), and a quarter is due to the kind of prompt ("Name ..." asks for less than
    "Write ...").  The other half is chance.  In 184 consecutive requests of the Azure trace, the range of the prompt's
    length, one of nine, explains about as much: 51%.
    """

    def offsets(num: int) -> list[float]:
        """`num` values, as a normal distribution spreads them: mean 0, and `CHAT_SHARE` of the variance."""
        quantiles = [NormalDist().inv_cdf((i + 0.5) / num) for i in range(num)]
        scale = CHAT_OUTPUT_SIGMA * sqrt(CHAT_SHARE) / sqrt(sum(quantile**2 for quantile in quantiles) / num)
        return [quantile * scale for quantile in quantiles]

    rng, of_client, of_kind = maker.rng, offsets(CHAT_NUM_CLIENTS), offsets(len(CHAT_KINDS))
    noise = CHAT_OUTPUT_SIGMA * sqrt(1 - 2 * CHAT_SHARE)
    rng.shuffle(of_client)  # the number of a client says nothing
    while True:
        client, kind = rng.randrange(CHAT_NUM_CLIENTS), rng.randrange(len(CHAT_KINDS))
        logarithm = log(CHAT_OUTPUT_MEDIAN) + of_client[client] + of_kind[kind] + rng.gauss(0, noise)
        prompt = maker.prose(maker.log_normal(42.2, 1.0, CHAT_MAX_PROMPT_TOKENS), CHAT_KINDS[kind])  # mean 69.5
        length, whose = _length(logarithm, CHAT_MAX_TOKENS), f"client-{client}"
        yield _fields(prompt, length, CHAT_MAX_TOKENS, temperature=maker.temperature(), client=whose)


def code(maker: Maker) -> Iterator[Fields]:
    """Completions in six files, as an editor asks for them.

    A prompt is the beginning of a file, up to where its user is.  Users of the same file share what is above both
    places, which the prefix cache can find.
    """
    files = [text.code(path) for path in maker.rng.sample(text.modules(), 6)]
    while True:
        file, num_tokens = maker.rng.randrange(len(files)), maker.rng.randint(300, 700)
        while (prompt := text.cut(files[file], num_tokens, maker.tokenize)) is None:
            num_tokens += 1
        yield _fields(prompt, maker.log_normal(40.0, 0.8, 256), 256, client=f"editor-{file}")


AGENT_MAX_TOKENS = 160


def agent(maker: Maker) -> Iterator[Fields]:
    """Sessions of three to eight turns, in which each prompt is the whole of the one before, and more.

    All agents begin with the same instructions.  A turn adds the model's answer to the turn before, and what a tool or
    user said to it.  The answers in prompts are recorded ones (code, as long as the answer was), so that the prompts
    do not depend on what a server writes.  A session ends when its next prompt would leave no room for an output.
    """
    rng, tokenize = maker.rng, maker.tokenize
    instructions, _ = maker.prose(96)
    for session in count():
        so_far = instructions
        for _ in range(rng.randint(3, 8)):
            so_far += "\n\nUser:\n" + maker.prose(rng.randint(20, 100))[0]
            token_ids = tokenize(so_far)
            if len(token_ids) > MIN_MODEL_LEN - AGENT_MAX_TOKENS:
                break
            length = maker.log_normal(50.0, 0.7, AGENT_MAX_TOKENS)
            whose = {"session": f"agent-session-{session:04}", "client": f"agent-{session}"}
            yield _fields((so_far, token_ids), length, AGENT_MAX_TOKENS, **whose)
            so_far += "\n\nAnswer:\n" + text.prompt(text.code, rng, length, tokenize)[0]


class RequestClass(NamedTuple):
    """Requests of one kind, whose lengths are uniformly distributed in these ranges, both ends included."""

    num_prompt_tokens: tuple[int, int]
    num_output_tokens: tuple[int, int]
    fields: Fields


# Ten levels apart, so that ageing lets no ordinary request overtake an urgent one for long.
URGENT = RequestClass((16, 48), (8, 32), {"client": "urgent", "ttft_slo_ms": 200.0})
ORDINARY = RequestClass((100, 300), (100, 300), {"client": "ordinary", "priority": 10})
MODEST = RequestClass((32, 64), (16, 48), {"client": "modest"})
GREEDY = RequestClass((200, 400), (100, 300), {"client": "greedy"})


def two_classes(rare: RequestClass, common: RequestClass, maker: Maker) -> Iterator[Fields]:
    """Every eighth request is of the rare class."""
    for number in count(1):
        kind = common if number % 8 else rare
        prompt = maker.prose(maker.rng.randint(*kind.num_prompt_tokens))
        length = maker.rng.randint(*kind.num_output_tokens)
        yield _fields(prompt, length, 400, temperature=maker.temperature(), **kind.fields)


WORKLOADS: dict[str, Callable[[Maker], Iterator[Fields]]] = {
    "chat": chat,
    "code": code,
    "agent": agent,
    "uniform": uniform,
    # A few urgent short requests among many long ordinary ones.
    "mixed-priority": partial(two_classes, URGENT, ORDINARY),
    # A client with many long requests, and one with few short ones.
    "two-tenants": partial(two_classes, MODEST, GREEDY),
}
