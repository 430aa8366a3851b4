"""Examples of requests and answers, as the bundled model gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.scheduler.config import SchedulerConfig
from shoal.server.wire.batches import Batch, Deleted, FileObject, Page, RequestCounts
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
    FinishReasonName,
    FunctionCall,
    ModelCard,
    ModelList,
    PromptTokensDetails,
    ServerInfo,
    TokenizeResult,
    ToolCall,
    Usage,
)

Bodies = Mapping[str, Mapping[str, Any]]

_MODEL, _CREATED, _FINGERPRINT, _SEED = "shoal-moe", 1795874638, "fp_9f3c6a1e5b20d784", 7
_USAGE = Usage(9, 8, 17, PromptTokensDetails(0), CompletionTokensDetails(0, 0))
_QUESTION = {"role": "user", "content": "Write a function that reverses a string."}
_WEATHER = {
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

# -- models and tokens -------------------------------------------------------------------------------------------------

MODEL = ModelCard(
    _MODEL,
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
    "float32, native (avx512, 2 threads)",
    None,
    402_653_184,
    SchedulerConfig(num_blocks=4096, max_model_len=1024),
    {"model": _MODEL, "server": {"host": "127.0.0.1", "port": 8000}},
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

# -- operations --------------------------------------------------------------------------------------------------------

METRICS = """\
# HELP vllm:num_requests_running Requests that run.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="shoal-moe"} 2.0
"""
