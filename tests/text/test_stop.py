"""llmsrv.text.stop: cuts where str.find would, however the text arrives."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.text.stop import StopMatcher
from tests.support.parameters import slow_but


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The oracle: of the first match of each stop string, picks the first to end, then the first to
    begin."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return (text[:min(found)[1]], True) if found else (text, False)


def stream(chunks: list[str], stops: list[str]) -> tuple[str, bool]:
    """Returns all text that is sent; checks the invariants after every chunk."""
    matcher = StopMatcher(stops)
    arrived = sent = ""
    is_matched = False
    for chunk in chunks:
        safe, is_matched = matcher.push(chunk)
        arrived += chunk
        sent += safe
        assert arrived.startswith(sent)
        if not is_matched:
            assert matcher.num_withheld == len(arrived) - len(sent)
            assert matcher.num_withheld == longest_open_end(arrived, stops)
    return sent + matcher.flush(), is_matched


def longest_open_end(text: str, stops: list[str]) -> int:
    """How many characters at the end may begin a stop string; exactly these are withheld."""
    beginnings = [stop[:n] for stop in stops for n in range(1, len(stop))]
    return max((len(start) for start in beginnings if text.endswith(start)), default=0)


def every_chunking(text: str) -> list[list[str]]:
    chunkings = []
    for is_cut in itertools.product([False, True], repeat=len(text) - 1):
        chunks = [text[0]]
        for character, new in zip(text[1:], is_cut):
            chunks[len(chunks) - (not new):] = ["" if new else chunks[-1]]
            chunks[-1] += character
        chunkings.append(chunks)
    return chunkings


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("hello world", ["wor"]),
        ("hello world", ["world", "o w"]),
        ("aaaaaaab", ["aab"]),
        ("abababac", ["ababac", "bac"]),
        ("a<|im_en", ["<|im_end|>"]),
        ("one\n\ntwo", ["\n\n", "\n"]),
        ("abcdefgh", ["bcdefg", "cd"]),
        ("xyzxyzab", ["zxyza", "xyzab", "yzx"]),
        ("é東🙂é東🙂", ["🙂é"]),
    ],
)
def test_every_chunking_gives_what_str_find_gives(text, stops):
    chunkings = every_chunking(text)
    assert len(chunkings) == 2 ** (len(text) - 1)
    for chunks in chunkings:
        assert "".join(chunks) == text
        assert stream(chunks, stops) == cut(text, stops)


@settings(max_examples=100)
@given(
    chunks=st.lists(st.text("ab", max_size=5), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4),
)
def test_any_chunks_and_stops_give_what_str_find_gives(chunks, stops):
    assert stream(chunks, stops) == cut("".join(chunks), stops)


def test_without_stop_strings_nothing_is_withheld():
    matcher = StopMatcher([])
    assert matcher.push("text") == ("text", False)
    assert matcher.num_withheld == 0 and matcher.flush() == ""


def test_a_possible_stop_string_is_withheld_until_it_is_decided():
    matcher = StopMatcher(["END"])
    assert matcher.push("the E") == ("the ", False)
    assert matcher.num_withheld == 1
    assert matcher.push("N") == ("", False)
    assert matcher.push("E") == ("EN", False)
    assert matcher.push("ND of it") == ("", True)
    assert matcher.num_withheld == 0


def test_after_a_match_everything_is_dropped():
    matcher = StopMatcher(["."])
    assert matcher.push("one. two") == ("one", True)
    assert matcher.push("three") == ("", True)
    assert matcher.flush() == ""


def test_the_first_to_be_complete_wins_over_the_first_to_begin():
    assert StopMatcher(["abcd", "bc"]).push("xabcd") == ("xa", True)


def test_if_two_are_complete_at_once_the_first_to_begin_wins():
    assert StopMatcher(["c", "abc", "bc"]).push("xabc") == ("x", True)


@pytest.mark.parametrize("chunk_size", slow_but([1, 4, 100_000], 4))
def test_a_hostile_stream_takes_linear_time(chunk_size):
    """Text that almost matches again and again, with four long stop strings."""
    stops = [c * 2000 + "!" for c in "a"] + ["a" * n + "b" for n in (500, 1000, 1500)]
    text = ("a" * 1999 + "c") * 50
    chunks = [text[at:at + chunk_size] for at in range(0, len(text), chunk_size)]
    matcher = StopMatcher(stops)
    start = time.process_time()
    sent = "".join(matcher.push(chunk)[0] for chunk in chunks)
    assert time.process_time() - start < 3
    assert sent + matcher.flush() == text
