"""Response bodies, exactly as OpenAI's API defines them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from shoal.receipts import Receipt
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.explanation import Explanation

FinishReasonName = Literal["stop", "length", "tool_calls", "function_call"]


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    """Tokens of thoughts, and drafted tokens that were verified.

    Those accepted are among the completion's tokens, or behind its end.
    """

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    reasoning_tokens: int = 0


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Timing(msgspec.Struct):
    """How each choice was served, in order."""

    choices: list[Explanation | None]


class Told(msgspec.Struct, kw_only=True):
    """What an answer of any API tells at its end if it is asked."""

    timing: Timing | msgspec.UnsetType = msgspec.UNSET
    receipt: Receipt | msgspec.UnsetType = msgspec.UNSET


# -- /v1/completions ---------------------------------------------------------------------------------------------


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, one entry a token; the first token of a prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(msgspec.Struct):
    """vLLM's: of the token that stands in the prompt, or of one of the most probable in its place."""

    logprob: float
    rank: int
    decoded_token: str


# For each token of the prompt, by token id; null for the first.
PromptLogprobs = list[dict[int, PromptLogprob] | None]


class CompletionChoice(msgspec.Struct):
    """Token ids and the prompt's log-probabilities are left out unless they were asked for."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonName | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class Completion(Told):
    """The answer, or a chunk of a stream; `usage` is left out of the chunks unless the client asked for it."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    seed: int | msgspec.UnsetType = msgspec.UNSET
    object: Literal["text_completion"] = "text_completion"


# -- /v1/chat/completions ----------------------------------------------------------------------------------------


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct):
    """Arguments are text: the JSON of an object, if nothing cut it off."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct):
    """What the model says; calls and reasoning are left out where there are none."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    function_call: FunctionCall | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(Told):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str
    usage: Usage
    seed: int
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    object: Literal["chat.completion"] = "chat.completion"


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """The first of a call has id, type, name and empty arguments; each of the others has a piece of the arguments."""

    index: int
    id: str | None = None
    type: str | None = None
    function: FunctionDelta | None = None


class ChatDelta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: FunctionDelta | None = None

    @property
    def only_content(self) -> str | None:
        """The content, if the delta says nothing else."""
        says_more = self.role or self.reasoning_content or self.tool_calls or self.function_call
        return None if says_more else self.content


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletionChunk(Told):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    seed: int | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


# -- the rest ----------------------------------------------------------------------------------------------------


class Capabilities(msgspec.Struct):
    """What a model can be asked for.

    Attributes:
        chat: its checkpoint has a chat template, so that tools can be offered too.
        reasoning: answers may begin with a thought that is kept apart.
        fill_in_middle: `suffix` of /v1/completions.
    """

    chat: bool
    tools: bool
    reasoning: bool
    fill_in_middle: bool
    embeddings: bool
    completions: bool = True
    structured_output: bool = True


class ModelCard(msgspec.Struct):
    """A model, as both OpenAI's and Anthropic's clients read it.

    Attributes:
        root: the checkpoint's folder or file, as vLLM tells it: a load generator on this machine finds the tokenizer.
    """

    id: str
    root: str
    created: int
    max_model_len: int
    capabilities: Capabilities
    display_name: str
    created_at: str  # RFC 3339
    object: Literal["model"] = "model"
    type: Literal["model"] = "model"
    owned_by: Literal["shoal"] = "shoal"


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    first_id: str
    last_id: str
    has_more: bool = False
    object: Literal["list"] = "list"


class SpecialToken(msgspec.Struct):
    content: str
    special: bool = True


class TokenizerInfo(msgspec.Struct):
    """The tokenizer, with the names that `tokenizer_config.json` has.

    Attributes:
        is_byte_level: whether every token is a run of bytes.
        special_tokens: their texts by name, such as `bos_token`.
        added_tokens_decoder: special tokens by id.
        chat_templates: by name; `chat_template` is the usual one.
    """

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    is_byte_level: bool
    special_tokens: dict[str, Any]
    added_tokens_decoder: dict[int, SpecialToken]
    chat_template: str | None
    chat_templates: dict[str, str]


class TokenizeResult(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | msgspec.UnsetType = msgspec.UNSET


class DetokenizeResult(msgspec.Struct):
    prompt: str


class EngineStatus(msgspec.Struct):
    """One engine.

    Attributes:
        engine: its name in metrics.
        is_ready: whether it takes requests; else another one takes its place.
        pid: of its process, if it is ready and on this machine.
        num_unfinished: requests that it has, or that wait for the next one.
    """

    engine: str
    is_ready: bool
    pid: int | None
    num_unfinished: int


class ClusterEngine(msgspec.Struct):
    """One engine replica of a cluster.

    Attributes:
        engine: its number, the label of its metrics.
        node: of Ray, on which it is.
        address: of its socket; null while another engine process takes the place of one that ended.
        fingerprint: of the model and of the settings by which other numbers are computed.
        num_unfinished: requests that it has.
        queue_seconds: for how long the oldest of the requests that wait has waited.
        kv_cache_usage: share of blocks owned by requests, 0 to 1.
    """

    engine: str
    replica: str
    node: str
    is_ready: bool
    address: str | None
    fingerprint: str | None
    num_unfinished: int
    queue_seconds: float
    kv_cache_usage: float


class ClusterServer(msgspec.Struct):
    """One API process of a cluster.

    Attributes:
        node: of Ray, on which it is.
    """

    replica: str
    node: str
    url: str


class Cluster(msgspec.Struct):
    """All that is there, of whatever fingerprint."""

    engines: list[ClusterEngine]
    servers: list[ClusterServer]


class ServerInfo(msgspec.Struct):
    """What the server computes with: the limits of each of its engines, and all settings but secrets.

    Attributes:
        kv_cache_bytes: of each engine.
        settings: by section, as in `shoal.toml`; the knobs of every policy stand in `scheduler`.
        engines: to which this API process is joined.
        cluster: that it is part of; null if the directory does not answer, left out on one machine.
    """

    version: str
    model: str
    num_parameters: int
    backend: str
    warning: str | None
    kv_cache_bytes: int
    limits: SchedulerConfig
    settings: dict[str, Any]
    engines: list[EngineStatus]
    cluster: Cluster | msgspec.UnsetType | None = msgspec.UNSET
