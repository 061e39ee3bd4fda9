"""Stop strings over arbitrary cuts of a text against looking at the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddock.serving.stop import StopChecker

WORDS = st.text(alphabet="ab", min_size=1, max_size=4)


def first_match(text: str, stop: list[str]) -> tuple[int, str] | None:
    """Start and string of the match that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        if ending := [s for s in stop if text[:end].endswith(s)]:
            longest = max(ending, key=len)
            return end - len(longest), longest
    return None


@given(stop=st.lists(WORDS, max_size=3), pieces=st.lists(st.text(alphabet="abc", max_size=5)), include=st.booleans())
def test_equals_a_search_in_the_whole_text(stop, pieces, include):
    checker = StopChecker(stop, include_stop_str_in_output=include)
    text, shown = "", ""
    for piece in pieces:
        text += piece
        shown += checker.add(piece)
        if checker.matched is None:
            held = text[len(shown) :]
            assert text.startswith(shown)
            assert held == "" or any(s.startswith(held) and s != held for s in stop)  # nothing waits without a reason
    shown += checker.finish()

    match = first_match(text, stop)
    if match is None:
        assert (checker.matched, shown) == (None, text)
    else:
        start, found = match
        assert checker.matched == found
        assert start == text.find(found)
        assert shown == text[:start] + (found if include else "")


def test_a_possible_start_is_held_back_and_released():
    checker = StopChecker(["</end>"])
    assert checker.add("one <") == "one "
    assert checker.add("/en") == ""
    assert checker.add("t> two </e") == "</ent> two "
    assert checker.matched is None
    assert checker.finish() == "</e"


def test_text_after_the_match_is_dropped():
    checker = StopChecker(["STOP", "\n\n"])
    assert checker.add("a ST") == "a "
    assert checker.add("OP b\n\n") == ""
    assert checker.matched == "STOP"
    assert checker.add("more") == ""
    assert checker.finish() == ""


def test_unchecked_text_takes_no_part_in_a_match():
    checker = StopChecker(["ab"])
    assert checker.add("xa") == "x"
    assert checker.add("b ab a", check=False) == "ab ab a"
    assert checker.add("b") == "b"
    assert checker.matched is None
    assert checker.add("ab") == ""
    assert checker.matched == "ab"


def test_without_stop_strings_everything_passes():
    checker = StopChecker()
    assert [checker.add("a"), checker.add("b"), checker.finish()] == ["a", "b", ""]


@pytest.mark.parametrize("stop", [[""], ["a", 3], "abc"])
def test_stop_must_be_strings(stop):
    with pytest.raises(ValueError, match="non-empty strings"):
        StopChecker(stop)
