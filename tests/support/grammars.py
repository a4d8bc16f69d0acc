"""Checks which texts a grammar accepts."""

from pathlib import Path

from llmsrv.text.grammar import compile_source
from llmsrv.text.grammar import read_vocabulary
from llmsrv.text.grammar import translated
from llmsrv.text.tokenizer import Tokenizer


class Texts:
    """Checks whether a grammar source accepts a text."""

    def __init__(self, model: Path, tokenizer: Tokenizer) -> None:
        self._vocabulary = read_vocabulary(model, model.parent)
        self._tokenizer = tokenizer

    def take(self, source: str, text: str) -> bool:
        matcher = compile_source(translated(source), self._vocabulary)
        ids = self._tokenizer.encode(text, parse_special=True)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
