"""Fill-in-the-middle: how models of each spelling are asked, with transformers' tokenizer as the judge of tokens."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from shoal.model.text.middle import ENDS, SPELLINGS
from shoal.model.text.tokenizer import Tokenizer


def raw(special: tuple[str, ...]) -> Raw:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Raw(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", *special])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling[0])
def test_the_prompt_is_what_the_family_writes(spelling: tuple[str, str, str]) -> None:
    tokenizer = Tokenizer(raw((*spelling, ENDS[1])), special_tokens={"bos_token": "<s>"})
    middle = tokenizer.middle
    assert middle is not None
    before, after = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))"
    prefix, suffix, end = spelling
    oracle = PreTrainedTokenizerFast(tokenizer_object=raw((*spelling, ENDS[1])), bos_token="<s>")
    written = oracle(f"{prefix}{before}{suffix}{after}{end}").input_ids
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in (before, after)]
    assert tokenizer.begin_token_ids + middle.prompt(*parts) == written
    assert middle.ends == set(oracle.convert_tokens_to_ids([*spelling, ENDS[1]]))


def test_a_vocabulary_with_some_of_the_tokens_has_none() -> None:
    assert Tokenizer(raw(SPELLINGS[0][:2])).middle is None
