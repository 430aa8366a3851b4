"""An answer is generated again, as its receipt says, and compared with what it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from shoal.clients import Choice, Completion, MessageAnswer, MessageOptions, Response, ShoalClient, wire
from shoal.clients.errors import ClientError
from shoal.clients.whole import Growing, GrowingAnswer, GrowingMessage
from shoal.loadtest.records import LoadTestError
from shoal.receipts import VERSION, Receipt, ReceiptOutput, receipt_sha256, tokens_sha256

MAX_FILE_BYTES = 256 * 2**20
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
# Fields of a request that change no token, or that say how its answer travels.
_DROPPED = {
    "background", "keep_alive", "metadata", "model", "priority", "request_id", "service_tier", "speculation", "store",
    "stream", "stream_interval", "stream_options", "timeout", "timing", "tpot_slo_ms", "ttft_slo_ms", "user",
}  # fmt: skip
# Settings that a receipt may name; they become options of a server.
_SETTINGS = ("backend", "device", "dtype", "quantization", "kv_cache_dtype")

# A request that nobody sends, whose answer is read.
_LEAST: MessageOptions = {"model": "", "max_tokens": 0}

Answer = Completion[Any] | Response | MessageAnswer
Event = TypeVar("Event")
Whole = TypeVar("Whole")


class Stored(Struct, frozen=True):
    """An answer as it was kept.

    Attributes:
        answer: what it says, as clients read it; None if only the end of a stream was kept that says nothing of it.
    """

    answer: Answer | None
    receipt: Receipt


class Replayed(Struct, frozen=True, kw_only=True):
    """What came of it.

    Attributes:
        is_same: whether every token is the same.
        num_tokens: of all choices, as the receipt counts them.
        differences: where it is not the same, in sentences.
        notes: what else is not as it was: the model, its settings, the prompt.
    """

    is_same: bool
    num_tokens: int
    num_choices: int
    differences: list[str]
    notes: list[str]


def read_answer(path: Path) -> Stored:
    """Read an answer that was kept: its JSON, or a stream's events as they came, or a JSON list of them.

    Raises:
        LoadTestError: it cannot be read, or has no receipt, or a receipt that was changed.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise LoadTestError(f"{path} has more than {MAX_FILE_BYTES:,} bytes: that is no answer")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"{path} cannot be read: {error}") from error
    parts = _parts(path, text)
    told = next((part["receipt"] for part in reversed(parts) if part.get("receipt") is not None), None)
    if told is None:
        raise LoadTestError(f'{path} has no receipt: ask for one with "receipt": true, and keep the end of a stream')
    receipt = _receipt(path, told)
    try:
        return Stored(_answer(receipt.endpoint, parts), receipt)
    except ClientError as error:
        raise LoadTestError(f"{path} is no whole answer: {str(error)[:200]}") from error


def _parts(path: Path, text: str) -> list[dict[str, Any]]:
    """The objects of the file: one, or the chunks of a stream; events of a response are what they say of all of it."""
    try:
        if text.lstrip().startswith(("{", "[")):
            value = json.loads(text)
            parts = value if isinstance(value, list) else [value]
        else:
            events = [line.removeprefix("data:").strip() for line in text.split("\n") if line.startswith("data:")]
            parts = [json.loads(event) for event in events if event != "[DONE]"]
    except (ValueError, RecursionError) as error:
        raise LoadTestError(f"{path} is neither JSON nor a stream of events: {str(error)[:200]}") from error
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise LoadTestError(f"{path} is no answer: expected a JSON object, or the events of a stream")
    responses = [part["response"] for part in parts if isinstance(part.get("response"), dict)]
    return responses or parts


def _receipt(path: Path, told: Any) -> Receipt:
    if not isinstance(told, dict) or told.get("version") != VERSION:
        version = told.get("version") if isinstance(told, dict) else None
        raise LoadTestError(f"{path}: the receipt has version {str(version)[:32]!r}, and this Shoal reads {VERSION}")
    if told.get("sha256") != receipt_sha256(told):
        raise LoadTestError(f"{path}: the receipt was changed after the server had written it: its sha256 is another")
    try:
        receipt = msgspec.convert(told, Receipt)
    except msgspec.ValidationError as error:
        raise LoadTestError(f"{path}: the receipt is malformed: {str(error)[:200]}") from error
    for number, output in enumerate(receipt.outputs):
        if output.sha256 != tokens_sha256(output.token_ids) or output.num_tokens != len(output.token_ids):
            raise LoadTestError(f"{path}: the tokens of choice {number} were changed: their sha256 is another")
    if receipt.endpoint not in (COMPLETIONS, CHAT, MESSAGES, RESPONSES):
        raise LoadTestError(f"{path}: answers of {receipt.endpoint[:64]!r} cannot be replayed")
    return receipt


def _answer(endpoint: str, parts: list[dict[str, Any]]) -> Answer | None:
    """What the parts say together."""
    only = parts[0] if len(parts) == 1 else {}
    if endpoint == RESPONSES:
        return wire.respond("", {}).parse(json.dumps(parts[-1]))
    if endpoint == MESSAGES:
        if only.get("type") == "message":
            return wire.message([], _LEAST).parse(json.dumps(only))
        return None if only else _grown(GrowingMessage(None), wire.stream_message([], _LEAST), parts)
    if only.get("choices"):
        return wire.chat([], {}).parse(json.dumps(only))
    return _grown(GrowingAnswer(None), wire.stream_chat([], {}), parts)


def _grown(answer: Growing[Event, Whole], call: wire.Call[Event], parts: list[dict[str, Any]]) -> Whole:
    for part in parts:
        answer.add(call.parse(json.dumps(part)))
    return answer.whole()


def server_settings(receipt: Receipt) -> Mapping[str, Any]:
    """The settings of a server that computes the same numbers."""
    return {name: receipt.model.settings.get(name) for name in _SETTINGS}


def replay(stored: Stored, client: ShoalClient) -> Replayed:
    """Have the answer generated again, and compare.

    Raises:
        ClientError: the server refuses it, or cannot be reached.
        LoadTestError: the server gives no receipt.
    """
    before = stored.receipt
    answer = _ask_again(before, client)
    if answer.receipt is None:
        raise LoadTestError("the server gives no receipt: it is no Shoal, or an older one")
    after = msgspec.convert(answer.receipt, Receipt)
    differences = [*_outputs(before.outputs, after.outputs)]
    is_same = not differences
    if is_same:
        differences = [*_texts(stored.answer, answer)]
    return Replayed(
        is_same=is_same and not differences,
        num_tokens=sum(output.num_tokens for output in before.outputs),
        num_choices=len(before.outputs),
        differences=differences,
        notes=[*_notes(before, after)],
    )


def _ask_again(receipt: Receipt, client: ShoalClient) -> Answer:
    """The request of the receipt, with what the server resolved then."""
    fields = {name: value for name, value in receipt.request.items() if name not in _DROPPED and value is not None}
    fields |= receipt.sampling | {"receipt": True}
    if receipt.endpoint == RESPONSES:
        fields |= {"max_output_tokens": fields.pop("max_tokens"), "store": False}
        return client.respond(fields.pop("input"), **fields)
    if receipt.endpoint == MESSAGES:
        messages, fields["model"] = fields.pop("messages"), client.models()[0].id
        if not receipt.request.get("stream"):
            return client.message(messages, **fields)
        with client.stream_message(messages, **fields) as stream:  # an input that was cut off reads otherwise
            return stream.whole()
    if receipt.endpoint == CHAT:
        if "max_completion_tokens" in fields:
            del fields["max_tokens"]
        return client.chat(fields.pop("messages"), **fields)
    return client.complete(fields.pop("prompt"), **fields)


def _outputs(before: list[ReceiptOutput], after: list[ReceiptOutput]) -> Iterator[str]:
    """Where tokens differ."""
    if len(before) != len(after):
        yield f"there were {len(before)} choices, and now there are {len(after)}"
        return
    for number, (then, now) in enumerate(zip(before, after, strict=True)):
        if then.token_ids == now.token_ids:
            continue
        pairs = zip(then.token_ids, now.token_ids, strict=False)
        place = next((place for place, (old, new) in enumerate(pairs) if old != new), None)
        if place is None:
            yield f"choice {number}: it had {then.num_tokens} tokens, and now it has {now.num_tokens}, else the same"
        else:
            old, new = then.token_ids[place], now.token_ids[place]
            yield f"choice {number}: token {place} of {then.num_tokens} was {old}, and now it is {new}"


def _texts(stored: Answer | None, answer: Answer) -> Iterator[str]:
    """Where what was kept is not what the same tokens say."""
    before, after = _said(stored) if stored else [], _said(answer)
    if before and len(before) != len(after):
        yield f"{len(before)} choices were kept, but the receipt has {len(after)}: they were changed"
        return
    for number, (then, now) in enumerate(zip(before, after, strict=False)):
        if then != now:
            yield f"choice {number}: the tokens are the same, but what was kept is not what they say: it was changed"


def _said(answer: Answer) -> list[tuple[Any, ...]]:
    """What each choice says; ids are drawn anew each time."""
    choices: Sequence[Choice[Any] | Response | MessageAnswer]
    choices = answer.choices if isinstance(answer, Completion) else [answer]
    return [
        (choice.text, choice.reasoning, [(call.name, call.arguments_json) for call in choice.tool_calls])
        for choice in choices
    ]


def _notes(before: Receipt, after: Receipt) -> Iterator[str]:
    """What else is not as it was."""
    then, now = before.model, after.model
    if None in (then.sha256, now.sha256):
        yield "the model's files were changed while the server ran: whether it is the same model is unknown"
    elif then.sha256 != now.sha256:
        yield f"the model differs: its sha256 was {then.sha256}, and now it is {now.sha256}"
    for name in then.settings | now.settings:
        if (old := then.settings.get(name)) != (new := now.settings.get(name)):
            yield f"the setting {name} was {old!r}, and now it is {new!r}"
    if before.server != after.server:
        yield f"Shoal was version {before.server}, and now it is {after.server}"
    if before.prompts != after.prompts:
        yield "the prompt has other tokens: the chat template tells the date, or it or the tokenizer differs"
