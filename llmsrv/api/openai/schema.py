"""What clients may send, as types.  The bounds in the annotations are the one table of limits.

Options that every dialect shares are in api/generation/options.py.  Fields of vLLM and MLC that
OpenAI does not have keep the names they have there.
"""

from typing import Annotated
from typing import Any
from typing import Literal
from typing import TypeVar
from typing import cast

import msgspec
from msgspec import Meta

from llmsrv.api.decode import Name
from llmsrv.api.generation.options import GenerationOptions
from llmsrv.api.generation.options import INT32
from llmsrv.api.generation.options import NumAlternatives
from llmsrv.api.generation.options import TokenCount
from llmsrv.api.generation.options import TokenId

FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
CallId = Annotated[str, Meta(max_length=1024)]
MAX_PROMPTS = 128
# A missing JSON schema.  Schemas stay undecoded: they may be large, and only grammars need them.
NOTHING = msgspec.Raw(b"null")


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None
    refusal: str | None = None
    prompt_cache_breakpoint: dict[str, str] | None = None  # ignored: every block is cached


class CalledFunction(msgspec.Struct):
    name: CallId
    arguments: str


class ToolCall(msgspec.Struct):
    """A call that the assistant made earlier."""

    id: CallId
    function: CalledFunction
    type: Literal["function"] = "function"


class Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: CallId | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    tool_call_id: CallId | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's newer name for it
    audio: None = None
    function_call: None = None


class Function(msgspec.Struct, omit_defaults=True):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    type: Literal["function"]
    function: Function


class FunctionReference(msgspec.Struct):
    name: str


class NamedToolChoice(msgspec.Struct, tag_field="type", tag="function"):
    function: FunctionReference


class ToolReference(msgspec.Struct):
    type: Literal["function"]
    function: FunctionReference


class AllowedTools(msgspec.Struct):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolReference], Meta(min_length=1, max_length=128)]


class AllowedToolsChoice(msgspec.Struct, tag_field="type", tag="allowed_tools"):
    allowed_tools: AllowedTools


class DebugConfig(msgspec.Struct):
    """MLC's; only under --enable-debug."""

    ignore_eos: bool | None = None
    grammar_execution_mode: Literal["jump_forward", "constraint"] | None = None
    pinned_system_prompt: Literal[False] | None = None
    special_request: None = None
    disagg_config: None = None


class JSONSchema(msgspec.Struct):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema: msgspec.Raw
    description: str | None = None
    strict: bool | None = None  # ignored: an answer always follows the schema


class StructuralTag(msgspec.Struct):
    begin: str
    schema: msgspec.Raw
    end: str


class ResponseFormat(msgspec.Struct):
    """OpenAI's text, json_object and json_schema; MLC's `schema` for json_object; vLLM's others."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar", "structural_tag"]
    json_schema: JSONSchema | None = None
    schema: msgspec.Raw = msgspec.field(default_factory=lambda: NOTHING)
    regex: str | None = None
    grammar: str | None = None
    tags: list[StructuralTag] | None = None
    structures: list[StructuralTag] | None = None  # vLLM's name for `tags`
    triggers: list[str] | None = None
    format: msgspec.Raw = msgspec.field(default_factory=lambda: NOTHING)  # text/structural_tag.py


class StructuredOutputs(msgspec.Struct):
    """vLLM's names for the form of an answer."""

    json: msgspec.Raw = msgspec.field(default_factory=lambda: NOTHING)
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: str | None = None  # a ResponseFormat as JSON
    whitespace_pattern: str | None = None
    disable_fallback: bool | None = None  # ignored: there is no fallback
    disable_any_whitespace: bool | None = None  # ignored: only whitespace_pattern allows any
    disable_additional_properties: Literal[False] | None = None


class GenerationRequest(GenerationOptions, kw_only=True):
    """The fields that chat and completions share."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    request_id: Name | None = None  # becomes part of the answer's id
    debug_config: DebugConfig | None = None

    # The form of the answer: see structured.py.
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: msgspec.Raw = msgspec.field(default_factory=lambda: NOTHING)
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    # llama-server's
    grammar: str | None = None
    json_schema: msgspec.Raw = msgspec.field(default_factory=lambda: NOTHING)

    # Accepted without any effect, except that an answer to `service_tier` has one too.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, str] | None = None
    prompt_cache_retention: str | None = None


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: NumAlternatives | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: (
        Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice | None
    ) = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    echo: bool | None = None  # begins the answer with the assistant's last message
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=32)] | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    prompt: (
        str | Annotated[list[TokenId | str | list[TokenId]], Meta(min_length=1)]
    )
    max_tokens: Annotated[int, Meta(ge=0, le=INT32 - 1)] | None = None  # 0: only the prompt
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


T = TypeVar("T", bound=GenerationRequest)


def with_default_model(request_type: type[T], default: str | None) -> type[T]:
    """The type with a default for `model`, which stays a required field if default is None."""
    if default is None:
        return request_type
    field = ("model", Name, default)
    name, bases = request_type.__name__, (request_type,)
    return cast(type[T], msgspec.defstruct(name, [field], bases=bases, kw_only=True))


# Fields that change no answer: never refused, but counted like unknown ones.
IGNORED = frozenset(
    (
        "prediction",  # an answer's speed does not depend on it
        # vLLM's
        "guided_decoding_backend",
        "session_id",
        "stream_interval",
    )
)

# Unsupported field -> the values that change nothing, and so are accepted like null.  A field that
# is neither here nor above is unknown.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),  # in chat
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's
    "add_special_tokens": (False,),  # in chat, where the template has them
    "bad_words": ([],),
    "chat_template": (),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "ec_transfer_params": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "media_io_kwargs": ({},),
    "mm_payload": ("tensors",),
    "mm_processor_kwargs": ({},),
    "prompt_embeds": ([],),
    "return_mm_kwargs": (False, True),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "return_weight_versions": (False,),
    "routed_experts_prompt_start": (0,),
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (-1,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
