"""What is asked of a server: requests with the lengths of their outputs, saved as JSON lines, and the six workloads.

A workload is a function of a seed, and of the tokenizer that counts.  Lengths are those for a context of 1,024 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import ceil, exp, log, sqrt
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from shoal.loadtest import text
from shoal.loadtest.records import LoadTestError, read_lines
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
    prompt: Name
    prompt_token_ids: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]
    num_output_tokens: Count
    max_tokens: Count
    temperature: NotNegative = 0.0
    seed: int = 0
    priority: int = 0
    ttft_slo_ms: Limit | None = None
    tpot_slo_ms: Limit | None = None
    arrival_time: NotNegative | None = None

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
    requests = list(read_lines(path, WorkloadRequest))
    if not requests:
        raise LoadTestError(f"the workload {path} is empty: it must have at least one request")
    lines: dict[str, int] = {}
    for number, request in enumerate(requests, 1):
        if (first := lines.setdefault(request.request_id, number)) != number:
            raise LoadTestError(f"{path}, line {number}: request_id {request.request_id!r} is that of line {first} too")
    return requests


# -- the six workloads -------------------------------------------------------------------------------------------------

MIN_MODEL_LEN = 1024


def make_workload(
    name: str, num_requests: int, seed: int, tokenize: Tokenize, max_model_len: int
) -> list[WorkloadRequest]:
    """Make a workload; the same arguments make the same one.

    Args:
        tokenize: as the server tokenizes the prompt of a completion.

    Raises:
        LoadTestError: there is no such workload, no request in it, or no room for it in the model's context.
    """
    if name not in WORKLOADS:
        raise LoadTestError(f"unknown workload {name!r}; there are {', '.join(WORKLOADS)}")
    if num_requests < 1:
        raise LoadTestError(f"a workload must have at least 1 request, not {num_requests}")
    if max_model_len < MIN_MODEL_LEN:
        raise LoadTestError(f"workloads need a context of {MIN_MODEL_LEN} tokens; max_model_len is {max_model_len}")
    return WORKLOADS[name](Maker(name, num_requests, seed, tokenize))


class Maker:
    """Makes the requests of one workload.

    Attributes:
        rng: seeded by the workload's name and seed; Python's own, which stays the same from release to release.
    """

    def __init__(self, name: str, num_requests: int, seed: int, tokenize: Tokenize) -> None:
        self.name, self.num_requests, self.tokenize = name, num_requests, tokenize
        self.rng = Random(f"{name} {seed}")

    def prose(self, num_tokens: int, opening: str = "") -> Prompt:
        return text.prompt(text.prose, self.rng, num_tokens, self.tokenize, opening)

    def is_greedy(self) -> bool:
        """Half of the requests are greedy."""
        return self.rng.random() < 0.5

    def request(
        self, index: int, prompt: Prompt, num_output_tokens: int, max_tokens: int, *, is_greedy: bool = True, **more: Any
    ) -> WorkloadRequest:
        """Request number `index`, a session of its own unless `more` names one."""
        request_id = f"{self.name}-{index:05}"
        return WorkloadRequest(
            request_id=request_id,
            prompt=prompt[0],
            prompt_token_ids=prompt[1],
            num_output_tokens=num_output_tokens,
            max_tokens=max_tokens,
            temperature=0.0 if is_greedy else 0.8,
            seed=self.rng.getrandbits(31),
            **{"session": request_id, **more},
        )

    def log_normal(self, median: float, sigma: float, most: int) -> int:
        """A length: log-normal, rounded up, at most `most`."""
        return _length(log(median) + self.rng.gauss(0, sigma), most)


def _length(logarithm: float, most: int) -> int:
    return min(ceil(exp(min(logarithm, log(most)))), most)


def uniform(maker: Maker) -> list[WorkloadRequest]:
    """All requests are alike, 128 tokens in and 128 out.

    This is the control: batches of such requests end together, so that static batching should lose little.
    """
    return [
        maker.request(index, maker.prose(128), 128, 128, is_greedy=maker.is_greedy())
        for index in range(maker.num_requests)
    ]


CHAT_MAX_TOKENS, CHAT_MAX_PROMPT_TOKENS = 640, 384
CHAT_OUTPUT_MEDIAN, CHAT_OUTPUT_SIGMA = 45.0, 1.2
CHAT_CLIENT_SHARE = CHAT_KIND_SHARE = 0.25  # of the variance of the logarithm of an answer's length
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


def chat(maker: Maker) -> list[WorkloadRequest]:
    """Short questions, and answers of very different lengths, as in public traces of chats.

    **Sources.**  In LMSYS-Chat-1M a prompt has 69.5 tokens on average and an answer 214.5 (Zheng et al. 2023).  In the
    conversation trace of Azure that came with Splitwise (Patel et al. 2024) the median answer has 129 tokens, and the
    mean answer 211.  A log-normal distribution of this median and mean has sigma = sqrt(2 ln(211 / 129)) = 0.99.

    **Lengths.**  Prompts are log-normal with the mean of LMSYS-Chat-1M and sigma 1.  Answers keep their shape and are
    scaled by about 0.4 to a context of 1,024 tokens.  Their median is 45, and sigma is 1.2, because a public chat has
    more models and kinds of users than one service.  They are cut at 640 tokens, which one in seventy reaches.

    **What can be predicted.**  Half of the variance of the logarithm of an answer's length: a quarter is the client's
    (some want short answers, some long ones), and a quarter is due to the kind of prompt ("Name ..." asks for less than
    "Write ...").  The other half is chance.  The Azure trace allows about as much: in 184 consecutive requests (from
    2023-11-16 18:47:11 on), the range of the prompt's length, one of nine, explains 51% of this variance.
    """

    def offsets(num: int, share: float) -> list[float]:
        """`num` values, as a normal distribution spreads them: mean 0, and `share` of the variance."""
        quantiles = [NormalDist().inv_cdf((i + 0.5) / num) for i in range(num)]
        scale = CHAT_OUTPUT_SIGMA * sqrt(share) / sqrt(sum(quantile**2 for quantile in quantiles) / num)
        return [quantile * scale for quantile in quantiles]

    rng = maker.rng
    of_client, of_kind = offsets(CHAT_NUM_CLIENTS, CHAT_CLIENT_SHARE), offsets(len(CHAT_KINDS), CHAT_KIND_SHARE)
    noise = CHAT_OUTPUT_SIGMA * sqrt(1 - CHAT_CLIENT_SHARE - CHAT_KIND_SHARE)
    rng.shuffle(of_client)  # the number of a client says nothing
    requests = []
    for index in range(maker.num_requests):
        client, kind = rng.randrange(CHAT_NUM_CLIENTS), rng.randrange(len(CHAT_KINDS))
        logarithm = log(CHAT_OUTPUT_MEDIAN) + of_client[client] + of_kind[kind] + rng.gauss(0, noise)
        num_prompt_tokens = maker.log_normal(42.2, 1.0, CHAT_MAX_PROMPT_TOKENS)  # mean 69.5
        prompt = maker.prose(num_prompt_tokens, CHAT_KINDS[kind])
        num_output_tokens = _length(logarithm, CHAT_MAX_TOKENS)
        greedy = maker.is_greedy()
        requests.append(
            maker.request(
                index, prompt, num_output_tokens, CHAT_MAX_TOKENS, is_greedy=greedy, client=f"client-{client}"
            )
        )
    return requests


def code(maker: Maker) -> list[WorkloadRequest]:
    """Completions in six files, as an editor asks for them.

    A prompt is the beginning of a file, up to where its user is.  Users of the same file share what is above both
    places, which the prefix cache can find.
    """
    files = [text.code(path) for path in maker.rng.sample(text.modules(), 6)]
    requests = []
    for index in range(maker.num_requests):
        file, num_tokens = maker.rng.randrange(len(files)), maker.rng.randint(300, 700)
        while (prompt := text.cut(files[file], num_tokens, maker.tokenize)) is None:
            num_tokens += 1
        num_output_tokens = maker.log_normal(40.0, 0.8, 256)
        requests.append(maker.request(index, prompt, num_output_tokens, 256, client=f"editor-{file}"))
    return requests


AGENT_MAX_TOKENS = 160


def agent(maker: Maker) -> list[WorkloadRequest]:
    """Sessions of three to eight turns, in which each prompt is the whole of the one before, and more.

    All agents begin with the same instructions.  A turn adds the model's answer to the turn before, and what a tool or
    user said to it.  The answers in prompts are recorded ones (code, as long as the answer was), so that the prompts
    do not depend on what a server writes.  A session ends when its next prompt would leave no room for an output.
    """
    rng, tokenize = maker.rng, maker.tokenize
    instructions, _ = maker.prose(96)
    requests: list[WorkloadRequest] = []
    num_sessions = 0
    while len(requests) < maker.num_requests:
        so_far = instructions
        for _ in range(rng.randint(3, 8)):
            so_far += "\n\nUser:\n" + maker.prose(rng.randint(20, 100))[0]
            token_ids = tokenize(so_far)
            if len(token_ids) > MIN_MODEL_LEN - AGENT_MAX_TOKENS:
                break
            num_output_tokens = maker.log_normal(50.0, 0.7, AGENT_MAX_TOKENS)
            names = {"session": f"agent-session-{num_sessions:04}", "client": f"agent-{num_sessions}"}
            prompt = so_far, token_ids
            requests.append(maker.request(len(requests), prompt, num_output_tokens, AGENT_MAX_TOKENS, **names))
            so_far += "\n\nAnswer:\n" + text.prompt(text.code, rng, num_output_tokens, tokenize)[0]
        num_sessions += 1
    return requests[: maker.num_requests]


class RequestClass(Struct, frozen=True):
    """Requests of one kind, whose lengths are uniformly distributed in these ranges, both ends included."""

    client: str
    num_prompt_tokens: tuple[int, int]
    num_output_tokens: tuple[int, int]
    priority: int = 0
    ttft_slo_ms: float | None = None


# Ten levels apart, so that ageing lets no ordinary request overtake an urgent one for long.
URGENT = RequestClass("urgent", (16, 48), (8, 32), ttft_slo_ms=200.0)
ORDINARY = RequestClass("ordinary", (100, 300), (100, 300), priority=10)
MODEST = RequestClass("modest", (32, 64), (16, 48))
GREEDY = RequestClass("greedy", (200, 400), (100, 300))


def mixed_priority(maker: Maker) -> list[WorkloadRequest]:
    """A few urgent short requests among many long ordinary ones."""
    return _two_classes(maker, URGENT, ORDINARY)


def two_tenants(maker: Maker) -> list[WorkloadRequest]:
    """A client with many long requests, and one with few short ones."""
    return _two_classes(maker, MODEST, GREEDY)


def _two_classes(maker: Maker, rare: RequestClass, common: RequestClass) -> list[WorkloadRequest]:
    """Every eighth request is of the rare class."""
    requests = []
    for index in range(maker.num_requests):
        kind = common if (index + 1) % 8 else rare
        prompt = maker.prose(maker.rng.randint(*kind.num_prompt_tokens))
        num_output_tokens, greedy = maker.rng.randint(*kind.num_output_tokens), maker.is_greedy()
        whose = {"client": kind.client, "priority": kind.priority, "ttft_slo_ms": kind.ttft_slo_ms}
        requests.append(maker.request(index, prompt, num_output_tokens, 400, is_greedy=greedy, **whose))
    return requests


WORKLOADS: dict[str, Callable[[Maker], list[WorkloadRequest]]] = {
    "chat": chat,
    "code": code,
    "agent": agent,
    "uniform": uniform,
    "mixed-priority": mixed_priority,
    "two-tenants": two_tenants,
}
