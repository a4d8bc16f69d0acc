"""Random JSON Schemas from a seed, with every keyword that answers are guaranteed to follow, and
small enough that a small model can complete them."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]


def make_schema(seed: int) -> Schema:
    """Returns an object schema, at most three levels deep."""
    random_ = random.Random(seed)
    schema = _object(random_, 2)
    if random_.random() < 0.2:
        schema["$defs"] = {"shared": _value(random_, 0)}
        schema["properties"]["shared"] = {"$ref": "#/$defs/shared"}
        schema["required"] = [*schema["required"], "shared"]
    return schema


def _value(random_: random.Random, depth: int) -> Schema:
    flat: list[Callable[[random.Random], Schema]] = [
        _string, _number, _enum, lambda _: {"type": "boolean"}, lambda _: {"type": "null"}
    ]
    kind = random_.randrange(len(flat) + (3 if depth else 0))
    if kind < len(flat):
        return flat[kind](random_)
    if kind == len(flat):
        return _object(random_, depth - 1)
    if kind == len(flat) + 1:
        max_items = random_.randint(1, 3)
        min_items = random_.randint(0, max_items)
        items = _value(random_, depth - 1)
        return {"type": "array", "items": items, "minItems": min_items, "maxItems": max_items}
    return {"anyOf": [_value(random_, depth - 1), _string(random_)]}


def _object(random_: random.Random, depth: int) -> Schema:
    names = random_.sample(["name", "size", "Größe", "a b", "x-1", 'quo"te', "list"], 3)
    properties = {name: _value(random_, depth) for name in names[: random_.randint(1, 3)]}
    required = random_.sample(list(properties), random_.randint(0, len(properties)))
    fixed = {"additionalProperties": False}
    return {"type": "object", "properties": properties, "required": required, **fixed}


def _string(random_: random.Random) -> Schema:
    form: Schema = random_.choice(
        [
            {"maxLength": 12},
            {"minLength": 3, "maxLength": 8},
            {"pattern": "^[a-c]{2,5}$"},
            {"pattern": r"^\d{3}-\d{2}$"},
            {"format": "date"},
            {"format": "uuid"},
            {"const": "fixed"},
        ]
    )
    return {"type": "string", **form}


def _number(random_: random.Random) -> Schema:
    form: Schema = random_.choice(
        [
            {"type": "integer", "minimum": -5, "maximum": 17},
            {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 1000},
            {"type": "number", "minimum": 0, "maximum": 1.5},
            {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
        ]
    )
    return form


def _enum(random_: random.Random) -> Schema:
    return {"enum": random_.sample(["red", "green", 1, 2.5, None, True, "dark blue"], 3)}
