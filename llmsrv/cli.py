"""The command line: options from flags, environment and defaults, and one exit code for each end.

The top imports the standard library only, so that --help is quick and a missing package is a
sentence and not a traceback.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmsrv.config import Config
from llmsrv.errors import StartupError
from llmsrv.version import __version__

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
Environment = Mapping[str, str]

EPILOG = """\
Each option can also be set in the environment: --api-key as LLMSRV_API_KEY, and so on.
LIST is a JSON list or names separated by commas.

  python llmsrv.py                                   serve the default model on port 8000
  python llmsrv.py --model model.gguf --port 8001    serve a file
  python llmsrv.py --model hf:org/name               serve a model of the Hugging Face hub
  python llmsrv.py --model a=a.gguf --model b=b.gguf serve two models, called a and b

Commands, each with its own --help:
  pull NAME    fetch a model into the cache, or bring it up to date
  models       list the models in the cache
  rm NAME      remove a model from the cache
"""
# Command -> what it does, and the options that it takes.
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pull": ("Fetch a model into the cache, or bring it up to date.", ("hf_token", "cache_dir")),
    "models": ("List the models in the cache.", ("cache_dir",)),
    "rm": ("Remove a model from the cache.", ("cache_dir",)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program: 0 when it stopped in order, 1 when it cannot run, 2 on bad usage."""
    try:
        given = sys.argv[1:] if arguments is None else arguments
        if given and given[0] in COMMANDS:
            return _run_command(given[0], given[1:])
        config = parse(given, os.environ)
        if sys.platform == "win32":
            raise StartupError("llmsrv runs on Linux and macOS; on Windows use it inside WSL 2.")
        from llmsrv.serve import serve

        return serve(config)
    except StartupError as error:
        print(f"llmsrv: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("llmsrv"):
            raise
        print(
            f"llmsrv: the Python package {error.name} is not installed; run: "
            f"{sys.executable} -m pip install .",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run_command(command: str, arguments: Sequence[str]) -> int:
    config = parse_command(command, arguments, os.environ)
    from llmsrv import commands

    run = {"pull": commands.pull, "models": commands.models, "rm": commands.rm}[command]
    run(config)
    return 0


def parse(arguments: Sequence[str], environment: Environment) -> Config:
    """The options; argparse prints usage and exits with 2 when one of them cannot be."""
    return _config(_parser(), arguments, environment)


def parse_command(command: str, arguments: Sequence[str], environment: Environment) -> Config:
    """As parse, for a command; what it names is `model`."""
    help, options = COMMANDS[command]
    parser = argparse.ArgumentParser(
        prog=f"llmsrv {command}",
        description=help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    if command != "models":
        parser.add_argument("model", nargs=1, metavar="NAME", help="a name that --model takes")
    for field in dataclasses.fields(Config):
        if field.name in options:
            _add_argument(parser, field)
    return _config(parser, arguments, environment)


def _config(
    parser: argparse.ArgumentParser, arguments: Sequence[str], environment: Environment
) -> Config:
    given = vars(parser.parse_args(arguments))
    flags = set(given)
    for field in dataclasses.fields(Config):
        variable = f"LLMSRV_{field.name.upper()}"
        if field.name not in given and (text := environment.get(variable)) is not None:
            given[field.name] = _from_environment(parser, field, variable, text)
    return Config(**given | _overrides(parser, given.get("overrides", ""), flags))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmsrv",
        description="Serve a large language model through OpenAI's REST API.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llmsrv {__version__}")
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        _add_argument(groups[name], field)
    return parser


def _add_argument(group: Any, field: "dataclasses.Field[Any]") -> None:
    facts = field.metadata
    flag = "--" + field.name.replace("_", "-")
    if field.type is bool:
        group.add_argument(flag, action="store_true", help=facts["help"])
        return
    shown = "" if field.default in (None, dataclasses.MISSING) else " (default: %(default)s)"
    group.add_argument(
        flag,
        type=_converter(field),
        action=_Extend if facts.get("many") else "store",
        choices=facts.get("choices"),
        metavar=facts.get("metavar") or ("N" if field.type in (int, float) else None),
        help=facts["help"] + shown.replace("%(default)s", str(field.default)),
    )


class _Extend(argparse.Action):
    """Each occurrence of the flag adds to the list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *values])


def _converter(field: "dataclasses.Field[Any]") -> Any:
    if field.metadata.get("many"):
        return _list
    if field.type in (int, float):
        least, most = field.metadata["least"], field.metadata.get("most", 10**9)
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


def _overrides(
    parser: argparse.ArgumentParser, overrides: str, flags: set[str]
) -> dict[str, Any]:
    """The values of K=V;K=V; they win over the environment, and none of them has a flag as well."""
    known = {each.name: each for each in dataclasses.fields(Config) if "overrides" in each.metadata}
    values = {}
    for pair in filter(None, map(str.strip, overrides.split(";"))):
        name, _, text = map(str.strip, pair.partition("="))
        if name not in known:
            parser.error(f"--overrides: expected K=V with one of {', '.join(known)}, got '{pair}'")
        if name in flags or name in values:
            parser.error(f"--overrides: {name} is given twice")
        try:
            values[name] = _converter(known[name])(text)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--overrides: {name}: {error}")
    return values


def _from_environment(
    parser: argparse.ArgumentParser, field: "dataclasses.Field[Any]", variable: str, text: str
) -> Any:
    if field.type is bool:
        if text.lower() not in ("0", "1", "true", "false", ""):
            parser.error(f"{variable}: expected 1, 0, true or false, got '{text}'")
        return text.lower() in ("1", "true")
    try:
        value = _converter(field)(text)
    except argparse.ArgumentTypeError as error:
        parser.error(f"{variable}: {error}")
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        parser.error(f"{variable}: expected one of {', '.join(choices)}, got '{text}'")
    return value
