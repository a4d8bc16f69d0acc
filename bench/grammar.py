"""What a grammar costs: decode speed under several grammars, compared with decode without one.

python -m bench.grammar [--tokens N] [--runs N] [--threads N] [--model PATH]

Runs the engine in this process with 1, 8 and 32 streams of N tokens each.  Each run decodes without
a grammar, then with one that allows any text, with a JSON schema of records, and with an array of
any JSON.  Figures are medians over the runs: tokens per second, and the shares that are left of the
tokens per second, and per second of CPU time, of decode without a grammar.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

from bench.machine import describe
from llmsrv.backend.base import Limits
from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.config import DEFAULT_MODEL
from llmsrv.config import default_cache_dir
from llmsrv.engine.core import EngineCore
from llmsrv.engine.grammar import GrammarCompiler
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.files.source import resolve_model
from llmsrv.model.load import load_model
from llmsrv.text.grammar import json_schema_source
from llmsrv.text.grammar import load_ll_tokenizer
from llmsrv.text.grammar import regex_source

LIMITS = Limits(max_rows=512, max_logit_rows=64, max_slots=32, num_blocks=1025)
CONTEXT_LENGTH = 2048
STREAMS = (1, 8, 32)
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "kind": {"enum": ["person", "place", "thing"]},
        "year": {"type": "integer"},
        "notes": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "kind", "year", "notes"],
    "additionalProperties": False,
}
GRAMMARS = {
    "none": "",
    "text": regex_source(r"(.|\n)*"),
    "records": json_schema_source({"type": "array", "items": RECORD, "minItems": 1000}),
    "any": json_schema_source({"type": "array", "minItems": 1000}),
}


class Engine:
    """The engine without its process."""

    def __init__(self, path: Path, threads: int) -> None:
        program = load_model(path, lambda: None).program
        options = CPUOptions(default_cache_dir(), threads)
        plan = CPUBackend(options).compile(program, LIMITS, lambda: None)
        grammars = GrammarCompiler(
            lambda: load_ll_tokenizer(path, default_cache_dir(), program.vocab_size),
            program.vocab_size,
        )
        self._core = EngineCore(
            plan,
            LIMITS,
            CONTEXT_LENGTH,
            program.vocab_size,
            compile_grammar=grammars.compile,
        )
        self._num_requests = 0

    def rates(self, grammar: str, num_streams: int, num_tokens: int) -> tuple[float, float]:
        """Tokens per second, and per second of CPU time, once all streams are admitted."""
        for seed in range(num_streams):
            self._num_requests += 1
            prompt_ids = list(range(1000 + seed, 1064 + seed))
            submit = Submit(
                self._num_requests, prompt_ids, num_tokens, [], Sampling(seed), grammar=grammar
            )
            self._core.submit(submit)
        num_started = 0
        while num_started < num_streams:
            num_started += len(self._core.step().admitted)
        start_s, start_cpu_s, num_generated = time.perf_counter(), time.process_time(), 0
        while self._core.has_work:
            num_generated += sum(len(tokens.ids) for tokens in self._core.step().tokens)
        return (
            num_generated / (time.perf_counter() - start_s),
            num_generated / (time.process_time() - start_cpu_s),
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    path = arguments.model or resolve_model(DEFAULT_MODEL, default_cache_dir(), sys.stderr)
    engine = Engine(path, arguments.threads)
    print(describe())
    print(f"{'streams':>7} {'grammar':>8} {'tokens/s':>9} {'share':>6} {'share, CPU time':>16}")
    for num_streams in STREAMS:
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in GRAMMARS}
        for _ in range(arguments.runs):
            for name, grammar in GRAMMARS.items():
                rates[name].append(engine.rates(grammar, num_streams, arguments.tokens))
        for name, pairs in rates.items():
            rate = statistics.median(rate for rate, _ in pairs)
            shares = [
                statistics.median(pair[i] / none[i] for pair, none in zip(pairs, rates["none"]))
                for i in (0, 1)
            ]
            row = f"{num_streams:>7} {name:>8} {rate:>9.0f} {shares[0]:>6.2f} {shares[1]:>16.2f}"
            print(row, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()
