"""How the server does under load, seen from its clients: tokens a second, time to the first token,
time between tokens.

python -m bench.serve [--streams 1,4,8,16,32] [--prompt 131] [--output 64] [--rounds 3]
                      [--arriving 1000] [--url URL --model NAME] [--json PATH] [--plot PATH]
                      [-- server options]

Each stream is a connection of its own; prompts are random words, distinct, so that no prefix cache
helps.  With --arriving each line is followed by one that begins with "+": the same streams, while
further prompts of so many words are sent, one after the other.  With --again every round is sent
twice, and the second time counts: its prompts are in the prefix cache.  With --url another server
is measured.
"""

import argparse
import asyncio
import contextlib
import json
import random
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.machine import describe
from bench.results import add_options
from bench.results import write

ROOT = Path(__file__).parent.parent


@dataclass
class Result:
    """What one round of requests saw; times in seconds."""

    wall_s: float = 0.0
    num_tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    url: str
    model: str
    num_prompt_words: int
    num_output_tokens: int


async def one_request(load: Load, words: random.Random, result: Result) -> None:
    prompt = " ".join(words.choice(WORDS) for _ in range(load.num_prompt_words))
    body = json.dumps(
        {
            "model": load.model,
            "prompt": prompt,
            "max_tokens": load.num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    parts = urlsplit(load.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    reset_at_once = struct.pack("ii", 1, 0)  # when this is cancelled, so that the server stops
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_at_once)
    with contextlib.closing(writer):
        begun_s = last_s = time.perf_counter()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        num_events = 0
        async for line in reader:
            if line.startswith(b"data: {"):
                now_s = time.perf_counter()
                (result.between_s if num_events else result.first_s).append(now_s - last_s)
                last_s = now_s
                num_events += 1
            elif line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                raise SystemExit(f"the server says {line.decode()}{(await reader.read()).decode()}")
    result.num_tokens += load.num_output_tokens
    result.wall_s = max(result.wall_s, time.perf_counter() - begun_s)


async def one_round(load: Load, num_streams: int, round: int, num_arriving: int = 0) -> Result:
    """num_arriving: words of the prompts that are sent beside the streams; 0: there are none."""
    result = Result()

    async def stream(number: int) -> None:
        await one_request(load, random.Random(f"{round} {num_streams} {number}"), result)

    async def arrive() -> None:
        words = random.Random(f"{round} {num_streams} arriving")
        while num_arriving:
            await one_request(Load(load.url, load.model, num_arriving, 1), words, Result())

    arriving = asyncio.create_task(arrive())
    begun_s = time.perf_counter()
    await asyncio.gather(*(stream(number) for number in range(num_streams)))
    result.wall_s = time.perf_counter() - begun_s
    arriving.cancel()
    await asyncio.wait({arriving})
    return result


def figures(results: list[Result]) -> dict[str, float]:
    """Medians over the rounds; the 99th percentile over all of them."""
    between_s = sorted(s for r in results for s in r.between_s)
    return {
        "output tok/s": statistics.median(r.num_tokens / r.wall_s for r in results),
        "first token, ms": 1e3 * statistics.median(s for r in results for s in r.first_s),
        "between, p50 ms": 1e3 * between_s[len(between_s) // 2],
        "between, p99 ms": 1e3 * between_s[len(between_s) * 99 // 100],
    }


@contextlib.contextmanager
def our_server(options: list[str]) -> Iterator[str]:
    """Starts llmsrv on a free port; yields its URL."""
    process = subprocess.Popen(
        [sys.executable, "llmsrv.py", "--port", "0", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        print(line := process.stdout.readline().strip())
        yield line.partition("ready at ")[2].partition(" ")[0]
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    server_options = sys.argv[len(own) + 2 :]
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", default="1,4,8,16,32")
    parser.add_argument("--prompt", type=int, default=131, help="words, about as many tokens")
    parser.add_argument("--output", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arriving", type=int, default=0, help="words of prompts beside them")
    parser.add_argument("--again", action="store_true", help="prompts sent before")
    parser.add_argument("--url")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    add_options(parser)
    options = parser.parse_args(own)
    print(describe())
    server = contextlib.nullcontext(options.url) if options.url else our_server(server_options)
    with server as url:
        load = Load(url, options.model, options.prompt, options.output)
        asyncio.run(one_round(load, 1, -1))
        rows: list[dict[str, Any]] = []
        print("streams  output tok/s  first token, ms  between, p50  between, p99")
        for num_streams in map(int, options.streams.split(",")):
            for num_arriving in sorted({0, options.arriving}):
                results = []
                for round in range(options.rounds):
                    if options.again:
                        asyncio.run(one_round(load, num_streams, round))
                    results.append(
                        asyncio.run(one_round(load, num_streams, round, num_arriving))
                    )
                arriving = "+" * bool(num_arriving)
                found = figures(results)
                rows.append({"server": options.model + arriving, "streams": num_streams, **found})
                rate, first_ms, p50_ms, p99_ms = found.values()
                label = arriving + str(num_streams)
                print(
                    f"{label:>7} {rate:14.1f} {first_ms:15.1f} {p50_ms:12.2f} {p99_ms:12.2f}",
                    flush=True,
                )
    write(options, rows)


# Frequent words that are one token each in most vocabularies.
WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him "
    "into time has look two more write go see number no way could people my than first water been"
).split()

if __name__ == "__main__":
    main()
