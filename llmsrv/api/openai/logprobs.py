"""Log-probabilities in the shapes that clients know: of chat, of completions, vLLM's of prompts."""

from collections.abc import Sequence
from typing import Any

from llmsrv.api.generation.output import TokenEntry
from llmsrv.text.tokenizer import Tokenizer


class Shapes:
    """For one request.

    num_alternatives  how many of those that came are shown
    ids_as_text       tokens are written as "token_id:7" instead of their text
    """

    def __init__(self, tokenizer: Tokenizer, num_alternatives: int, ids_as_text: bool) -> None:
        self._tokenizer = tokenizer
        self._num_alternatives = num_alternatives
        self._ids_as_text = ids_as_text

    def chat(self, entries: Sequence[TokenEntry]) -> dict[str, Any]:
        content = [
            {
                **self._token(entry.id, entry.logprob),
                "top_logprobs": [self._token(*pair) for pair in self._shown(entry)],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def completion(self, entries: Sequence[TokenEntry], first_id: int | None) -> dict[str, Any]:
        """first_id: a token before them that nothing came before, so that it has no probability."""
        lists: dict[str, list[Any]] = {
            "tokens": [self._text(entry.id) for entry in entries],
            "token_logprobs": [finite(entry.logprob) for entry in entries],
            "top_logprobs": [
                {self._text(id): finite(value) for id, value in self._shown(entry)}
                for entry in entries
            ],
            "text_offset": [entry.start for entry in entries],
        }
        if first_id is not None:
            first = {"tokens": self._text(first_id), "text_offset": 0}
            lists = {name: [first.get(name), *values] for name, values in lists.items()}
        return lists

    def _shown(self, entry: TokenEntry) -> list[tuple[int, float]]:
        return entry.alternatives[: self._num_alternatives]

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        spelled = list(self._tokenizer.token_bytes(id))
        return {"token": self._text(id), "logprob": finite(logprob), "bytes": spelled}

    def _text(self, id: int) -> str:
        if self._ids_as_text:
            return f"token_id:{id}"
        return self._tokenizer.token_bytes(id).decode(errors="replace")


def of_prompt(
    tokenizer: Tokenizer, entries: Sequence[TokenEntry], num_alternatives: int
) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs: of each token by id, itself and the alternatives to it; the first has
    none.  A token's rank is null where it is not among the alternatives."""
    return [None, *(_ranked(tokenizer, entry, num_alternatives) for entry in entries)]


def _ranked(tokenizer: Tokenizer, entry: TokenEntry, num_alternatives: int) -> dict[str, Any]:
    ranks: dict[int, tuple[float, int | None]] = {entry.id: (entry.logprob, None)}
    shown = entry.alternatives[:num_alternatives]
    ranks |= {id: (value, rank) for rank, (id, value) in enumerate(shown, start=1)}
    return {
        str(id): {
            "logprob": finite(value),
            "rank": rank,
            "decoded_token": tokenizer.token_bytes(id).decode(errors="replace"),
        }
        for id, (value, rank) in ranks.items()
    }


def finite(value: float) -> float:
    """JSON has no infinity; -9999 is what OpenAI sends for a token that cannot be."""
    return value if value > -9999.0 else -9999.0
