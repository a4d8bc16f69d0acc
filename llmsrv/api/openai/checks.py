"""Checks the fields that chat and completions share, right after the body is decoded."""

from llmsrv.api.openai.schema import GenerationRequest
from llmsrv.config import Config
from llmsrv.errors import invalid


def check_shared_fields(body: GenerationRequest, config: Config) -> None:
    """Turns `debug_config` into the options that it stands for.

    Raises ApiError 400 for fields that exclude each other, or that the server's options exclude.
    """
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "it is only allowed when 'stream' is true")
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("prompt_logprobs", "it is not allowed when 'stream' is true")
    if (detection := body.repetition_detection) is not None and detection.max_pattern_size:
        if detection.min_count < 2:
            raise invalid("repetition_detection", "'min_count' must be at least 2")
        if detection.min_pattern_size > detection.max_pattern_size:
            raise invalid(
                "repetition_detection", "'min_pattern_size' is larger than 'max_pattern_size'"
            )
    if body.debug_config is None:
        return
    if not config.enable_debug:
        raise invalid("debug_config", "it is only allowed when the server has --enable-debug")
    if body.debug_config.ignore_eos:
        body.ignore_eos = True
        body.stop = None
