"""From tokens to the text of a choice, however many tokens come at once."""

from __future__ import annotations

import itertools

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.output import FinishReason, RequestOutput, SamplingParams, TokenLogprobs
from shoal.server.engine.journal import Journal
from shoal.server.engine.messages import EngineRequest
from shoal.server.text import MAX_SCORED, Choice, Delta
from tests.examples import examples

EOS = 256


def bytes_tokenizer() -> Tokenizer:
    """A token for each byte, in an order of its own, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|eos|>"])
    return Tokenizer(tokenizer)


TOKENIZER = bytes_tokenizer()
texts = st.text("ab数👍", max_size=12)


def choice(
    stop_strings: list[str], *, prompt: str = "p", echo: bool = False, num_logprobs: int | None = None
) -> Choice:
    params = SamplingParams(max_tokens=99, seed=0, num_logprobs=num_logprobs, num_prompt_logprobs=num_logprobs)
    request = EngineRequest("a", TOKENIZER.encode(prompt), params)
    return Choice(0, Journal(request, "0", 0.0), TOKENIZER, stop_strings, prompt if echo else None)


def feed(choice: Choice, token_ids: list[int], cuts: list[int], reason: FinishReason) -> list[Delta]:
    """The deltas of tokens that come in groups, up to the one that finishes the choice."""
    bounds = [0, *sorted(cut for cut in cuts if cut < len(token_ids)), len(token_ids)]
    deltas = []
    for start, end in itertools.pairwise(bounds):
        is_last = end == len(token_ids)
        deltas += choice.feed(RequestOutput("a", token_ids[start:end], reason if is_last else None))
        if choice.is_finished:
            break
    return deltas


@settings(max_examples=examples(500))
@given(
    text=texts, stop=st.lists(st.text("ab数👍", min_size=1, max_size=3), max_size=2), cuts=st.lists(st.integers(0, 50))
)
def test_how_many_tokens_come_at_once_changes_nothing(text: str, stop: list[str], cuts: list[int]) -> None:
    token_ids = [*TOKENIZER.encode(text), EOS]
    one_by_one, grouped = choice(stop), choice(stop)
    expected = feed(one_by_one, token_ids, list(range(1, 60)), FinishReason.STOP)
    deltas = feed(grouped, token_ids, cuts, FinishReason.STOP)
    assert "".join(delta.text for delta in deltas) == "".join(delta.text for delta in expected)
    assert grouped.num_tokens == one_by_one.num_tokens
    assert deltas[-1].finish_reason == "stop" and all(delta.finish_reason is None for delta in deltas[:-1])


@settings(max_examples=examples(300))
@given(text=texts, cuts=st.lists(st.integers(0, 50)), num_missing=st.integers(0, 3))
def test_without_stop_strings_the_text_is_that_of_the_tokens(text: str, cuts: list[int], num_missing: int) -> None:
    """Characters are whole, unless the last one lacks some of its bytes."""
    data = text.encode()[: max(len(text.encode()) - num_missing, 0)]
    token_ids = TOKENIZER.encode(text)[: len(data)]
    one = choice([])
    deltas = feed(one, token_ids, cuts, FinishReason.LENGTH)
    assert "".join(delta.text for delta in deltas) == data.decode(errors="replace")
    assert one.num_tokens == len(data)
    assert deltas[-1].finish_reason == "length"


def test_an_echo_with_logprobs_comes_before_the_first_token() -> None:
    one = choice([], prompt="pé", echo=True, num_logprobs=0)
    scores = [TokenLogprobs(-float(i), i + 1, [], []) for i in range(4)]
    one.journal.prompt_logprobs += scores[:2]
    assert [delta.text for delta in one.feed(RequestOutput("a", [], prompt_logprobs=scores[:2]))] == [""]
    (delta,) = one.feed(RequestOutput("a", TOKENIZER.encode("ab"), FinishReason.LENGTH, logprobs=scores[2:]))
    assert (delta.text, delta.finish_reason) == ("péab", "length")
    assert [scored.logprobs for scored in delta.scored] == [None, *scores]
    assert [scored.text_offset for scored in delta.scored] == [0, 1, 1, 2, 3]


def test_an_answer_of_no_tokens_has_its_echo() -> None:
    (delta,) = choice([], prompt="p", echo=True).feed(RequestOutput("a", [], FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason, delta.scored) == ("p", "length", [])


def test_the_echo_of_a_long_prompt_comes_in_parts() -> None:
    one = choice([], prompt="é" * MAX_SCORED, echo=True, num_logprobs=0)
    scores = [TokenLogprobs(-float(i), i + 1, [], []) for i in range(2 * MAX_SCORED)]
    one.journal.prompt_logprobs += scores[1:]
    deltas = list(one.feed(RequestOutput("a", TOKENIZER.encode("a"), logprobs=scores[:1])))
    assert "".join(delta.text for delta in deltas) == "é" * MAX_SCORED + "a"
    assert [len(delta.scored) for delta in deltas] == [MAX_SCORED, MAX_SCORED + 1]
    scored = [one for delta in deltas for one in delta.scored]
    assert [one.logprobs for one in scored] == [None, *scores[1:], scores[0]]
    assert [one.text_offset for one in scored] == [at // 2 for at in range(2 * MAX_SCORED)] + [MAX_SCORED]
