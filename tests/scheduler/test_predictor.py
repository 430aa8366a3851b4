"""The predictor of output lengths: it is sane without data, learns fast and forgets slowly."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.scheduler.output import SchedulingParams
from shoal.scheduler.policies.predictor import PREDICTORS, LearnedLengths, MaxTokens, Oracle, Predictor
from shoal.scheduler.request import Request
from tests.fakes import params

Kind = Callable[[random.Random, int], tuple[str, list[int]]]  # class of request -> client, prompt


def request(prompt: list[int], *, client: str = "", length: int = 0, max_tokens: int = 1000) -> Request:
    """A request that has ended with the given number of output tokens."""
    scheduling = SchedulingParams(client=client)
    return Request("a", prompt, params(max_tokens), 0.0, output_token_ids=[7] * length, scheduling=scheduling)


def text(rng: random.Random, length: int) -> list[int]:
    """Tokens of which a few are frequent."""
    return [min(int(3 * rng.paretovariate(0.6)), 4000) for _ in range(length)]


@pytest.mark.parametrize("name", PREDICTORS)
@settings(max_examples=30)
@given(data=st.data())
def test_whatever_was_learned_a_prediction_is_possible(name: str, data: st.DataObject) -> None:
    predictor = PREDICTORS[name]()
    asked = st.builds(
        request,
        st.lists(st.integers(0, 5), min_size=1, max_size=20),
        client=st.sampled_from("ab"),
        length=st.integers(0, 300),
        max_tokens=st.integers(0, 300),
    )
    for seen in data.draw(st.lists(asked, max_size=20)):
        predictor.learn(seen)
    one = data.draw(asked)
    assert 1 <= predictor.predict(one) <= max(one.params.max_tokens, 1) * 1.000001


def test_max_tokens_is_taken_at_its_word() -> None:
    predictor = MaxTokens()
    predictor.learn(request([1], length=3))
    assert predictor.predict(request([1], max_tokens=50)) == 50


def test_an_oracle_knows_what_it_was_told() -> None:
    assert Oracle({"a": 17}).predict(request([1])) == 17


def test_without_data_all_requests_are_alike() -> None:
    predictor = LearnedLengths()
    predictions = {predictor.predict(request([i] * i, client=str(i))) for i in range(1, 50)}
    (expected,) = predictions
    assert 10 < expected < 1000
    assert predictor.predict(request([1], max_tokens=5)) == pytest.approx(5)


def test_an_output_of_nothing_teaches_nothing() -> None:
    predictor: Predictor = LearnedLengths()
    before = predictor.predict(request([1, 2]))
    predictor.learn(request([1, 2], length=0))
    assert predictor.predict(request([1, 2])) == before


KINDS: dict[str, Kind] = {
    "client": lambda rng, kind: (f"client {kind}", [1, *text(rng, 40), 2]),
    "beginning": lambda rng, kind: ("", [1, 3000 + kind, *text(rng, 40), 2]),
    "end": lambda rng, kind: ("", [1, *text(rng, 40), 3000 + kind, 2]),
    "size of the prompt": lambda rng, kind: ("", [1, *text(rng, 8 << kind), 2]),
}


@pytest.mark.parametrize("tells", KINDS)
def test_it_learns_from_whatever_tells_the_length(tells: str) -> None:
    """Four kinds of request, typically of 15, 45, 135 and 405 tokens, with much noise."""
    rng = random.Random(1)
    predictor = LearnedLengths()
    typical = [15, 45, 135, 405]

    def draw(kind: int) -> Request:
        client, prompt = KINDS[tells](rng, kind)
        return request(prompt, client=client, length=max(int(typical[kind] * rng.lognormvariate(0, 0.4)), 1))

    for _ in range(400):
        predictor.learn(draw(rng.randrange(4)))
    predicted = [[predictor.predict(draw(kind)) for _ in range(20)] for kind in range(4)]
    means = [sum(row) / len(row) for row in predicted]
    assert means == sorted(means)
    assert means[3] > 5 * means[0]
    right = sum(short < long for i in range(4) for j in range(i) for long in predicted[i] for short in predicted[j])
    assert right > 0.85 * 6 * 400, "of pairs of requests of two kinds"


def test_it_forgets() -> None:
    """A client's requests change from 20 tokens to 400."""
    predictor = LearnedLengths()
    asked = request([1, 2, 3])
    for length, bounds in ((20, (18, 22)), (400, (360, 440))):
        for _ in range(300):
            predictor.learn(request([1, 2, 3], length=length))
        assert bounds[0] < predictor.predict(asked) < bounds[1]


def test_it_forgets_slowly() -> None:
    predictor = LearnedLengths()
    for _ in range(300):
        predictor.learn(request([1, 2, 3], length=20))
    predictor.learn(request([1, 2, 3], length=1000))
    assert predictor.predict(request([1, 2, 3])) < 30


def test_a_few_very_long_outputs_do_not_spoil_the_typical_length() -> None:
    predictor = LearnedLengths()
    rng = random.Random(2)
    for _ in range(500):
        predictor.learn(request([1, 2, 3], length=5000 if rng.random() < 0.02 else 50, max_tokens=9000))
    assert predictor.predict(request([1, 2, 3], max_tokens=9000)) < 100
