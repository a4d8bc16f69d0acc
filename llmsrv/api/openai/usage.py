"""OpenAI's usage object, with MLC LLM's `extra` under --enable-debug.

Source: OpenAI API reference, "The chat completion object"; MLC LLM, "REST API".
"""

from collections.abc import Sequence
from typing import Any

from llmsrv.api.generation.job import Usage
from llmsrv.engine.messages import Finished


def usage_object(usage: Usage, has_extra: bool) -> dict[str, Any]:
    fields = {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_output_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        "prompt_tokens_details": {"audio_tokens": 0, "cached_tokens": usage.num_cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 0,
            "audio_tokens": 0,
            "reasoning_tokens": usage.num_reasoning_tokens,
            "rejected_prediction_tokens": 0,
        },
    }
    if has_extra:
        fields["extra"] = _extra(usage.finished, usage.num_cached_tokens)
    return fields


def _extra(finished: Sequence[Finished], num_cached_tokens: int) -> dict[str, float] | None:
    """Tokens and seconds of the choices that the engine has ended; None if there are none yet."""
    choices = [choice for choice in finished if choice.last_token_s]
    if not choices:
        return None
    num_prompt = max(choice.num_prompt_tokens for choice in choices)
    num_output = sum(choice.num_output_tokens for choice in choices)
    queued_s = min(choice.queued_s for choice in choices)
    first_s = min(choice.first_token_s for choice in choices)
    last_s = max(choice.last_token_s for choice in choices)
    num_prefill = num_prompt - num_cached_tokens
    num_decode = num_output - len(choices)
    prefill_s = first_s - min(choice.scheduled_s for choice in choices)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "prefill_tokens": num_prefill,
        "decode_tokens": num_decode,
        "jump_forward_tokens": 0,
        "prefill_tokens_per_s": _rate(num_prefill, prefill_s),
        "decode_tokens_per_s": _rate(num_decode, last_s - first_s),
        "end_to_end_latency_s": last_s - queued_s,
        "ttft_s": first_s - queued_s,
        "inter_token_latency_s": (last_s - queued_s) / num_output,
    }


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
