"""Time from the command until llmsrv is ready, with the model cached, and memory of its processes.

python -m bench.start [RUNS] [server options...]
"""

import os
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from bench.machine import describe
from bench.machine import pss_mb
from bench.servers import ROOT
from bench.servers import stop


def start(options: list[str]) -> tuple[float, float, float]:
    """Seconds until ready; MB of the server and of the engine after one short request."""
    start_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "llmsrv.py", "--port", "0", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"ready at (\S+) with (\S+)", line):
                break
        else:
            raise SystemExit("the server exited before it was ready")
        ready_s = time.perf_counter() - start_s
        complete(match[1], match[2])
        return ready_s, pss_mb(process.pid), pss_mb(engine_pid(process.pid))
    finally:
        stop(process)


def complete(url: str, model: str) -> None:
    body = b'{"model": "%s", "prompt": "Hello", "max_tokens": 16}' % model.encode()
    request = urllib.request.Request(
        f"{url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).read()


def engine_pid(server_pid: int) -> int:
    children = Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text().split()
    for child in children:
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise SystemExit("no engine process found")


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(describe())
    os.environ.setdefault("LLMSRV_LOG_LEVEL", "error")
    start(sys.argv[2:])  # fills the page cache and writes Python's bytecode
    results = [start(sys.argv[2:]) for _ in range(runs)]
    ready, server, engine = (statistics.median(column) for column in zip(*results))
    print(f"ready after {ready:.2f} s (median of {runs}; best {min(r[0] for r in results):.2f})")
    print(f"memory: server {server:.0f} MB, engine {engine:.0f} MB (PSS, after one request)")


if __name__ == "__main__":
    main()
