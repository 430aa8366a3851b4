"""What the client takes and gives.

A completion and a chat answer are the same thing once they have arrived, text and why it ended, so they share
their types; only the requests differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

Prompt = str | list[str] | list[int] | list[list[int]]
"""Text, token ids, or several of either."""


class Message(TypedDict):
    """One turn of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


class SamplingOptions(TypedDict, total=False):
    """Optional fields of every generation request.  What is not given is left to the server.

    The second group are extensions of OpenAI's API, under the names that vLLM gave them.  The third group tells the
    scheduling policy who sends the request and how urgent it is; it changes when tokens come, and never which.
    `speculation` "off" turns drafted tokens off for the request; the text stays the same.  `end_after` is for load
    tests: the output has exactly that number of tokens.
    """

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    n: int
    seed: int
    stop: str | list[str]
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]

    top_k: int
    min_p: float
    repetition_penalty: float
    min_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool

    user: str
    priority: int
    ttft_slo_ms: float
    tpot_slo_ms: float

    speculation: str

    end_after: int


class CompletionOptions(SamplingOptions, total=False):
    """Optional fields of a completion request; `logprobs` is the number of alternatives to report for each token."""

    echo: bool
    logprobs: int


class ChatOptions(SamplingOptions, total=False):
    """Optional fields of a chat request; `top_logprobs` is the number of alternatives to report for each token."""

    logprobs: bool
    top_logprobs: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request used.

    Attributes:
        num_cached_tokens: of the prompt's, those found in the prefix cache.
        num_accepted_tokens, num_rejected_tokens: drafted tokens that verification kept, and not.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a token; None for the first token of an echoed prompt.

    Attributes:
        top: the most probable tokens in its place with their log-probabilities, best first.
    """

    token: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One generated text; with `n` or several prompts there are several."""

    index: int
    text: str
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer.

    Attributes:
        created: seconds since the epoch.
        seed: what the server sampled with, if it tells; sent with the same request, it gives the same answer.
    """

    id: str
    created: int
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    seed: int | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one choice gained; `finish_reason` is set in its last delta."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of a streamed answer; the last has the `usage` and no choices."""

    id: str
    created: int
    model: str
    choices: tuple[ChoiceDelta, ...]
    usage: Usage | None = None
    seed: int | None = None

    @property
    def text(self) -> str:
        """The new text; in a stream of several choices, look at each delta's `index` instead."""
        return "".join(delta.text for delta in self.choices)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the server serves."""

    id: str
    created: int
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class Tokenization:
    """Token ids of a text or conversation, and the most that a request may have (`max_model_len`)."""

    token_ids: tuple[int, ...]
    max_model_len: int
