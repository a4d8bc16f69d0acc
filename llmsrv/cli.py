"""The command line: serves a model or runs another command, and returns an exit code.

Module-level imports are limited to the standard library and ground modules, so that --help is quick
and a missing package is reported in a sentence instead of a traceback.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

from llmsrv.config import Config
from llmsrv.errors import StartupError
from llmsrv.options import Environment
from llmsrv.options import make_parser
from llmsrv.options import parse_options
from llmsrv.version import __version__

EXIT_INTERRUPTED = 130  # 128 + SIGINT, the shells' convention

EPILOG = """\
Every option can also be set in the environment: --api-key is LLMSRV_API_KEY, and so on.
A flag wins over the environment.  LIST is a JSON list or names separated by commas.

Examples:
  python llmsrv.py                                   serve the default model on port 8000
  python llmsrv.py --model model.gguf --port 8001    serve a GGUF file
  python llmsrv.py --model hf:org/name               serve a model from the Hugging Face hub
  python llmsrv.py --model a=a.gguf --model b=b.gguf serve two models named a and b

Commands (each has its own --help):
  pull NAME    download a model into the cache, or update it
  models       list the models in the cache
  rm NAME      remove a model from the cache
  selftest     check and measure the backend on this machine
"""
BACKEND_OPTIONS = tuple(each.name for each in fields(Config) if "backend" in each.metadata)
# Command -> its description and its options.
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pull": ("Download a model into the cache, or update it.", ("hf_token", "cache_dir")),
    "models": ("List the models in the cache.", ("cache_dir",)),
    "rm": ("Remove a model from the cache.", ("cache_dir",)),
    "selftest": (
        "Check every kernel of the backend and whole models on this machine, and measure them.",
        ("backend", *BACKEND_OPTIONS, "cache_dir", "log_level"),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0 after a normal stop, 1 if it cannot run, and 2 for bad
    usage."""
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
    if command == "selftest":
        from llmsrv.selftest.command import selftest

        return selftest(config)
    from llmsrv import commands

    run = {"pull": commands.pull, "models": commands.models, "rm": commands.rm}[command]
    run(config)
    return 0


def parse(arguments: Sequence[str], environment: Environment) -> Config:
    """The server's options; on bad usage argparse prints it and exits with 2."""
    parser = make_parser(
        "llmsrv",
        "Serve a large language model through OpenAI's REST API.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llmsrv {__version__}")
    return parse_options(parser, arguments, environment)


def parse_command(command: str, arguments: Sequence[str], environment: Environment) -> Config:
    """As parse(), for a command; the model it names is `model`."""
    description, options = COMMANDS[command]
    parser = make_parser(f"llmsrv {command}", description, options)
    if command not in ("models", "selftest"):
        parser.add_argument("model", nargs=1, metavar="NAME", help="a name that --model accepts")
    return parse_options(parser, arguments, environment)
