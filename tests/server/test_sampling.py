from __future__ import annotations

from typing import Any

import pytest

from shoal.model.checkpoint.config import GenerationDefaults
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import InvalidRequestError
from shoal.scheduler.output import SamplingParams
from shoal.server.sampling import check_token_ids, choice_seed, resolve_sampling, resolve_seed
from shoal.server.wire.parsing import read_body
from shoal.server.wire.requests import ChatBody, CompletionBody

LIMITS = SchedulerConfig(num_blocks=8, block_size=16, max_model_len=100)
DEFAULTS = GenerationDefaults(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1)


def resolve(
    body: CompletionBody | ChatBody,
    *,
    num_prompt_tokens: int = 10,
    defaults: GenerationDefaults | None = None,
    limits: SchedulerConfig = LIMITS,
    eos_token_ids: tuple[int, ...] = (1, 2),
) -> SamplingParams:
    (params,) = resolve_sampling(
        body,
        seed=5,
        prompt_lens=[num_prompt_tokens],
        limits=limits,
        vocab_size=50,
        eos_token_ids=eos_token_ids,
        defaults=defaults or GenerationDefaults(),
    )
    return params


def completion(**fields: Any) -> CompletionBody:
    return read_body(CompletionBody, {"prompt": "a", **fields})


def chat(**fields: Any) -> ChatBody:
    return read_body(ChatBody, {"messages": [{"role": "user", "content": "a"}], **fields})


def test_without_anything_the_apis_own_defaults_hold() -> None:
    assert resolve(completion()) == SamplingParams(max_tokens=16, seed=5, stop_token_ids=frozenset({1, 2}))


def test_the_request_wins_over_the_checkpoint_and_that_over_the_api() -> None:
    params = resolve(completion(), defaults=DEFAULTS)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.7, 40, 0.9, 0.05)
    assert params.repetition_penalty == 1.1
    asked = completion(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    assert resolve(asked, defaults=DEFAULTS) == resolve(completion(temperature=0.0))
    assert resolve(completion(top_k=-1), defaults=DEFAULTS).top_k == 0


@pytest.mark.parametrize(
    ("body", "num_prompt_tokens", "max_tokens"),
    [
        (completion(), 10, 16),
        (completion(), 90, 10),
        (completion(max_tokens=0), 10, 0),
        (completion(max_tokens=500), 10, 500),
        (chat(), 10, 90),
        (chat(), 100, 1),
        (chat(max_tokens=3), 10, 3),
        (chat(max_tokens=3, max_completion_tokens=4), 10, 4),
    ],
)
def test_max_tokens(body: CompletionBody | ChatBody, num_prompt_tokens: int, max_tokens: int) -> None:
    """What is too much is refused later, with the prompt's length."""
    assert resolve(body, num_prompt_tokens=num_prompt_tokens).max_tokens == max_tokens


def test_without_max_tokens_a_chat_fits_a_small_cache() -> None:
    small = SchedulerConfig(num_blocks=2, block_size=16, max_model_len=100)
    assert resolve(chat(), limits=small).max_tokens == 2 * 16 + 1 - 10


def test_stop_tokens() -> None:
    assert resolve(completion(stop_token_ids=[7])).stop_token_ids == {1, 2, 7}
    assert resolve(completion(stop_token_ids=[7], ignore_eos=True)).stop_token_ids == {7}


def test_where_the_request_says_where_its_text_ends_the_model_may_not() -> None:
    """And the parameters do not tell where: nothing that schedules may know."""
    for ask in (completion, chat):
        params = [resolve(ask(max_tokens=20, end_after=end_after)) for end_after in (1, 7, 20)]
        assert params[0] == params[1] == params[2]
        assert (params[0].min_tokens, params[0].max_tokens, params[0].stop_token_ids) == (20, 20, {1, 2})
    harmless = {"stop": [], "stop_token_ids": [], "ignore_eos": False, "min_tokens": 0, "logit_bias": {"1": 100.0}}
    assert resolve(completion(end_after=16, **harmless)).min_tokens == 16
    assert resolve(chat(end_after=90, logprobs=False)).min_tokens == 90


def test_an_end_needs_a_token_for_it() -> None:
    with pytest.raises(InvalidRequestError, match="a model with an end-of-text token, and this one has none") as caught:
        resolve(completion(end_after=1), eos_token_ids=())
    assert caught.value.param == "end_after"


def test_logprobs() -> None:
    assert (resolve(completion()).num_logprobs, resolve(chat()).num_logprobs) == (None, None)
    params = resolve(completion(logprobs=0))
    assert (params.num_logprobs, params.num_prompt_logprobs) == (0, None)
    params = resolve(completion(logprobs=3, echo=True))
    assert (params.num_logprobs, params.num_prompt_logprobs) == (3, 3)
    assert resolve(completion(echo=True)).num_prompt_logprobs is None
    assert resolve(chat(logprobs=True)).num_logprobs == 0
    assert resolve(chat(logprobs=True, top_logprobs=4)).num_logprobs == 4
    assert resolve(chat(logprobs=False, top_logprobs=None)).num_logprobs is None


def test_tokens_whose_logprobs_are_asked_for_stand_once_in_their_order() -> None:
    for body in (completion(logprobs=0, logprob_token_ids=[7, 0, 7]), chat(logprobs=True, logprob_token_ids=[7, 0])):
        params = resolve(body)
        assert (params.num_logprobs, params.logprob_token_ids) == (0, (7, 0))
    assert resolve(completion(logprobs=3)).logprob_token_ids is None


def test_logit_bias() -> None:
    assert resolve(completion(logit_bias={"3": -100.0, "049": 1.5})).logit_bias == {3: -100.0, 49: 1.5}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (completion(logit_bias={"50": 1.0}), "logit_bias", "token id 50 is outside the vocabulary of 50"),
        (completion(logit_bias={" 3": 1.0}), "logit_bias", "' 3' is not a token id"),
        (completion(logit_bias={"": 1.0}), "logit_bias", "is not a token id"),
        (completion(logit_bias={"٣": 1.0}), "logit_bias", "is not a token id"),
        (completion(logit_bias={"1" * 5000: 1.0}), "logit_bias", "is not a token id"),
        (completion(stop_token_ids=[50]), "stop_token_ids", "outside the vocabulary of 50"),
        (completion(min_tokens=17), "min_tokens", "min_tokens is 17, but max_tokens is 16"),
        (completion(end_after=17), "end_after", "end_after is 17, but max_tokens is 16: it can be at most that"),
        (chat(end_after=4, max_tokens=9, max_completion_tokens=3), "end_after", "end_after is 4, but max_tokens is 3"),
        (completion(end_after=2, max_tokens=0), "end_after", "end_after is 2, but max_tokens is 0"),
        (completion(end_after=2, stop="a"), "end_after", "end_after and stop contradict each other"),
        (completion(end_after=2, stop_token_ids=[7]), "end_after", "end_after and stop_token_ids contradict"),
        (completion(end_after=2, ignore_eos=True), "end_after", "end_after and ignore_eos contradict each other"),
        (chat(end_after=2, min_tokens=1), "end_after", "end_after and min_tokens contradict each other"),
        (completion(end_after=2, logprobs=0), "end_after", "end_after and logprobs contradict each other"),
        (chat(end_after=2, logprobs=True), "end_after", "end_after and logprobs contradict each other"),
        (chat(top_logprobs=1), "top_logprobs", "needs logprobs"),
        (chat(logprob_token_ids=[1]), "logprob_token_ids", "needs logprobs"),
        (completion(logprob_token_ids=[1]), "logprob_token_ids", "needs logprobs"),
        (completion(logprobs=0, logprob_token_ids=[1, 50]), "logprob_token_ids", "token id 50 is outside"),
        (completion(logprobs=0, logprob_token_ids=[1], max_tokens=0), "logprob_token_ids", "but max_tokens is 0"),
    ],
)
def test_what_is_refused(body: CompletionBody | ChatBody, param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        resolve(body)
    assert caught.value.param == param
    assert len(caught.value.message) < 200


def test_token_ids() -> None:
    check_token_ids("tokens", [], 50)
    check_token_ids("tokens", [0, 49], 50)
    with pytest.raises(InvalidRequestError, match="token id 50 is outside"):
        check_token_ids("tokens", [0, 50, 1], 50)


def test_seeds() -> None:
    assert resolve_seed(completion(seed=3)) == 3
    assert resolve_seed(completion(seed=-1)) == 2**64 - 1
    assert resolve_seed(completion(seed=2**64 - 1)) == 2**64 - 1
    drawn = {resolve_seed(completion()) for _ in range(100)}
    assert len(drawn) == 100
    assert all(0 <= seed < 2**53 for seed in drawn)


def test_min_tokens_needs_a_token_that_does_not_end_the_text() -> None:
    every = list(range(3, 50))
    with pytest.raises(InvalidRequestError, match="leaves no token to choose") as caught:
        resolve(completion(stop_token_ids=[0, *every], min_tokens=1))
    assert caught.value.param == "stop_token_ids"
    resolve(completion(stop_token_ids=[0, *every]))
    resolve(completion(stop_token_ids=every, min_tokens=1))


def test_the_seeds_of_choices_are_pinned() -> None:
    assert [choice_seed(7, index) for index in range(3)] == [7, 0xCDA7975F1322F3E0, 0x3E839419DA5EB9E3]


def test_no_two_choices_of_neighbouring_seeds_share_a_seed() -> None:
    seeds = [choice_seed(seed % 2**64, index) for seed in range(-20, 20) for index in range(128)]
    assert len(set(seeds)) == 40 * 128
    assert all(0 <= seed < 2**64 for seed in seeds)
