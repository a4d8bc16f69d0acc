"""Log-probabilities in OpenAI's shapes for chat and for completions, and in vLLM's for prompts."""

from collections.abc import Sequence
from typing import Any

from llmsrv.api.generation.output import Delta
from llmsrv.api.generation.output import TokenLogprob
from llmsrv.text.tokenizer import Tokenizer


MANY_LOGPROBS = 2000  # formatting takes some 2 us each


def are_large(choices: Sequence[Delta], num_alternatives: int | None) -> bool:
    """Whether the log-probabilities would keep the event loop for milliseconds."""
    num_tokens = sum(len(choice.logprobs) for choice in choices)
    return num_tokens * (1 + (num_alternatives or 0)) > MANY_LOGPROBS


class LogprobFormatter:
    """Formats the log-probabilities of one request's output.

    num_alternatives  alternatives listed per token, at most
    ids_as_text       tokens are written as "token_id:7" instead of their text
    """

    def __init__(self, tokenizer: Tokenizer, num_alternatives: int, ids_as_text: bool) -> None:
        self._tokenizer = tokenizer
        self._num_alternatives = num_alternatives
        self._ids_as_text = ids_as_text

    def chat(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            {
                **self._chat_token(token.id, token.logprob),
                "top_logprobs": [self._chat_token(*pair) for pair in self._top(token)],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def completion(self, tokens: Sequence[TokenLogprob], first_id: int | None) -> dict[str, Any]:
        """The top of a token also has the token itself, so it may be longer than asked for.

        first_id: a token to list before the others.  Nothing precedes it, so it has no
        log-probability."""
        lists: dict[str, list[Any]] = {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {
                    self._text(id): finite(value)
                    for id, value in [*self._top(token), (token.id, token.logprob)]
                }
                for token in tokens
            ],
            "text_offset": [token.text_offset for token in tokens],
        }
        if first_id is not None:
            first = {"tokens": self._text(first_id), "text_offset": 0}
            lists = {name: [first.get(name), *values] for name, values in lists.items()}
        return lists

    def _top(self, token: TokenLogprob) -> list[tuple[int, float]]:
        return token.alternatives[: self._num_alternatives]

    def _chat_token(self, id: int, logprob: float) -> dict[str, Any]:
        utf8_bytes = list(self._tokenizer.token_bytes(id))
        return {"token": self._text(id), "logprob": finite(logprob), "bytes": utf8_bytes}

    def _text(self, id: int) -> str:
        if self._ids_as_text:
            return f"token_id:{id}"
        return self._tokenizer.token_bytes(id).decode(errors="replace")


def prompt_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[TokenLogprob], num_alternatives: int
) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs: for each prompt token, itself and its alternatives by id.

    The first token has none.
    """
    return [None, *(_by_id(tokenizer, token, num_alternatives) for token in tokens)]


def _by_id(tokenizer: Tokenizer, token: TokenLogprob, num_alternatives: int) -> dict[str, Any]:
    ranks = {token.id: (token.logprob, token.rank)}
    top = token.alternatives[:num_alternatives]
    ranks |= {id: (value, rank) for rank, (id, value) in enumerate(top, start=1)}
    return {
        str(id): {
            "logprob": finite(value),
            "rank": rank,
            "decoded_token": tokenizer.token_bytes(id).decode(errors="replace"),
        }
        for id, (value, rank) in ranks.items()
    }


def finite(value: float) -> float:
    """JSON has no infinity.  OpenAI sends -9999 for a token that cannot be sampled."""
    return value if value > -9999.0 else -9999.0
