"""Decodes request bodies into typed objects, and says in OpenAI's words what is wrong with a body.

msgspec decodes and validates in one pass.  Only if that fails is the body decoded again without
types, so that the error can quote the value.  Of a repeated key the last value counts, as in most
readers of JSON (RFC 8259 section 4).
"""

import asyncio
import re
from collections.abc import Collection
from collections.abc import Mapping
from typing import Annotated
from typing import Any
from typing import Generic
from typing import TypeVar

import msgspec

from llmsrv.asgi.request import Request
from llmsrv.errors import ApiError
from llmsrv.errors import missing
from llmsrv.registry.models import Models

T = TypeVar("T", bound=msgspec.Struct)
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]  # of a model or a request

_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`$")
MAX_PATH_CHARS = 1024
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_BOUND = re.compile(
    r"Expected `(?P<type>\w+)`(?P<length> of length)? (?P<sign><=|>=|<|>) (?P<bound>\S+)"
)
_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]+)`")
_KIND = {"int": "integer", "float": "decimal", "str": "string", "array": "array"}
_SIDES = {
    "above_max_length": "too long",
    "below_min_length": "too short",
    "above_max_value": "above maximum value",
    "below_min_value": "below minimum value",
}
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
MAX_QUOTED_CHARS = 64  # of a bad value in an error message
# A body of eight million bytes decodes in 15 ms as a single string, but takes a second as a million
# small parts.  The event loop would stall for that second, and no real request needs that many.
INLINE_BYTES = 1 << 17  # larger bodies are decoded in a thread
_MAX_STRINGS = 1 << 17
_MAX_BRACKETS = 1 << 18  # including those in strings
_MAX_NUMBERS = 1 << 19  # before a comma, including those in strings
_DIGITS = bytes(ord("0") if byte in b"0123456789" else byte for byte in range(256))
_LARGE_BODY_BYTES = 1 << 16
UTF_8 = ("", "utf-8", "utf8")  # values of charset

# Field -> the values of it that change nothing, and so are accepted like null.
UnsupportedFields = Mapping[str, Collection[Any]]


class BodyDecoder(Generic[T]):
    """Reads the request bodies of one route.

    unsupported  fields that the API defines but this server does not support; any other field that
                 the type does not have is unknown
    ignored      further fields that the API defines, which change no answer
    """

    def __init__(
        self,
        type: type[T],
        unsupported: UnsupportedFields = {},
        ignored: Collection[str] = frozenset(),
    ) -> None:
        self._decoder = msgspec.json.Decoder(type)
        self._fields = type.__struct_fields__
        self._unsupported = unsupported
        self._ignored = ignored

    async def read_for_model(self, request: Request, models: Models, tenant: bytes) -> T:
        """As read(), but a request that will be refused whatever its body says is refused first.

        This is for bodies that the client may not have sent yet: it waits for `100 Continue`, or
        the body is large.
        """
        length = int(request.headers.get("content-length") or 0)
        if request.headers.get("expect") is not None or length > _LARGE_BODY_BYTES:
            models.check_before_body(tenant)
        return await self.read(request, models)

    async def read(self, request: Request, models: Models) -> T:
        """The request's body as the route's type.

        Raises ApiError 415 unless the body is declared to be JSON: a web page may send a form to
        any origin without a preflight, and must not reach a model that way.  413 for a body that is
        too large or has too many parts, 400 as decode_body() and check_other_fields().
        """
        _check_content_type(request)
        body = await request.body(models.body_limit_bytes)
        is_strict = models.config.strict_fields
        if len(body) <= INLINE_BYTES:
            decoded, num_unknown = self._decode(body, is_strict)
        else:
            decoded, num_unknown = await asyncio.to_thread(self._decode, body, is_strict)
        models.num_unknown_fields += num_unknown
        return decoded

    def _decode(self, body: bytes, is_strict: bool) -> tuple[T, int]:
        """The body as the route's type, and its number of unknown and ignored fields."""
        _check_num_parts(body)
        decoded = decode_body(self._decoder, body)
        return decoded, check_other_fields(
            body, self._fields, is_strict, self._unsupported, self._ignored
        )


def _check_num_parts(body: bytes) -> None:
    """ApiError 413 for a body with too many parts, estimated by counts that are cheap."""
    if len(body) <= 2 * _MAX_STRINGS:
        return
    num_strings = (body.count(b'"') - body.count(b'\\"')) // 2
    num_brackets = body.count(b"[") + body.count(b"{")
    if num_strings > _MAX_STRINGS or num_brackets > _MAX_BRACKETS:
        raise ApiError(
            413,
            f"The request body has more than the {_MAX_STRINGS} strings, or the {_MAX_BRACKETS} "
            "arrays and objects, that are allowed.",
        )
    if body.count(b",") > _MAX_NUMBERS:
        digits = body.translate(_DIGITS, b" \n\r\t")
        if digits.count(b"0,") > _MAX_NUMBERS:
            raise ApiError(
                413, f"The request body has more than the {_MAX_NUMBERS} numbers that are allowed."
            )


def decode_body(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """The body as the decoder's type; ApiError 400 with `param` and `code` if it is invalid."""
    try:
        body.decode()
        return decoder.decode(body)
    except msgspec.ValidationError:
        return _decode_slowly(decoder, body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_json(error) from None


def _decode_slowly(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """As decode_body(), for a body that may only be invalid in a value that a later one replaces.
    """
    untyped = _decode_untyped(body)
    try:
        return decoder.decode(msgspec.json.encode(untyped))
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error), untyped) from None
    except RecursionError as error:
        raise _not_json(error) from None


def check_other_fields(
    body: bytes,
    supported: Collection[str],
    is_strict: bool,
    unsupported: UnsupportedFields = {},
    ignored: Collection[str] = frozenset(),
) -> int:
    """The number of unknown and ignored fields in the JSON object `body`.

    Raises ApiError 400 for an unsupported field whose value matters, and for an unknown field if
    is_strict.
    """
    fields = _FIELDS.decode(body)
    num_unknown = 0
    for field in fields.keys() - supported:
        if field in unsupported:
            value = msgspec.json.decode(fields[field])
            _check_unsupported(field, value, harmless=unsupported[field])
        elif is_strict and field not in ignored:
            name = field[:MAX_QUOTED_CHARS]
            message = f"Unknown parameter: '{name}'."
            raise ApiError(400, message, param=name, code="unknown_parameter")
        else:
            num_unknown += 1
    return num_unknown


def _check_unsupported(field: str, value: Any, harmless: Collection[Any]) -> None:
    if value is not None and value not in harmless:
        message = f"'{field}' is not supported by this server, but got {_quoted(value)}."
        raise ApiError(400, message, param=field, code="unsupported_parameter")


def _check_content_type(request: Request) -> None:
    encoding = request.headers.get("content-encoding") or "identity"
    if encoding.strip().lower() != "identity":
        raise _unsupported_media("Content-Encoding", encoding, "none")
    content_type = request.headers.get("content-type")
    if content_type is None and request.headers.get("origin") is None:
        return
    media_type, _, parameters = (content_type or "").partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if media_type.strip().lower() != "application/json" or charset not in UTF_8:
        raise _unsupported_media("Content-Type", content_type or "none", "application/json")


def _unsupported_media(header: str, got: str, allowed: str) -> ApiError:
    message = f"Unsupported {header}: expected {allowed}, but got {_quoted(got)}."
    return ApiError(415, message, code="unsupported_media_type")


def _decode_untyped(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _not_json(error) from None


def _not_json(error: Exception) -> ApiError:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    hint = f"We could not parse the JSON body of your request: {reason}."
    return ApiError(400, hint, code="invalid_json")


def _invalid_field(explanation: str, body: Any) -> ApiError:
    """Turns msgspec's sentence and path into OpenAI's message, param and code."""
    what, path = _split_path(explanation)
    if absent := _MISSING.match(what):
        return missing(f"{path}.{absent['field']}" if path else absent["field"])
    got = _quoted(_value_at(body, path))
    if bound := _BOUND.match(what):
        return _out_of_bounds(path, bound, got)
    if what.startswith("Expected"):
        wanted = what.removeprefix("Expected ").replace("`", "").split(", got ")[0]
        message = f"Invalid type for '{path or 'body'}': expected {wanted}, but got {got} instead."
        return ApiError(400, message, param=path or None, code="invalid_type")
    message = f"Invalid value for '{path}': {what}; got {got}."
    return ApiError(400, message, param=path, code="invalid_value")


def _split_path(explanation: str) -> tuple[str, str]:
    """msgspec's sentence, which may quote megabytes of a value, and the path after it."""
    match = _PATH.search(explanation, max(0, len(explanation) - MAX_PATH_CHARS))
    if match is None:
        return explanation[:MAX_PATH_CHARS], ""
    return explanation[: match.start()][:MAX_PATH_CHARS], match["path"].replace("[...]", "")


def _out_of_bounds(path: str, bound: re.Match[str], got: str) -> ApiError:
    kind = _KIND.get(bound["type"], bound["type"])
    of = "length" if bound["length"] else "value"
    side = f"above_max_{of}" if bound["sign"].startswith("<") else f"below_min_{of}"
    message = (
        f"Invalid '{path}': {kind} {_SIDES[side]}. "
        f"Expected a {of} {bound['sign']} {bound['bound']}, but got {got} instead."
    )
    return ApiError(400, message, param=path, code=f"{kind}_{side}")


def _value_at(body: Any, path: str) -> Any:
    for key, index in _STEP.findall(path):
        try:
            body = body[int(index)] if index else body[key]
        except (LookupError, TypeError):
            return body
    return body


def _quoted(value: Any) -> str:
    """The value as JSON, truncated if it is long."""
    text = msgspec.json.encode(value).decode()
    if len(text) <= MAX_QUOTED_CHARS:
        return text
    return f"{text[:MAX_QUOTED_CHARS]}... ({len(text)} characters)"
