"""llmsrv.text.reasoning: separates reasoning from answers, however the text is cut."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsrv.text.reasoning import ReasoningParser


def parse(pieces: list[str], is_open: bool = False) -> tuple[str, str]:
    parser = ReasoningParser(is_open)
    parts = [*map(parser.push, pieces), parser.flush()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    "text, is_open, reasoning, answer",
    [
        ("<think>\nwhy\n</think>\n\nbecause", False, "why\n", "because"),
        ("why</think>because", True, "why", "because"),
        ("  <think>a</think>b", False, "a", "b"),
        ("<think></think>b <think>c</think>", False, "", "b <think>c</think>"),
        ("plain <think>a</think>", False, "", "plain <think>a</think>"),
        ("  plain", False, "", "  plain"),
        ("<thin", False, "", "<thin"),
        ("<think>without end </thi", False, "without end </thi", ""),
        ("", False, "", ""),
    ],
)
def test_text_between_the_tags_is_reasoning(
    text: str, is_open: bool, reasoning: str, answer: str
) -> None:
    assert parse([text], is_open) == (reasoning, answer)
    assert parse(list(text), is_open) == (reasoning, answer)


@given(
    pieces=st.lists(st.sampled_from(["<think>", "</think>", "<", "thi", "nk>", " ", "\n", "a"])),
    is_open=st.booleans(),
)
def test_the_result_does_not_depend_on_the_pieces(pieces: list[str], is_open: bool) -> None:
    text = "".join(pieces)
    assert parse(pieces, is_open) == parse([text], is_open) == parse(list(text), is_open)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(" " * 300_000, marks=pytest.mark.slow),
        "<think>" + "</thin" * 20_000,
        pytest.param("<think>" * 20_000, marks=pytest.mark.slow),
    ],
)
def test_long_texts_take_linear_time(text: str) -> None:
    begun_at = time.process_time()
    assert "".join(parse(list(text)))
    assert time.process_time() - begun_at < 2  # 0.1 s
