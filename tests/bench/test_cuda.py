"""bench.cuda: a part that fails leaves the others, and all results are kept as they come."""

import json
import sys

import pytest

from bench.cuda import Part
from bench.cuda import Run
from bench.cuda import emulated_parts
from bench.cuda import parts
from bench.cuda_table import table
from tests.support.cuda import needs_emulation

LIMITS = {"part": "limits", "copy": 4e12, "read": 4e12, "product": 8e14}
OURS = {
    "backend": "llmsrv cuda",
    "part": "decode",
    "shape": "8B",
    "type": "BF16",
    "streams": 1,
    "mode": "greedy",
    "rate": 200.0,
    "step_bytes": 16e9,
}
PEER = {"peer": "PyTorch 2", "part": "decode", "shape": "8B", "streams": 1}


def python(name, code, limit_s=20.0):
    return Part(name, [sys.executable, "-c", code], limit_s)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, budget_s=60)


def saved(tmp_path):
    return json.loads((tmp_path / "results.json").read_text())


@pytest.mark.slow
def test_results_are_kept_as_they_come_and_parts_may_fail_or_hang(run, tmp_path):
    run.run(python("good", f"print({json.dumps(LIMITS)!r})"))
    run.run(python("broken", "print('{\"half'); raise SystemExit(3)"))
    run.run(python("hanging", f"print({json.dumps(OURS)!r}); import time; time.sleep(60)", 2.0))
    run.run(Part("missing", ["no-such-program"], 5))
    run.run(python("last", "print('{\"part\": \"last\"}')"))
    assert saved(tmp_path)["results"] == [LIMITS, OURS, {"part": "last"}]
    outcomes = [text.partition(" after")[0] for text in saved(tmp_path)["outcomes"].values()]
    assert outcomes == [
        "ended well", "FAILED (3)", "stopped", "not run: there is no no-such-program", "ended well"
    ]
    assert '{"half' in (tmp_path / "log.txt").read_text()


def test_no_part_starts_when_the_budget_is_spent(tmp_path):
    run = Run(tmp_path, budget_s=0)
    run.run(python("late", "print(1)"))
    assert saved(tmp_path)["outcomes"] == {"late": "not run: no time left"}


def test_the_table_compares_with_the_fastest_peer_and_with_the_limits():
    peers = [PEER | {"mode": "eager", "rate": 50.0}, PEER | {"mode": "graph", "rate": 160.0}]
    failed = PEER | {"mode": "compiled graph", "error": "no compiler"}
    *_, line = table([LIMITS, *peers, failed, OURS])
    assert line.split() == ["8B", "BF16", "1", "greedy", "200", "80%", "160", "1.25", "graph"]
    assert list(table([])) == []


def test_the_most_telling_parts_come_first():
    names = [part.name for part in parts()]
    assert names[:3] == ["machine", "limits", "selftest-bfloat16"]
    assert names[-2:] == ["memcheck", "racecheck"]


@pytest.mark.slow
@needs_emulation
def test_the_script_can_be_tried_on_the_emulation(run):
    [part] = (part for part in emulated_parts() if part.name == "plan-tiny-Q4_K")
    run.run(part)
    assert run.outcomes[part.name].startswith("ended well")
    assert [each["part"] for each in run.results] == ["load", "decode", "decode", "prefill"]
