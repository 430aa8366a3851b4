"""Examples of requests and answers, as the bundled model gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from msgspec.structs import replace

from shoal.scheduler.config import SchedulerConfig
from shoal.server.engine.event_log import Lost, SeenStep, Snapshot
from shoal.server.engine.events import Parts, Row, StepEvent, Waiting
from shoal.server.wire import item_events, message_answers
from shoal.server.wire.batches import Batch, Deleted, FileObject, Page, RequestCounts
from shoal.server.wire.embeddings import Embedding, Embeddings, EmbeddingsUsage
from shoal.server.wire.engine import Load, Loads, Planned, PlanTable, RequestTokens, Times
from shoal.server.wire.items import (
    NO_LOGPROBS,
    IncompleteDetails,
    InputText,
    InputTokensDetails,
    ItemPage,
    MessageItem,
    OutputText,
    OutputTokensDetails,
    ReasoningConfig,
    ResponseObject,
    ResponseUsage,
    TextConfig,
    TextFormat,
)
from shoal.server.wire.message_answers import MessageAnswer, TextBlock
from shoal.server.wire.responses import (
    Capabilities,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionTokensDetails,
    DetokenizeResult,
    EngineStatus,
    FinishReasonName,
    FunctionCall,
    ModelCard,
    ModelList,
    PromptTokensDetails,
    ServerInfo,
    SpecialToken,
    TokenizeResult,
    TokenizerInfo,
    ToolCall,
    Usage,
)

Bodies = Mapping[str, Mapping[str, Any]]

_MODEL, _CREATED, _FINGERPRINT, _SEED = "shoal-moe", 1795874638, "fp_f37ff745824ee3f6", 7
_USAGE = Usage(9, 8, 17, PromptTokensDetails(0), CompletionTokensDetails(0, 0))
_QUESTION = {"role": "user", "content": "Write a function that reverses a string."}
_WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

# -- completions -------------------------------------------------------------------------------------------------------

COMPLETION_BODIES: Bodies = {
    "text": {"prompt": "def add(a, b):\n", "max_tokens": 8, "temperature": 0},
    "stream": {"prompt": "import os\n", "max_tokens": 8, "seed": 7, "stream": True},
    "several choices": {"prompt": ["import os\n", "import sys\n"], "max_tokens": 4, "n": 2, "logprobs": 2},
    "how it was served": {"prompt": "import os\n", "max_tokens": 8, "timing": True, "receipt": True},
    "one of some texts": {"prompt": "The colour is ", "structured_outputs": {"choice": ["red", "green"]}},
}


def _completion(text: str, finish_reason: FinishReasonName | None, **fields: Any) -> Completion:
    choices = [CompletionChoice(0, text, None, finish_reason)]
    return Completion("cmpl-634288296ce6eaea3381fa78", _CREATED, _MODEL, choices, _FINGERPRINT, **fields)


COMPLETION = _completion('    """Add two arrays together', "length", usage=_USAGE, seed=_SEED)
COMPLETION_EVENTS = [("", _completion("import", None, seed=_SEED)), ("", _completion(" sys\n", "length"))]

# -- chats -------------------------------------------------------------------------------------------------------------

CHAT_BODIES: Bodies = {
    "question": {"messages": [_QUESTION], "max_tokens": 32, "seed": 7},
    "stream": {
        "messages": [_QUESTION],
        "max_tokens": 32,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "tool": {
        "messages": [{"role": "user", "content": "How is the weather in Paris?"}],
        "tools": [_WEATHER],
        "tool_choice": "required",
        "max_tokens": 64,
    },
    "JSON of a schema": {
        "messages": [{"role": "user", "content": "Name a colour."}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"schema": {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}}},
        },
        "max_tokens": 64,
    },
}
_CHAT_ID = "chatcmpl-b17a8965ff351dbceb1f25e8"
_CALL = ToolCall("call_0d1f6f1e2cfbd2f1c1a0a9b3", FunctionCall("weather", '{"city": "Paris"}'))


def _chunk(delta: ChatDelta | None, finish_reason: FinishReasonName | None = None, **fields: Any) -> Any:
    choices = [] if delta is None else [ChatChunkChoice(0, delta, None, finish_reason)]
    chunk = ChatCompletionChunk(_CHAT_ID, _CREATED, _MODEL, choices, _FINGERPRINT, **({"usage": None} | fields))
    return "", chunk


CHAT = ChatCompletion(
    _CHAT_ID,
    _CREATED,
    _MODEL,
    [ChatChoice(0, ChatMessage(None, tool_calls=[_CALL]), None, "tool_calls")],
    _FINGERPRINT,
    _USAGE,
    _SEED,
)
CHAT_EVENTS = [
    _chunk(ChatDelta(role="assistant", content=""), seed=_SEED),
    _chunk(ChatDelta(content="```python\n")),
    _chunk(ChatDelta(content="def reverse(text):")),
    _chunk(ChatDelta(), "length"),
    _chunk(None, usage=_USAGE),
]

# -- Anthropic's messages ----------------------------------------------------------------------------------------------

_SAID = {"model": _MODEL, "messages": [_QUESTION]}
MESSAGE_BODIES: Bodies = {
    "question": {**_SAID, "max_tokens": 32},
    "stream": {**_SAID, "max_tokens": 32, "stream": True},
    "how it was served": {**_SAID, "max_tokens": 32, "timing": True, "receipt": True},
    "tool": {
        "model": _MODEL,
        "max_tokens": 64,
        "system": "You call tools.",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "How is the weather in Paris?"}]}],
        "tools": [{"name": "weather", "input_schema": _WEATHER["function"]["parameters"]}],
        "tool_choice": {"type": "any"},
    },
}
COUNT_BODIES: Bodies = {"question": _SAID}


def _message(text: str, num_tokens: int, **fields: Any) -> MessageAnswer:
    content: list[message_answers.ContentBlock] = [TextBlock(text)] if text else []
    usage = message_answers.Usage(14, num_tokens, 0)
    return MessageAnswer("msg_819226eae447575697207ecc", _MODEL, content, usage, **fields)


MESSAGE = _message("```python\ndef reverse(text):", 8, stop_reason="max_tokens")
MESSAGE_EVENTS = [
    (one.type, one)
    for one in (
        message_answers.MessageStart(_message("", 0)),
        message_answers.Ping(),
        message_answers.BlockStart(0, TextBlock()),
        message_answers.BlockDelta(0, message_answers.TextDelta("```python\n")),
        message_answers.BlockDelta(0, message_answers.TextDelta("def reverse(text):")),
        message_answers.BlockStop(0),
        message_answers.MessageDelta(message_answers.Stop("max_tokens", None), MESSAGE.usage),
        message_answers.MessageStop(),
    )
]

# -- responses ---------------------------------------------------------------------------------------------------------

INPUT_BODIES: Bodies = {"question": {"instructions": "Be brief.", "input": _QUESTION["content"]}}
RESPONSE_BODIES: Bodies = {
    "question": {**INPUT_BODIES["question"], "max_output_tokens": 32},
    "stream": {"input": [_QUESTION], "max_output_tokens": 32, "seed": 7, "stream": True},
    "in the background": {"input": [_QUESTION], "max_output_tokens": 32, "background": True},
    "how it was served": {"input": [_QUESTION], "max_output_tokens": 32, "timing": True, "receipt": True},
    "tool": {
        "input": "How is the weather in Paris?",
        "tools": [{"type": "function", **_WEATHER["function"]}],
        "tool_choice": "required",
        "max_output_tokens": 64,
    },
}
_TEXT = "def reverse(text):"
_ITEM_ID = "msg_5d8c3a7e91f04b26c8d1e7a2"


def _item(text: str, status: Literal["in_progress", "incomplete"]) -> MessageItem:
    return MessageItem(id=_ITEM_ID, status=status, content=[OutputText(text)] if text else [])


def _response(**fields: Any) -> ResponseObject:
    return ResponseObject(
        id="resp_0b6e2f4a8c1d3e5f7a9b0c2d",
        created_at=_CREATED,
        background=False,
        instructions="Be brief.",
        max_output_tokens=4,
        max_tool_calls=None,
        model=_MODEL,
        parallel_tool_calls=True,
        previous_response_id=None,
        prompt_cache_key=None,
        reasoning=ReasoningConfig(),
        safety_identifier=None,
        store=True,
        temperature=0.7,
        text=TextConfig(format=TextFormat(type="text")),
        tool_choice="auto",
        tools=[],
        top_logprobs=0,
        top_p=0.9,
        truncation="disabled",
        user=None,
        metadata={},
        seed=_SEED,
        **fields,
    )


RESPONSE = _response(
    status="incomplete",
    incomplete_details=IncompleteDetails("max_output_tokens"),
    output=[_item(_TEXT, "incomplete")],
    usage=ResponseUsage(20, InputTokensDetails(0), 4, OutputTokensDetails(0), 24),
)
_BEGUN = _response(status="in_progress", output=[])
_PLACE: Any = {"item_id": _ITEM_ID, "output_index": 0}
RESPONSE_EVENTS = [
    (one.kind, replace(one, sequence_number=number))
    for number, one in enumerate(
        (
            item_events.Created(response=_BEGUN),
            item_events.InProgress(response=_BEGUN),
            item_events.ItemAdded(output_index=0, item=_item("", "in_progress")),
            item_events.PartAdded(**_PLACE, part=OutputText()),
            item_events.TextDelta(**_PLACE, delta=_TEXT, logprobs=NO_LOGPROBS),
            item_events.TextDone(**_PLACE, text=_TEXT, logprobs=NO_LOGPROBS),
            item_events.PartDone(**_PLACE, part=OutputText(_TEXT)),
            item_events.ItemDone(output_index=0, item=_item(_TEXT, "incomplete")),
            item_events.Incomplete(response=RESPONSE),
        )
    )
]
_ASKED = MessageItem(
    id="msg_c1a7e05b93d24f68a0b3d9e4", role="user", status="completed", content=[InputText(_QUESTION["content"])]
)
ITEMS = ItemPage([_ASKED], has_more=False, first_id=_ASKED.id, last_id=_ASKED.id)

# -- embeddings --------------------------------------------------------------------------------------------------------

EMBEDDING_BODIES: Bodies = {
    "text": {"input": "import os", "dimensions": 3},
    "base64": {"input": ["import os", "import sys"], "encoding_format": "base64"},
}
EMBEDDINGS = Embeddings([Embedding(0, [0.422, -0.557, 0.715])], _MODEL, EmbeddingsUsage(3, 3))

# -- models and tokens -------------------------------------------------------------------------------------------------

MODEL = ModelCard(
    _MODEL,
    "/opt/models/shoal-moe",
    _CREATED,
    1024,
    Capabilities(chat=True, tools=True, reasoning=False, fill_in_middle=False, embeddings=True),
    _MODEL,
    "2026-11-28T17:23:58Z",
)
MODELS = ModelList([MODEL], _MODEL, _MODEL)
SERVER_INFO = ServerInfo(
    "0.1.0",
    _MODEL,
    15_497_728,
    "bfloat16 weights, native (avx512, 2 threads)",
    None,
    402_653_184,
    SchedulerConfig(num_blocks=4096, max_model_len=1024),
    {"model": _MODEL, "server": {"host": "127.0.0.1", "port": 8000}},
    [EngineStatus("0", is_ready=True, pid=4711, num_unfinished=3)],
)
TOKENIZER_INFO = TokenizerInfo(
    tokenizer_class="PreTrainedTokenizerFast",
    vocab_size=4096,
    model_max_length=1024,
    is_byte_level=True,
    special_tokens={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    added_tokens_decoder={0: SpecialToken("<|endoftext|>")},
    chat_template="{% for message in messages %}...{% endfor %}",
    chat_templates={"default": "{% for message in messages %}...{% endfor %}"},
)
TOKENIZE_BODIES: Bodies = {"text": {"prompt": "import os"}, "conversation": {"messages": [_QUESTION]}}
TOKENIZED = TokenizeResult(3, 1024, [0, 703, 982])
DETOKENIZE_BODIES: Bodies = {"tokens": {"tokens": [0, 3, 5]}}
DETOKENIZED = DetokenizeResult("<|endoftext|>import os")

# -- batches -----------------------------------------------------------------------------------------------------------

FILE = FileObject(
    id="file-e7a5f20c6a3c2d28b3f7a3c8", bytes=113, created_at=_CREATED, filename="lines.jsonl", purpose="batch"
)
FILES = Page([FILE], has_more=False, first_id=FILE.id, last_id=FILE.id)
DELETED = Deleted(FILE.id)
LINES = (
    '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "import os", "max_tokens": 4}}\n'
)
BATCH_BODIES: Bodies = {
    "batch": {"input_file_id": FILE.id, "endpoint": "/v1/completions", "completion_window": "24h"},
}
BATCH = Batch(
    id="batch_5a0c1b6f2d1f4e70a2b9c7d3",
    endpoint="/v1/completions",
    model=_MODEL,
    input_file_id=FILE.id,
    completion_window="24h",
    status="in_progress",
    created_at=_CREATED,
    in_progress_at=_CREATED + 1,
    expires_at=_CREATED + 86_400,
    request_counts=RequestCounts(total=2, completed=1),
)
BATCHES = Page([BATCH], has_more=False, first_id=BATCH.id, last_id=BATCH.id)

# -- the engine --------------------------------------------------------------------------------------------------------

LOG_NAME = "5f1c20aa"
_LIMITS = SchedulerConfig(num_blocks=4096, max_model_len=1024)
_REQUEST = f"{CHAT.id}-0-0"
ENGINE_EVENTS = (
    ("snapshot", Snapshot(_CREATED, 1, _LIMITS)),
    (
        "step",
        SeenStep(
            _CREATED + 0.25,
            1,
            StepEvent(
                number=7,
                num_steps=1,
                num_tokens=1,
                policy="fcfs",
                batch=[Row(0, _REQUEST, "decode", 14, 20, 46, 18, 1, 0, 0, 0, 0, 0.031)],
                waiting=[Waiting(f"{COMPLETION.id}-0-0", "rows", 120, 8, 0, "", 0.002)],
                num_waiting=1,
                num_blocks=4,
                num_owned_blocks=2,
                blocks_per_cell=1,
                blocks="00-.",
                tables={_REQUEST: [0, 1]},
                num_prefix_queries=0,
                num_prefix_hits=0,
                num_draft_tokens=0,
                num_accepted_tokens_per_pos=[],
                seconds=0.04,
                num_output_tokens=1,
                parts=Parts(0.00001, 0.00002, 0.0006, 0.00004, 0.00001, 0.00002, 0.00001),
            ),
        ),
    ),
    ("lost", Lost(_CREATED + 60)),
)
REQUEST_TOKENS = RequestTokens(_REQUEST, 2, ["import", " os", "\n"])
LOAD = Load(
    id="load-1b503751b2087400d56cf8aa",
    state="finished",
    workload="chat",
    users=16,
    seconds=1.0,
    policy="fcfs",
    started=_CREATED,
    elapsed=1.0,
    num_requests=21,
    num_output_tokens=1300,
    tokens_per_second=1300.0,
    ttft=Times(9.5, 31.0),
    itl=Times(2.1, 4.4),
    e2e=Times(140.0, 320.5),
    timeline=[640, 660],
)
PLANNED = Planned(
    plan={"model": _MODEL, "context": 512, "batch": 16, "pays": {"speculation": "from a batch of 1 on"}},
    tables=[PlanTable("Where it pays", ["what", "pays"], [["speculation", "from a batch of 1 on"]])],
)
LOADS = Loads([LOAD], ["fair", "fcfs", "static"])

# -- operations --------------------------------------------------------------------------------------------------------

METRICS = """\
# HELP vllm:num_requests_running Requests that run.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="shoal-moe"} 2.0
"""
