"""What a user's program may rely on."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

from shoal import clients
from shoal.clients import AsyncShoalClient, ClientError, ShoalClient


def test_the_public_names_are_pinned() -> None:
    assert set(clients.__all__) == {
        *("ShoalClient", "AsyncShoalClient", "Stream", "AsyncStream"),
        *("SamplingOptions", "CompletionOptions", "ChatOptions", "Message", "Prompt"),
        *("Completion", "Choice", "Chunk", "ChoiceDelta", "TokenLogprob", "Usage", "Model", "Tokenization"),
        *("Timing", "Receipt", "Capabilities", "PromptLogprob", "ServerInfo", "TokenizationOptions", "TokenizerInfo"),
        *("EmbeddingOptions", "Embeddings"),
        *("Response", "ResponseEvent", "ResponseInput", "ResponseOptions", "Item"),
        *("MessageAnswer", "MessageEvent", "MessageOptions", "MessagePrompt", "Block"),
        *("Batch", "BatchError", "BatchLine", "BatchResult", "RequestCounts", "File"),
        *("ListOptions", "OrderedListOptions", "FileListOptions", "Page"),
        *("ResponseFormat", "JsonModel", "StructuredOutputs", "Tool", "ToolChoice", "ToolCall", "ToolCallDelta"),
        *("ClientError", "UnsendableError", "ProtocolError", "ParseError"),
        *("TransportError", "UnreachableError", "TimedOutError", "BrokenConnectionError"),
        *("ApiError", "StatusError", "StreamError"),
    }
    for name in clients.__all__:
        assert getattr(clients, name) is not None
    assert not hasattr(clients, "no_such_name")


def test_the_drawn_tree_of_errors_is_the_real_one() -> None:
    def draw(error: type[Exception], depth: int = 0) -> list[tuple[int, str]]:
        below = [entry for child in error.__subclasses__() for entry in draw(child, depth + 1)]
        return [(depth, error.__name__), *below]

    lines = re.findall(r"^ {4}([| `-]*)(\w+Error) ", clients.errors.__doc__ or "", re.MULTILINE)
    assert [(len(stem) // 4, name) for stem, name in lines] == draw(ClientError)


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    def public(kind: type) -> dict[str, list[inspect.Parameter]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        named = {name: method for name, method in methods if not name.startswith("_") or name == "__init__"}
        return {name: list(inspect.signature(method).parameters.values()) for name, method in named.items()}

    assert public(ShoalClient) == public(AsyncShoalClient)


def test_the_command_line_is_imported_without_httpx() -> None:
    code = "import sys, shoal.clients.cli; sys.exit('httpx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
