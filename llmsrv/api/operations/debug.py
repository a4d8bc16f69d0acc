"""What --enable-debug adds to answers, under MLC LLM's names."""

from collections.abc import Sequence

from llmsrv.engine.messages import Finished


def figures(finished: Sequence[Finished], num_cached_tokens: int) -> dict[str, float] | None:
    """`usage.extra`: of the choices that the engine has ended, in tokens and seconds; None while
    there is none."""
    done = [choice for choice in finished if choice.last_token_s]
    if not done:
        return None
    num_prompt = max(choice.num_prompt_tokens for choice in done)
    num_output = sum(choice.num_output_tokens for choice in done)
    queued_s = min(choice.queued_s for choice in done)
    first_s = min(choice.first_token_s for choice in done)
    last_s = max(choice.last_token_s for choice in done)
    num_prefill = num_prompt - num_cached_tokens
    num_decode = num_output - len(done)
    prefill_s = first_s - min(choice.scheduled_s for choice in done)
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
