"""Reads the options of config.py from flags and LLMSRV_ variables.

Imports the standard library only, so that --help is quick and works without our dependencies.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmsrv.config import Config
from llmsrv.errors import StartupError

Environment = Mapping[str, str]
Values = dict[str, Any]


class OptionError(Exception):
    """An option that cannot be used; the message names it."""


def config_from_environment(environment: Environment) -> Config:
    """The options of the LLMSRV_ variables; StartupError if one of them cannot be used."""
    try:
        return _make_config({}, environment)
    except OptionError as error:
        raise StartupError(str(error)) from None


def parse_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str], environment: Environment
) -> Config:
    """The options of flags and LLMSRV_ variables.

    If one of them cannot be used, argparse prints the usage and exits with 2.
    """
    try:
        return _make_config(vars(parser.parse_args(arguments)), environment)
    except OptionError as error:
        parser.error(str(error))


def make_parser(
    prog: str, description: str, names: Collection[str] | None = None, **settings: Any
) -> argparse.ArgumentParser:
    """A parser with a flag for each option, or for those in `names`; settings: argparse's own."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        **settings,
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        if names is None:
            title = field.metadata["group"]
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            _add_flag(groups[title], field)
        elif field.name in names:
            _add_flag(parser, field)
    return parser


def _add_flag(group: Any, field: "dataclasses.Field[Any]") -> None:
    metadata = field.metadata
    flag = "--" + field.name.replace("_", "-")
    if field.type is bool:
        group.add_argument(flag, action="store_true", help=metadata["help"])
        return
    choices, default = metadata.get("choices"), field.default
    is_number = field.type in (int, float) and not choices  # choices are shown as they are
    suffix = "" if default in (None, dataclasses.MISSING) else f" (default: {default})"
    group.add_argument(
        flag,
        type=_converter(field),
        action=_Extend if metadata.get("many") else "store",
        choices=choices,
        metavar=metadata.get("metavar") or ("N" if is_number else None),
        help=metadata["help"] + suffix,
    )


class _Extend(argparse.Action):
    """Adds the values of each occurrence of the flag to one list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *values])


# ---- Values


def _make_config(flags: Values, environment: Environment) -> Config:
    """Flags win over variables, and --overrides wins over variables too."""
    values = dict(flags)
    for field in dataclasses.fields(Config):
        variable = f"LLMSRV_{field.name.upper()}"
        if field.name not in flags and (text := environment.get(variable)) is not None:
            values[field.name] = _variable_value(field, variable, text)
    return Config(**values | _overrides(values.get("overrides", ""), flags))


def _variable_value(field: "dataclasses.Field[Any]", variable: str, text: str) -> Any:
    if field.type is bool:
        if text.lower() not in ("0", "1", "true", "false", ""):
            raise OptionError(f"{variable}: expected 1, 0, true or false, got '{text}'")
        return text.lower() in ("1", "true")
    try:
        value = _converter(field)(text)
    except argparse.ArgumentTypeError as error:
        raise OptionError(f"{variable}: {error}") from None
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        allowed = ", ".join(map(str, choices))
        raise OptionError(f"{variable}: expected one of {allowed}, got '{text}'")
    return value


def _overrides(overrides: str, flags: Values) -> Values:
    """The values in `K=V;K=V`; none of them may also be given as a flag."""
    known = {each.name: each for each in dataclasses.fields(Config) if "overrides" in each.metadata}
    values: Values = {}
    for pair in filter(None, map(str.strip, overrides.split(";"))):
        name, _, text = map(str.strip, pair.partition("="))
        if name not in known:
            names = ", ".join(known)
            raise OptionError(f"--overrides: expected K=V with one of {names}, got '{pair}'")
        if name in flags or name in values:
            raise OptionError(f"--overrides: {name} is given twice")
        try:
            values[name] = _converter(known[name])(text)
        except argparse.ArgumentTypeError as error:
            raise OptionError(f"--overrides: {name}: {error}") from None
    return values


def _converter(field: "dataclasses.Field[Any]") -> Any:
    """Turns an option's text into its value; raises ArgumentTypeError if it cannot."""
    if field.metadata.get("many"):
        return _list
    if field.type in (int, float):
        least, most = field.metadata.get("least", -math.inf), field.metadata.get("most", 10**9)
        return lambda text: _number(field.type, text, least, most)
    return Path if field.type is Path else str


def _list(text: str) -> list[str]:
    """A JSON list of strings, or names separated by commas."""
    if not text.lstrip().startswith("["):
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        names = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not a JSON list: {error}") from None
    if not all(isinstance(name, str) for name in names):
        raise argparse.ArgumentTypeError(f"expected a JSON list of strings, got {text}")
    return list(names)


def _number(type: Any, text: str, least: float, most: float) -> float:
    try:
        number: float = type(text)
    except ValueError:
        kind = "whole number" if type is int else "number"
        raise argparse.ArgumentTypeError(f"expected a {kind}, got '{text}'") from None
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"expected {least} to {most}, got {number}")
    return number
