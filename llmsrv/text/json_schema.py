"""Rewrites a client's JSON Schema to what llguidance follows exactly.

Generators write much that asks for nothing: bounds at the ends of a number type, property names
that may be any string, formats of their own.  That is left out; a format that is not enforced is an
annotation.  Of the rest, llguidance keeps numbers as doubles and does not follow every keyword: a
schema that must be followed is refused, and from another one the keyword is left out.
Sources: JSON Schema 2020-12; llguidance, docs/json_schema.md.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127
# Ends of number types, as integers and as generators round them.
_ENDS = frozenset(
    (2**63 - 1, 2**63, 2**64 - 1, 2**64, math.inf, math.nextafter(math.inf, 0))
    + (_FLOAT32_MAX, 3.4028235e38, 3.402823e38)
)
_UPPER, _LOWER = ("maximum", "exclusiveMaximum"), ("minimum", "exclusiveMinimum")
_UNFOLLOWED = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "dependencies"),
    *("dependentRequired", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems"),
    *("propertyNames", "uniqueItems", "$dynamicRef", "$recursiveRef"),
)
_ANNOTATIONS = frozenset(("title", "description", "$comment", "default", "examples", "$id"))
_LOOK_AROUND = re.compile(r"\\.|(\(\?<?[=!])", re.DOTALL)
_UNFOLLOWED_PATTERN = re.compile(r"\\[^1-9bBk]|(\(\?<?[=!]|\\[1-9bBk])", re.DOTALL)
# Patterns with look-ahead that generators write, and the same without it: zod's of an e-mail
# address, an account number and emoji, and pydantic's of a decimal.
_SAME_PATTERNS = {
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+"
    r"[A-Za-z]{2,}$": r"^([A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+\-]"
    r"@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
    r"^[A-Z]{2}(?!00|01|99)\d{2}[A-Z0-9]{11,30}$": (
        "^[A-Z]{2}(0[2-9]|[1-8][0-9]|9[0-8])[A-Z0-9]{11,30}$"
    ),
    r"^(?=[\s\S]*[\p{Extended_Pictographic}\p{Regional_Indicator}\u20E3])"
    r"[\p{Extended_Pictographic}\p{Emoji_Component}]+$": (
        r"^[\p{Extended_Pictographic}\p{Emoji_Component}]*"
        r"[\p{Extended_Pictographic}\p{Regional_Indicator}\u20E3]"
        r"[\p{Extended_Pictographic}\p{Emoji_Component}]*$"
    ),
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)$",
}
_DATE = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?([zZ]|[+-][0-2][0-9]:[0-5][0-9])"
# Formats of names: llguidance follows a format only in values.
_FORMATS_OF_NAMES = {
    "uuid": "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}[tT]{_TIME}$",
}
_IN_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_IN_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_IN_PLACE = ("items", "additionalProperties", "additionalItems")
# What a skeleton keeps besides the schemas within.
_SKELETON = frozenset(("type", "required", "enum", "const", "$ref"))
_SKELETON_IN = frozenset(("properties", "$defs", "definitions", "anyOf", "items"))
_TYPES = frozenset(("string", "number", "integer", "boolean", "null", "object", "array"))


class UnfollowedError(ValueError):
    """The schema uses a keyword that cannot be followed; the message names it."""


def followed_schema(schema: Schema) -> Schema:
    """The same schema, as llguidance takes it.  Raises UnfollowedError."""
    return _rewritten(schema, lambda part: _exact(_without_the_void(part, schema)))


def lenient_schema(schema: Schema) -> Schema:
    """The schema without what cannot be followed."""
    return _rewritten(schema, lambda part: _without_unfollowed(_without_the_void(part, schema)))


def skeleton_schema(schema: Schema) -> Schema:
    """Types, properties and choices only, for a schema that is not followed otherwise."""
    return _rewritten(lenient_schema(schema), _bones)


def digits_as_ecma(pattern: str) -> str:
    r"""A pattern for Rust's `regex` crate in which \d and \D are about 0 to 9 only."""
    digits = {r"\d": "[0-9]", r"\D": "[^0-9]"}
    return re.sub(r"\\.", lambda match: digits.get(match[0], match[0]), pattern, flags=re.DOTALL)


def allows_nothing(schema: Any) -> bool:
    """Whether no value follows the schema, as with zod's z.never()."""
    if not isinstance(schema, dict):
        return schema is False
    return schema.keys() - _ANNOTATIONS == {"not"} and schema["not"] in (True, {})


def _rewritten(schema: Schema, rewrite: Callable[[Schema], Schema]) -> Schema:
    def inner(part: Any) -> Any:
        if allows_nothing(part):
            return False
        return _rewritten(part, rewrite) if isinstance(part, dict) else part

    schema = rewrite(schema)
    for key, value in schema.items():
        if key in _IN_MAPS and isinstance(value, dict):
            schema[key] = {name: inner(part) for name, part in value.items()}
        elif (key in _IN_LISTS or key == "items") and isinstance(value, list):
            schema[key] = [inner(part) for part in value]
        elif key in _IN_PLACE:
            schema[key] = inner(value)
    return schema


# ---- What asks for nothing


def _without_the_void(schema: Schema, root: Schema) -> Schema:
    schema = {key: value for key, value in schema.items() if not _asks_for_nothing(key, value)}
    for limit, exclusive in zip(("maximum", "minimum"), ("exclusiveMaximum", "exclusiveMinimum")):
        # In draft 4 and OpenAPI 3.0 it says whether the bound next to it is exclusive.
        if isinstance(is_exclusive := schema.get(exclusive), bool):
            del schema[exclusive]
            if is_exclusive and limit in schema:
                schema[exclusive] = schema.pop(limit)
    # OpenAPI 3.0 has no null among its types.
    if schema.pop("nullable", None) is True and isinstance(type := schema.get("type"), str):
        schema["type"] = [type, "null"]
    if isinstance(pattern := schema.get("pattern"), str):
        schema["pattern"] = digits_as_ecma(_SAME_PATTERNS.get(pattern, pattern))
        # The pattern is a generator's way to check the format, which is enforced.
        if "format" in schema and _finds(_LOOK_AROUND, schema["pattern"]):
            del schema["pattern"]
    return _with_names_as_properties(schema, root)


def _asks_for_nothing(key: str, value: Any) -> bool:
    match key:
        case "$schema":
            return True
        case "format":
            return isinstance(value, str) and value not in FORMATS
        case "uniqueItems":
            return value is False
        case "propertyNames":
            return value is True or isinstance(value, dict) and _allows_any_name(value)
        case "not":
            return value is False
        case "dependencies" | "dependentRequired" | "dependentSchemas":
            return bool(value == {})
        case "unevaluatedProperties" | "unevaluatedItems":
            return value is True or bool(value == {})
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return (key in _UPPER and value in _ENDS) or (key in _LOWER and -value in _ENDS)


def _allows_any_name(schema: Schema) -> bool:
    rest = schema.keys() - _ANNOTATIONS - {"$schema"}
    return rest <= {"type"} and schema.get("type", "string") in ("string", ["string"])


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _with_names_as_properties(schema: Schema, root: Schema) -> Schema:
    """Property names from a list, or of a pattern, as properties, where that means the same."""
    names = schema.get("propertyNames")
    if not isinstance(names, dict) or schema.keys() & {"properties", "patternProperties"}:
        return schema
    prefix, _, defined = str(names.get("$ref")).rpartition("/")
    if names.keys() == {"$ref"} and prefix == "#/$defs" and isinstance(root.get("$defs"), dict):
        target = root["$defs"].get(defined)
        names = target if isinstance(target, dict) else names
    others = schema.get("additionalProperties", {})
    listed = names.get("enum", [names.get("const")])
    keys = names.keys() - _ANNOTATIONS - {"type"}
    if keys in ({"enum"}, {"const"}) and set(map(type, _listed(listed))) == {str}:
        within: Schema = {"properties": {name: others for name in listed}}
    elif (pattern := _pattern_of_names(names, keys)) is not None:
        within = {"patternProperties": {pattern: others}}
    else:
        return schema
    rest = {key: value for key, value in schema.items() if key != "propertyNames"}
    return rest | within | {"additionalProperties": False}


def _pattern_of_names(names: Schema, keys: set[str]) -> str | None:
    if keys <= {"pattern", "format"} and isinstance(names.get("pattern"), str):
        return digits_as_ecma(names["pattern"])
    if keys == {"format"} and isinstance(names["format"], str):
        return _FORMATS_OF_NAMES.get(names["format"])
    if keys and keys <= {"minLength", "maxLength"}:
        least, most = names.get("minLength", 0), names.get("maxLength", "")
        if all(re.fullmatch("[0-9]{0,4}", str(length)) for length in (least, most)):
            return f"^(.|\\n){{{least},{most}}}$"
    return None


# ---- What cannot be followed


def _exact(schema: Schema) -> Schema:
    for key, value in schema.items():
        if not _is_followed(key, value):
            if key in _UNFOLLOWED:
                names = ", ".join(name for name in schema if name in _UNFOLLOWED)
                message = f"it uses keywords of JSON Schema that are not supported: {names}"
            else:
                message = f"'{key}' holds a number beyond 2^53 that no double is equal to"
            raise UnfollowedError(message)
    return schema


def _without_unfollowed(schema: Schema) -> Schema:
    schema = {key: value for key, value in schema.items() if _is_followed(key, value)}
    if isinstance(pattern := schema.get("pattern"), str):
        if _finds(_UNFOLLOWED_PATTERN, pattern):
            del schema["pattern"]
    alternatives = schema.pop("oneOf", None)
    if isinstance(alternatives, list):
        if "anyOf" in schema:
            schema["allOf"] = [*_listed(schema.get("allOf", [])), {"anyOf": alternatives}]
        else:
            schema["anyOf"] = alternatives
    return schema


def _is_followed(key: str, value: Any) -> bool:
    if key in _UNFOLLOWED:
        return False
    if key in ("const", "enum", "multipleOf", *_UPPER, *_LOWER):
        return _is_exact(value)
    return True


def _is_exact(value: Any) -> bool:
    """Whether every integer within is equal to a double."""
    if isinstance(value, list):
        return all(map(_is_exact, value))
    if isinstance(value, dict):
        return all(map(_is_exact, value.values()))
    if isinstance(value, bool) or not isinstance(value, int):
        return True
    return abs(value) < 2**63 and int(float(value)) == value


def _finds(pattern: re.Pattern[str], text: str) -> bool:
    """Whether the pattern's group is found outside of escape sequences."""
    return any(match[1] for match in pattern.finditer(text))


def _bones(schema: Schema) -> Schema:
    kept = {key: value for key, value in schema.items() if key in _SKELETON}
    if not set(map(json.dumps, _listed(kept.get("type", [])))) <= set(map(json.dumps, _TYPES)):
        del kept["type"]
    if not str(kept.get("$ref", "#/")).startswith("#/"):
        del kept["$ref"]
    return kept | {
        key: value
        for key, value in schema.items()
        if key in _SKELETON_IN and isinstance(value, dict | list)
    }
