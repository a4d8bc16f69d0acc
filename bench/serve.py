"""How a server performs under load, as its clients see it: output tokens per second, time to the
first token, time between tokens.

python -m bench.serve [--streams 1,4,8,16,32] [--prompt 131] [--output 64] [--rounds 3]
                      [--arriving 1000 | --long-prompt 3000] [--again] [--url URL --model NAME]
                      [--json PATH] [--plot PATH] [-- server options]

Each stream has its own connection.  Every prompt is a different sequence of random words, so that
no prefix cache helps.  With --again each round is sent twice and only the second time counts: its
prompts are in the prefix cache.

With --arriving a second line follows each line, marked "+": the same streams while other clients
send prompts of this many words, one after the other.

With --long-prompt the table is another one: how long a prompt of this many words takes alone and
next to the streams, and how long the streams wait for their tokens meanwhile.
"""

import argparse
import asyncio
import contextlib
import json
import random
import socket
import statistics
import struct
import sys
import time
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from urllib.parse import urlsplit

from bench.machine import describe
from bench.results import add_options
from bench.results import write_results
from bench.servers import run_llmsrv


@dataclass
class RoundResult:
    """What the clients of one round saw.

    first_s    from each request to its first event
    between_s  from each event to the next; with speculation an event may carry several tokens
    next_s     when each of these next events arrived, by time.perf_counter()
    """

    wall_s: float = 0.0
    num_tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    next_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Workload:
    """The requests to send, and where."""

    url: str
    model: str
    num_prompt_words: int
    num_output_tokens: int


async def send_request(workload: Workload, words: random.Random, result: RoundResult) -> None:
    """Streams one completion and adds its times to `result`."""
    prompt = " ".join(words.choice(WORDS) for _ in range(workload.num_prompt_words))
    body = json.dumps(
        {
            "model": workload.model,
            "prompt": prompt,
            "max_tokens": workload.num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    parts = urlsplit(workload.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    # If this task is cancelled, close by a reset, so that the server notices at once and stops.
    linger_0_s = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_0_s)
    with contextlib.closing(writer):
        last_s = time.perf_counter()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        num_events = 0
        async for line in reader:
            if line.startswith(b"data: {"):
                now_s = time.perf_counter()
                (result.between_s if num_events else result.first_s).append(now_s - last_s)
                result.next_s += [now_s] * (num_events > 0)
                last_s = now_s
                num_events += 1
            elif line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                raise SystemExit(f"error: {line.decode()}{(await reader.read()).decode()}")
    result.num_tokens += workload.num_output_tokens


async def run_round(
    workload: Workload, num_streams: int, round_index: int, num_arriving_words: int = 0
) -> RoundResult:
    """Sends one request on each of num_streams connections at once.

    round_index         seeds the prompts
    num_arriving_words  length of the prompts that another client sends meanwhile; 0: none
    """
    result = RoundResult()

    async def stream(number: int) -> None:
        await send_request(workload, random.Random(f"{round_index} {num_streams} {number}"), result)

    async def send_arriving() -> None:
        words = random.Random(f"{round_index} {num_streams} arriving")
        arriving_prompt = Workload(workload.url, workload.model, num_arriving_words, 1)
        while num_arriving_words:
            await send_request(arriving_prompt, words, RoundResult())

    arriving = asyncio.create_task(send_arriving())
    start_s = time.perf_counter()
    await asyncio.gather(*(stream(number) for number in range(num_streams)))
    result.wall_s = time.perf_counter() - start_s
    arriving.cancel()
    await asyncio.wait({arriving})
    return result


def summarize(results: list[RoundResult]) -> dict[str, float]:
    """Medians over the rounds; the 99th percentile is that of all rounds together."""
    between_s = sorted(s for r in results for s in r.between_s)
    return {
        "output tok/s": statistics.median(r.num_tokens / r.wall_s for r in results),
        "first token, ms": 1e3 * statistics.median(s for r in results for s in r.first_s),
        "inter-token p50, ms": 1e3 * between_s[len(between_s) // 2],
        "inter-token p99, ms": 1e3 * between_s[len(between_s) * 99 // 100],
    }


def measure(
    workload: Workload, num_streams: int, rounds: int, num_arriving_words: int, is_cached: bool
) -> dict[str, float]:
    """is_cached: each round's prompts are sent once before the round that counts."""
    results = []
    for i in range(rounds):
        if is_cached:
            asyncio.run(run_round(workload, num_streams, i))
        results.append(asyncio.run(run_round(workload, num_streams, i, num_arriving_words)))
    return summarize(results)


async def time_long_prompt(
    workload: Workload, num_streams: int, round_index: int, num_words: int
) -> tuple[float, list[float]]:
    """Seconds that a prompt of num_words takes, and seconds between the events of the streams.

    All num_streams streams begin before the prompt and continue until it is computed.
    """
    seed = f"{round_index} {num_streams} long"
    streams = RoundResult()
    endless = Workload(workload.url, workload.model, workload.num_prompt_words, MAX_STREAM_TOKENS)

    async def stream(number: int) -> None:
        words = random.Random(f"{seed} {number}")
        while True:
            await send_request(endless, words, streams)

    tasks = [asyncio.create_task(stream(number)) for number in range(num_streams)]
    while len(streams.between_s) < SETTLE_EVENTS * num_streams or len(streams.first_s) < len(tasks):
        await asyncio.sleep(0.01)
    prompt = Workload(workload.url, workload.model, num_words, 1)
    start_s = time.perf_counter()
    await send_request(prompt, random.Random(seed), RoundResult())
    end_s = time.perf_counter()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0.5)  # the server notices that they are gone
    events = zip(streams.between_s, streams.next_s, strict=True)
    return end_s - start_s, [between_s for between_s, at_s in events if start_s < at_s < end_s]


def measure_long_prompt(
    workload: Workload, numbers: list[int], rounds: int, num_words: int
) -> list[dict[str, float]]:
    """A row for the prompt alone, and one for each number of streams; medians over the rounds, the
    gaps are those of all rounds together."""
    times: dict[int, list[float]] = {number: [] for number in (0, *numbers)}
    gaps: dict[int, list[float]] = {number: [] for number in times}
    for i in range(rounds):
        for number in times:
            prompt_s, between_s = asyncio.run(time_long_prompt(workload, number, i, num_words))
            times[number].append(prompt_s)
            gaps[number] += between_s
    alone_s = statistics.median(times[0])
    rows = []
    for number, prompts_s in times.items():
        between_s = sorted(gaps[number]) or [0.0]
        rows.append(
            {
                "streams": number,
                "prompt, s": statistics.median(prompts_s),
                "by alone": statistics.median(prompts_s) / alone_s,
                "inter-token p50, ms": 1e3 * between_s[len(between_s) // 2],
                "inter-token p99, ms": 1e3 * between_s[len(between_s) * 99 // 100],
                "longest, ms": 1e3 * between_s[-1],
            }
        )
    return rows


def print_long_prompt(rows: list[dict[str, float]]) -> None:
    print("streams  prompt, s  by alone  inter-token p50, ms  p99, ms  longest, ms")
    for row in rows:
        number, prompt_s, ratio, p50_ms, p99_ms, longest_ms = row.values()
        print(
            f"{number:7} {prompt_s:10.2f} {ratio:9.2f} {p50_ms:20.1f} {p99_ms:8.1f} "
            f"{longest_ms:12.1f}"
        )


def main() -> None:
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    server_options = sys.argv[len(own) + 2 :]
    options = parse(own)
    print(describe())
    server = contextlib.nullcontext(options.url) if options.url else run_llmsrv(server_options)
    with server as url:
        workload = Workload(url, options.model, options.prompt, options.output)
        asyncio.run(run_round(workload, 1, -1))  # warm up
        if options.long_prompt:
            numbers = list(map(int, options.streams.split(",")))
            print_long_prompt(
                measure_long_prompt(workload, numbers, options.rounds, options.long_prompt)
            )
            return
        rows: list[dict[str, Any]] = []
        print("streams  output tok/s  first token, ms  inter-token p50, ms  p99, ms")
        for num_streams in map(int, options.streams.split(",")):
            for num_words in sorted({0, options.arriving}):
                summary = measure(workload, num_streams, options.rounds, num_words, options.again)
                mark = "+" * bool(num_words)
                rows.append({"server": options.model + mark, "streams": num_streams, **summary})
                rate, first_ms, p50_ms, p99_ms = summary.values()
                label = f"{mark}{num_streams}"
                print(
                    f"{label:>7} {rate:13.1f} {first_ms:16.1f} {p50_ms:20.2f} {p99_ms:8.2f}",
                    flush=True,
                )
    write_results(options, rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        epilog="Options after -- are those of the llmsrv that is started if there is no --url."
    )
    add_workload_options(parser, rounds=3)
    parser.add_argument(
        "--arriving",
        type=int,
        default=0,
        help="also measure while prompts of this many words arrive",
    )
    parser.add_argument(
        "--long-prompt",
        type=int,
        default=0,
        help="measure one prompt of this many words alone and next to the streams",
    )
    parser.add_argument("--again", action="store_true", help="measure with cached prompts")
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    add_options(parser)
    return parser.parse_args(arguments)


def add_workload_options(
    parser: argparse.ArgumentParser, rounds: int, streams: str = "1,4,8,16,32"
) -> None:
    parser.add_argument("--streams", default=streams, help="numbers of simultaneous requests")
    parser.add_argument("--prompt", type=int, default=131, help="words, about as many tokens")
    parser.add_argument("--output", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=rounds)


# With --long-prompt: the output of a stream, and events that each stream has before the prompt.
MAX_STREAM_TOKENS, SETTLE_EVENTS = 4000, 20
# Frequent words that are one token each in most vocabularies.
WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him "
    "into time has look two more write go see number no way could people my than first water been"
).split()

if __name__ == "__main__":
    main()
