"""The command selftest."""

import functools
from pathlib import Path

from llmsrv import log
from llmsrv.backend.choose import run_on_backend
from llmsrv.config import Config
from llmsrv.config import engine_config
from llmsrv.selftest.run import run_selftest

# Programs here run only a few steps, so what prepares for many is wasted.
OWN_OPTIONS = {"cuda": {"warms_up": False}}


def selftest(config: Config) -> int:
    """Prints the report; the exit code is 1 if anything is wrong.

    Raises StartupError if the backend cannot run here.
    """
    tear_down = log.set_up(config.log_level)
    try:
        options = engine_config(config, Path(), None).backend_options
        for name, own in OWN_OPTIONS.items():
            options[name] = options.get(name, {}) | own
        backend, _, _ = run_on_backend(
            config.backend, options, config.cache_dir, lambda backend: None
        )
        report = run_selftest(backend, functools.partial(print, flush=True))
    finally:
        tear_down()
    return 1 if report.num_faults else 0
