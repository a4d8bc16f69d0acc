"""One turn of a conversation: messages in, the model's answer out as deltas of reasoning, text and
tool calls.  Every dialect with messages is a translation to a ChatTurn and from its deltas.
"""

from dataclasses import dataclass

import msgspec

from llmsrv.api.generation.conversation import Conversation
from llmsrv.api.generation.conversation import ToolChoice
from llmsrv.api.generation.grammar import WantedGrammar
from llmsrv.api.generation.grammar import answer_grammar
from llmsrv.api.generation.job import Job
from llmsrv.api.generation.job import start_job
from llmsrv.api.generation.options import GenerationOptions
from llmsrv.api.generation.options import RepetitionDetection
from llmsrv.api.generation.prompt import prompt_ids
from llmsrv.api.generation.submit import max_output_tokens
from llmsrv.api.generation.tools import tool_use
from llmsrv.asgi.request import Request
from llmsrv.config import DEFAULT_MODEL
from llmsrv.registry.service import Service
from llmsrv.text.reasoning import THINK_START
from llmsrv.text.tokenizer import Tokenizer

# The default model is so small that it may repeat itself until its context is full.  This ends an
# answer of no more than loops, but neither rules of dashes nor the head of a wide table.
DEFAULT_MODEL_REPETITION = RepetitionDetection(
    max_pattern_size=128, min_pattern_size=4, min_count=6
)


@dataclass(frozen=True, slots=True)
class RunningTurn:
    """A turn whose request the engine has.

    job          its deltas are the answer
    prompt_ids   the conversation as the model sees it
    is_thinking  True if the prompt already opened the thinking block; None if the model does not
                 think
    """

    job: Job
    prompt_ids: list[int]
    is_thinking: bool | None


@dataclass(frozen=True, kw_only=True)
class ChatTurn:
    """What a request asks for.

    num_logprobs   alternatives per token of the answer; -1: no log-probabilities
    answer_format  the grammar of an answer that does not call tools; None if it is free
    """

    conversation: Conversation
    options: GenerationOptions
    tool_choice: ToolChoice = ToolChoice()
    num_logprobs: int = -1
    answer_format: WantedGrammar | None = None

    async def start(self, request: Request, service: Service) -> RunningTurn:
        """Submits the request to the engine.

        Raises ApiError 400 for what the model, its chat template or its context does not allow, 503
        or another that the engine answers with.
        """
        options, params = self.options, self.conversation.param_names
        tools = tool_use(service, self.conversation.tools, self.tool_choice)
        ids = await prompt_ids(service, self.conversation, options)
        is_thinking = _is_thinking(service, ids)
        default_limit = service.config.default_max_tokens or None
        limit = max_output_tokens(
            service, len(ids), options.max_tokens, default_limit, params.messages
        )
        is_limited = options.max_tokens or default_limit or options.repetition_detection
        if not is_limited and service.config.model == [DEFAULT_MODEL]:
            options = msgspec.structs.replace(
                options, repetition_detection=DEFAULT_MODEL_REPETITION
            )
        job = start_job(
            request,
            service,
            options,
            [ids],
            [limit],
            n=options.n or 1,
            num_logprobs=self.num_logprobs,
            grammar=await answer_grammar(service, self.answer_format, tools, is_thinking),
            tools=tools,
            is_thinking=is_thinking,
        )
        return RunningTurn(job, ids, is_thinking)


def _is_thinking(service: Service, prompt_ids: list[int]) -> bool | None:
    parser, template = service.config.reasoning_parser, service.text.template
    if parser == "think" or (parser == "auto" and template and template.has_reasoning):
        return _opens_thinking(service.text.tokenizer, prompt_ids)
    return None


def _opens_thinking(tokenizer: Tokenizer, prompt_ids: list[int]) -> bool:
    """True if the prompt ends with the tag that opens the thinking block."""
    end = b"".join(map(tokenizer.token_bytes, prompt_ids[-16:]))
    return end.decode(errors="replace").rstrip().endswith(THINK_START)
