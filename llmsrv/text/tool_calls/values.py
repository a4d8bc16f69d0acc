"""The arguments of calls that are not written as JSON: which type a text has, by the tool's schema.
"""

import json
from collections.abc import Iterator
from typing import Any

from llmsrv.text.json_schema import allows_nothing
from llmsrv.text.tool_calls.python_literals import read_literal

# With any of these keys a schema may allow properties that it does not list.
OPEN_SCHEMA_KEYS = frozenset(
    ("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")
)
Schema = dict[str, Any]

_MAX_REFERENCES = 16  # followed from one schema to another
_DEFINITIONS = ("$defs", "definitions")
_ANY_TYPE = frozenset(("string", "number", "boolean", "null", "object", "array"))


def arguments_schema(schema: Schema | None) -> Schema:
    """The schema of a call's arguments.  Unless it says something else, unlisted properties are
    not allowed: small models would invent them without end."""
    schema = {"type": "object", "properties": {}} | (schema or {})
    return schema if OPEN_SCHEMA_KEYS & schema.keys() else schema | {"additionalProperties": False}


def arguments_object(arguments: Any) -> dict[str, Any]:
    """The arguments of a call as an object, for a template or format that takes nothing else."""
    return arguments if isinstance(arguments, dict) else {"arguments": arguments}


class ArgumentSchemas:
    """The schemas of a tool's arguments by name."""

    def __init__(self, schema: Schema | None) -> None:
        self._root = arguments_schema(schema)
        self._definitions = {key: self._root[key] for key in _DEFINITIONS if key in self._root}
        root = _resolved(self._root, self._root)
        properties = root.get("properties")
        self.properties: dict[str, Any] = {
            name: property
            for name, property in (properties if isinstance(properties, dict) else {}).items()
            if not allows_nothing(property)
        }
        required = root.get("required")
        self.required = {name for name in self.properties if name in _listed(required)}
        self._others = root.get("additionalProperties")
        self.is_open = bool(OPEN_SCHEMA_KEYS & root.keys()) and self._others is not False

    def types(self, name: str) -> frozenset[str]:
        """The JSON types that an argument may have; all of them if its schema does not say."""
        return self.types_of(self.of(name))

    def types_of(self, schema: Schema) -> frozenset[str]:
        return frozenset(_types(schema, self._root)) or _ANY_TYPE

    def choices(self, name: str) -> list[Any] | None:
        """The values that an argument may have, if its schema lists them."""
        return self.choices_of(self.of(name))

    def choices_of(self, schema: Schema) -> list[Any] | None:
        schema = self.resolved(schema)
        if "const" in schema:
            return [schema["const"]]
        choices = schema.get("enum")
        return choices if isinstance(choices, list) and choices else None

    def standalone(self, name: str) -> Schema:
        """The schema of an argument, with the definitions that it may refer to."""
        return self._definitions | (self.of(name) or {"type": sorted(_ANY_TYPE)})

    def resolved(self, schema: Schema) -> Schema:
        """The schema that a reference to one of the definitions stands for."""
        return _resolved(schema, self._root)

    def within(self, schema: Schema) -> "ArgumentSchemas":
        """The schemas of the properties of an argument that is an object."""
        return ArgumentSchemas(self._definitions | self.resolved(schema))

    def of(self, name: str) -> Schema:
        """The schema of an argument."""
        schema = self.properties.get(name, self._others)
        return schema if isinstance(schema, dict) else {}


def json_of(text: str, types: frozenset[str]) -> str:
    """JSON of an argument that was written as plain text: of one of the types, or a string.

    Python's spelling of constants, lists and dictionaries is understood: templates print them so.
    """
    if types != {"string"}:
        value = text.strip()
        for written in _json_readings(value):
            found = _type_of(written)
            if found != "string" and found in types or found == "integer" and "number" in types:
                return written
    return json.dumps(text, ensure_ascii=False)


def json_of_python(text: str) -> str:
    """JSON of a Python literal, in which JSON's constants are also allowed; of the text itself if
    it is neither."""
    return next(_json_readings(text.strip()), json.dumps(text, ensure_ascii=False))


def _json_readings(text: str) -> Iterator[str]:
    """The text as JSON, if it is JSON; else as the Python literal that it is."""
    try:
        json.loads(text, parse_constant=_refuse_constant)
        yield text
    except (ValueError, RecursionError):
        try:
            yield json.dumps(read_literal(text), ensure_ascii=False, allow_nan=False)
        except ValueError:
            return


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _type_of(written: str) -> str:
    """The JSON Schema type of a JSON value.  A number without `.` and exponent is an integer."""
    first = written[0]
    if first in '"{[tfn':
        return {'"': "string", "{": "object", "[": "array", "n": "null"}.get(first, "boolean")
    return "number" if set(written) & set(".eE") else "integer"


# ---- What a schema says


def _types(schema: Schema, root: Schema, num_references: int = 0) -> Iterator[str]:
    if num_references > _MAX_REFERENCES:
        return
    schema = _resolved(schema, root)
    if (types := schema.get("type")) is not None:
        yield from (type for type in _listed(types) if isinstance(type, str))
    elif "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else _listed(schema["enum"])
        yield from (_type_of(json.dumps(value)) for value in values)
    else:
        for key in ("anyOf", "oneOf", "allOf"):
            for part in _listed(schema.get(key)):
                if isinstance(part, dict):
                    yield from _types(part, root, num_references + 1)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _resolved(schema: Schema, root: Schema) -> Schema:
    """The schema that a reference to a definition stands for."""
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        target: Any = root
        for key in reference[2:].split("/"):
            target = target.get(key) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            return schema
        schema = target | {key: value for key, value in schema.items() if key != "$ref"}
    return schema
