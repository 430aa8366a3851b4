from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.server.text import StopStrings
from tests.examples import examples

letters = st.text("ab数", max_size=30)
stops = st.lists(st.text("ab数", min_size=1, max_size=4), max_size=4)


@settings(max_examples=examples(1000))
@given(text=letters, stop_strings=stops, cuts=st.lists(st.integers(0, 30)))
def test_pieces_cut_anywhere_are_the_whole_text_up_to_the_first_stop_string(
    text: str, stop_strings: list[str], cuts: list[int]
) -> None:
    begins = [text.index(stop) for stop in stop_strings if stop in text]
    # A stop string counts when it is complete: one that begins earlier may end later, but not be there yet.
    search = StopStrings(stop_strings)
    seen, shown, is_stopped = "", "", False
    for start, end in itertools.pairwise([0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]):
        seen += text[start:end]
        certain, is_stopped = search.push(text[start:end])
        shown += certain
        complete = [seen.index(stop) for stop in stop_strings if stop in seen]
        assert is_stopped == bool(complete)
        if is_stopped:
            assert shown == seen[: min(complete)]
            assert search.found in stop_strings and seen.startswith(search.found, len(shown))
            break
        assert seen.startswith(shown)
        # No more is held back than a stop string could still need.
        held = seen[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stop_strings)
    assert is_stopped == bool(begins)
    if not is_stopped:
        assert shown + search.flush() == text
        assert search.flush() == ""


@settings(max_examples=examples(300))
@given(text=letters, stop_strings=stops)
def test_character_by_character_nothing_of_a_stop_string_is_shown(text: str, stop_strings: list[str]) -> None:
    search = StopStrings(stop_strings)
    shown = ""
    for letter in text:
        certain, is_stopped = search.push(letter)
        shown += certain
        assert not any(stop in shown for stop in stop_strings)
        if is_stopped:
            return
