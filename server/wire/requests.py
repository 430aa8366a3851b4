"""Request bodies, as OpenAI's API defines them, with the extensions that vLLM's users know.

Parameters that cannot change the tokens (`metadata`, `store`, ...) are accepted and ignored; those that would ask for
what this server does not do are refused, unless they ask for nothing.  What is not listed is ignored, and named in a
header: see `parse_body`.  Every number has a range that the engine's types can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Raw, field

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.wire.body import Body, Refusal
from shoal.server.wire.constraints import TOOLS, ConstrainedBody, Constraint
from shoal.server.wire.conversations import (
    MAX_TOOLS,
    ChosenTools,
    FunctionDefinition,
    Messages,
    NamedFunction,
    Tool,
    ToolChoice,
    ToolMode,
    Tools,
    Variables,
    check_tools,
    check_variables,
)

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 128
MAX_ALLOWED_TOKENS = 400_000
MAX_LOGPROBS = 20
MAX_SIGMAS = 1000
MAX_SALT_CHARS = 256
MAX_ID_CHARS = 256
HEADER_TEXT = r"^[ -~]+(?!\n)$"  # what may stand in a header of the answer
MAX_TEMPLATE_CHARS = 65_536
MAX_DOCUMENTS = 128
MAX_TOKENIZED_CHARS = 2_097_152
MAX_PRIORITY = 1000
MAX_SLO_MS = 3_600_000
MAX_TIMEOUT_SECONDS = 86_400
MAX_ENTRIES = 1024  # of `logit_bias` and `stop_token_ids`
MAX_INT = 2**31 - 1  # the engine's integers have 32 bits
MAX_SEED = 2**64 - 1

Count = Annotated[int, Meta(ge=0, le=MAX_INT)]
MaxTokens = Annotated[int, Meta(ge=-1, le=MAX_INT)]  # -1 is as many as fit, as llama.cpp has it
TokenId = Annotated[int, Meta(ge=0, le=MAX_INT)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=10)]
Milliseconds = Annotated[float, Meta(gt=0, le=MAX_SLO_MS)]
Seconds = Annotated[float, Meta(gt=0, le=MAX_TIMEOUT_SECONDS)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_STRING_CHARS)]
BadWord = Annotated[str, Meta(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
Interval = Annotated[int, Meta(ge=1, le=MAX_INT)]  # in tokens
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]


SAMPLING = "this server does not sample so"
SEARCH = "this server samples and does not search: ask for n choices"
REFUSED = {
    "use_beam_search": Refusal(SEARCH),
    "length_penalty": Refusal(SEARCH, neutral=1),
    "early_stopping": Refusal(SEARCH),
    "top_a": Refusal(SAMPLING),
    "tfs_z": Refusal(SAMPLING, neutral=1),
    "dry_multiplier": Refusal(SAMPLING),
    "mirostat": Refusal(SAMPLING),
    "dynatemp_range": Refusal(SAMPLING),
    "thinking_token_budget": Refusal("this server does not cut thoughts"),
    "repetition_detection": Refusal("this server ends no text for what it repeats: use frequency_penalty or stop"),
    "lora_path": Refusal("this server has no adapters"),
    "lora_request": Refusal("this server has no adapters"),
    "logits_processors": Refusal("this server runs no code of requests"),
}


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # with it every chunk has the usage so far
    include_obfuscation: bool | None = None  # accepted and ignored: no event is padded


class SamplingBody(ConstrainedBody):
    """How tokens are chosen, and where a text ends."""

    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: MaxTokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_ENTRIES)] | None = (
        None
    )
    seed: Annotated[int, Meta(ge=-(2**63), extra_json_schema={"maximum": MAX_SEED})] | None = None
    stop: (
        Annotated[str, Meta(max_length=MAX_STOP_STRING_CHARS)]
        | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
        | None
    ) = None

    # extensions
    top_k: Annotated[int, Meta(ge=-1, le=MAX_INT)] | None = None  # vLLM's users write -1 for all
    min_p: Share | None = None
    top_n_sigma: Annotated[float, Meta(ge=-MAX_SIGMAS, le=MAX_SIGMAS)] = 0.0  # 0 and less keep all, as llama.cpp has it
    typical_p: Share = 1.0
    xtc_probability: Share = 0.0
    xtc_threshold: Share = 0.1
    repetition_penalty: RepetitionPenalty | None = None
    min_tokens: Count = 0
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_ENTRIES)] = field(default_factory=list)
    ignore_eos: bool = False
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None = None
    bad_words: Annotated[list[BadWord], Meta(max_length=MAX_BAD_WORDS)] = field(default_factory=list)

    # what is told of the tokens: log-probabilities of these in place of the most probable ones
    logprob_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_LOGPROBS)] | None = None

    # what the text shows
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    aliases: ClassVar[Mapping[str, str]] = {"n_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}
    refused: ClassVar[Mapping[str, Refusal]] = REFUSED

    def check(self) -> None:
        if self.seed is not None and self.seed > MAX_SEED:
            raise InvalidRequestError(f"seed: expected an integer <= {MAX_SEED}", param="seed")

    @property
    def dead_end(self) -> Constraint:
        """What a text cannot keep to that comes to a point where no token may follow."""
        for name in ("allowed_token_ids", "bad_words"):
            if getattr(self, name):
                return Constraint(name, "choice", None)
        return self.constraint() or TOOLS

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if self.stop and isinstance(self.stop, str) else list(self.stop or [])


class GenerationBody(SamplingBody):
    """What both kinds of completion have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_interval: Interval = 1

    # for the scheduling policy: they change when tokens come, and not which
    user: str | None = None
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    ttft_slo_ms: Milliseconds | None = None
    tpot_slo_ms: Milliseconds | None = None

    # a request that cannot be finished in this time is refused, and one that is not ends with an error
    timeout: Seconds | None = None

    # prefixes are found in the cache by requests with the same salt only
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_SALT_CHARS)] | None = None

    # what the server is told of the prompt, and tells of tokens
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=MAX_INT)] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    prompt_logprobs: NumLogprobs | None = None
    request_id: Annotated[str, Meta(pattern=HEADER_TEXT, max_length=MAX_ID_CHARS)] | None = None

    # what the answer tells at its end: how it was served, and how to have it again
    timing: bool = False
    receipt: bool = False

    # for those who compare: it changes how fast tokens come, and not which
    speculation: Literal["off", "draft", "mtp", "self", "suffix"] | None = None

    # for load tests: the model ends the text with exactly this output token, and nothing that schedules is told
    end_after: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None

    # accepted and ignored: they cannot change the tokens
    metadata: Raw = field(default_factory=Raw)
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    spaces_between_special_tokens: bool | None = None
    detokenize: Literal[True] | None = None
    cache_prompt: bool | None = None
    keep_alive: Raw = field(default_factory=Raw)
    prediction: Raw = field(default_factory=Raw)
    best_of: Literal[1] | None = None

    def check(self) -> None:
        super().check()
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options: is only allowed when stream is true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError("prompt_logprobs: a stream has none", param="prompt_logprobs")


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool = False
    logprobs: NumLogprobs | None = None
    suffix: Annotated[str, Meta(max_length=MAX_TOKENIZED_CHARS)] | None = None
    aliases: ClassVar[Mapping[str, str]] = {**SamplingBody.aliases, "max_completion_tokens": "max_tokens"}

    def check(self) -> None:
        super().check()
        for name in ("echo", "truncate_prompt_tokens", "prompt_logprobs"):
            if self.suffix and getattr(self, name) not in (False, None):
                raise InvalidRequestError(f"{name}: is not taken beside suffix", param=name)

    @property
    def num_prompts(self) -> int:
        is_list = isinstance(self.prompt, list) and not isinstance(next(iter(self.prompt), 0), int)
        return len(self.prompt) if is_list else 1


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Messages
    parse_special: bool = False  # as llama.cpp has it: special tokens that messages spell become themselves
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[FunctionDefinition], Meta(max_length=MAX_TOOLS)] | None = None  # as it was before tools
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    chat_template: Annotated[str, Meta(max_length=MAX_TEMPLATE_CHARS)] | None = None
    documents: Annotated[list[dict[str, Any]], Meta(max_length=MAX_DOCUMENTS)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    include_reasoning: bool = True
    echo: bool = False
    verbosity: str | None = None  # accepted and ignored
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: Variables | None = None
    modalities: list[Literal["text"]] | None = None

    def check(self) -> None:
        super().check()
        if self.continue_final_message and (self.add_generation_prompt or self.messages[-1].role != "assistant"):
            raise InvalidRequestError(
                "continue_final_message: needs a last message of the assistant, and add_generation_prompt to be false",
                param="continue_final_message",
            )
        if self.functions is not None:
            self._read_functions(self.functions)
        check_tools(self.tools or [], self.tool_choice)
        check_variables(self.chat_template_kwargs or {})

    def _read_functions(self, functions: list[FunctionDefinition]) -> None:
        """Take functions for tools."""
        if self.tools is not None or self.tool_choice is not None:
            raise InvalidRequestError("functions: contradicts tools, which have taken its place", param="functions")
        choice = self.function_call
        self.tools = [Tool(function=function) for function in functions]
        self.tool_choice = ChosenTools(function=choice) if isinstance(choice, NamedFunction) else choice
        self.parallel_tool_calls = False

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model is told of: none if it may not call any."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def callable_tools(self) -> list[Tool]:
        """Those of them that it may call."""
        if isinstance(self.tool_choice, ChosenTools):
            return [tool for tool in self.offered_tools if tool.function.name in self.tool_choice.names]
        return self.offered_tools

    @property
    def tool_mode(self) -> ToolMode:
        return self.tool_choice.mode if isinstance(self.tool_choice, ChosenTools) else self.tool_choice or "auto"

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the request tells the chat template; templates know one of two names for no reasoning at all."""
        variables: dict[str, Any] = {} if self.documents is None else {"documents": self.documents}
        if self.reasoning_effort is not None:
            variables["reasoning_effort"] = self.reasoning_effort
        if self.reasoning_effort == "none":
            variables["enable_thinking"] = False
        return variables | (self.chat_template_kwargs or {})


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or the messages of a chat with its tools."""

    model: str | None = None
    prompt: Annotated[str, Meta(max_length=MAX_TOKENIZED_CHARS)] | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template: Annotated[str, Meta(max_length=MAX_TEMPLATE_CHARS)] | None = None
    chat_template_kwargs: Variables | None = None
    parse_special: bool = False
    add_special_tokens: bool | None = None  # true for prompts
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either prompt or messages", param="prompt")
        if self.messages is not None:
            self.chat.check()

    @property
    def chat(self) -> ChatBody:
        shared = [name for name in self.__struct_fields__ if name in ChatBody.__struct_fields__]
        return ChatBody(**{name: getattr(self, name) for name in shared})


class DetokenizeBody(Body, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
