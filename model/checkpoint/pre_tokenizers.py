"""How byte-level tokenizers cut a text into pieces, within which they merge: a table by llama.cpp's names.

A GGUF file names its cut (`tokenizer.ggml.pre`); a folder with `vocab.json` and `merges.txt` has that of its class of
tokenizer.  Patterns are those of the models' own tokenizers, in the syntax of Oniguruma.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclass(frozen=True, slots=True)
class Cut:
    """How a byte-level tokenizer cuts a text.

    Attributes:
        patterns: each cuts the pieces that the ones before have left, into its matches and what lies between them.
        composes: whether the text is brought into Unicode's normal form C first.
        whole_tokens: whether a piece that is a token skips the merges.
        add_bos: whether a text begins with bos if the file does not say.
    """

    patterns: tuple[str, ...]
    composes: bool = False
    whole_tokens: bool = False
    add_bos: bool = False

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.composes else None

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The cuts, and at last a letter for each byte."""
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, letters])


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_DIGIT = r"\p{N}"
_THREE_DIGITS = "[0-9][0-9][0-9]"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"  # noqa: RUF001

# Words in which small letters follow capital ones (GPT-4o, Mistral's Tekken).
_CAPITAL, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(capital: str = _CAPITAL, small: str = _SMALL, end: str = "") -> str:
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}{capital}*{small}+{end}|{before}{capital}+{small}*{end}"


_CASED_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_GPT4O = rf"{_cased(end=_CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_CASED_SYMBOLS}|{_SPACES}"
_NOT_HAN = ("[" + _CAPITAL[1:-1] + r"&&[^\p{Han}]]", "[" + _SMALL[1:-1] + r"&&[^\p{Han}]]")
_KIMI = rf"\p{{Han}}+|{_cased(*_NOT_HAN, _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"

# DeepSeek's: letters with case, as its tokenizer lists them, and the scripts of East Asia.
_CASED_LETTERS = (
    r"A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    r"\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    r"\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    r"\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    r"\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    r"\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    r"\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    r"\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    r"\x{10400}-\x{1044f}\x{104b0}-\x{104d3}\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}"
    r"\x{118a0}-\x{118df}\x{1e900}-\x{1e943}"
)
_EAST_ASIA = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _EAST_ASIA,
    r"\p{N}+",
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\x22#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
)
_CHAMELEON = (
    "<sentinel:[0-9]+>",
    "IMGIMG[A-I]{1,4}Z",
    r"[\t\n]|    |  ",
    _DIGIT,
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT2,
)
# Runs of spaces in powers of two.
_POWERS = "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
_JAIS2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+|{_POWERS}|\s{{1,2}}(?!\S)|\s"
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_MARKED = r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{_MARKED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)

DEFAULT = "default"  # what llama.cpp uses for files that name none

_ROWS: list[tuple[str, Cut]] = [
    (DEFAULT, Cut((_PUNCTUATION, _GPT2, r"\p{N}+", _THREE_DIGITS))),
    ("gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 jais trillion granite-docling", Cut((_GPT2,))),
    ("mpt olmo", Cut((_GPT2,), composes=True)),
    ("starcoder refact smollm codeshell exaone minerva-7b mellum2", Cut((_DIGIT, _GPT2))),
    ("command-r", Cut((_DIGIT, _GPT2), composes=True)),
    ("falcon", Cut((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS))),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        Cut((_LLAMA3,), whole_tokens=True, add_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe glm4", Cut((_LLAMA3,))),
    ("minicpm5", Cut((r"\p{N}{1,3}", _LLAMA3), whole_tokens=True)),
    ("jais-2", Cut((_JAIS2,))),
    ("qwen2 deepseek-r1-qwen megrez", Cut((_QWEN2,), composes=True)),
    ("stablelm2 kormo hunyuan solar-open grok-2", Cut((_QWEN2,))),
    ("deepseek-llm", Cut(_DEEPSEEK_LLM)),
    ("deepseek-coder", Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIA, _DIGIT))),
    ("deepseek-v3 hunyuan-dense joyai-llm", Cut(_DEEPSEEK_V3)),
    ("bloom poro-chat gpt3-finnish", Cut((_BLOOM,))),
    ("viking", Cut((_BLOOM, _DIGIT))),
    ("tekken", Cut((rf"{_cased()}|\p{{N}}|{_CASED_SYMBOLS}|{_SPACES}",), whole_tokens=True, add_bos=True)),
    ("chameleon", Cut(_CHAMELEON, add_bos=True)),
    ("gpt-4o llama4 kanana2 minimax-m2", Cut((_GPT4O,))),
    ("tiny_aya cohere2moe", Cut((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))),
    ("kimi-k2", Cut((_KIMI,))),
    ("superbpe", Cut((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
    ("bailingmoe bailingmoe2 llada-moe", Cut((_BAILING,))),
    ("seed-coder", Cut((_SEED,))),
    ("exaone-moe", Cut((_EXAONE_MOE,))),
]
CUTS = {name: cut for names, cut in _ROWS for name in names.split()}
