"""Checks which texts a grammar accepts."""

from pathlib import Path

from llmsrv.text.grammar import compile_source
from llmsrv.text.grammar import gbnf_to_lark
from llmsrv.text.grammar import load_ll_tokenizer
from llmsrv.text.tokenizer import Tokenizer


class Texts:
    """Checks whether a grammar source accepts a text."""

    def __init__(self, model: Path, tokenizer: Tokenizer) -> None:
        self._vocabulary = load_ll_tokenizer(model, model.parent)
        self._tokenizer = tokenizer

    def take(self, source: str, text: str) -> bool:
        matcher = compile_source(gbnf_to_lark(source), self._vocabulary)
        ids = self._tokenizer.encode(text, parse_special=True)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
