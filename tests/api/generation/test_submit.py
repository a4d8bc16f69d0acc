"""How much of a long text is tokenised if only a part of its tokens is kept."""

from types import SimpleNamespace
from typing import Any
from typing import Literal
from typing import cast

import pytest

from llmsrv.api.generation.options import GenerationOptions
from llmsrv.api.generation.submit import CUT_TOKENS
from llmsrv.api.generation.submit import encode_kept
from llmsrv.registry.service import Service

CONTEXT = 1000


class Words:
    """A tokenizer with one token per word.  sizes: of the texts that it got."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def encode(self, text: str, parse_special: bool) -> list[int]:
        self.sizes.append(len(text))
        return [int(word) for word in text.split()]


def kept(text: str, **fields: Any) -> tuple[list[int], list[int]]:
    words = Words()
    engine = SimpleNamespace(ready=SimpleNamespace(context_length=CONTEXT))
    service = SimpleNamespace(engine=engine, text=SimpleNamespace(tokenizer=words))
    return encode_kept(cast(Service, service), GenerationOptions(**fields), text), words.sizes


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("wanted", [1, 40, CONTEXT, -1])
@pytest.mark.parametrize("num_blanks", [1, 4, 40])
def test_23_no_more_of_a_text_is_tokenized_than_its_kept_tokens_take(
    side: Literal["left", "right"], wanted: int, num_blanks: int
) -> None:
    numbers = range(100_000, 200_000)
    text = (" " * num_blanks).join(map(str, numbers))
    ids, sizes = kept(text, truncate_prompt_tokens=wanted, truncation_side=side)
    num_kept = wanted if wanted > 0 else CONTEXT
    if side == "right":
        assert ids[:num_kept] == list(numbers[:num_kept])
    else:
        assert ids[-num_kept:] == list(numbers[-num_kept:])
    assert max(sizes) <= 2 * (num_kept + CUT_TOKENS) * (6 + num_blanks)


def test_a_short_text_is_tokenized_whole_and_once() -> None:
    assert kept("1 2 3", truncate_prompt_tokens=2) == ([1, 2, 3], [5])
