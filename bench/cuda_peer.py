"""PyTorch on the same shapes, as the peer of bench.cuda; also the device's limits.

python -m bench.cuda_peer limits
python -m bench.cuda_peer speed SHAPE [--streams 1,8,32,128] [--prompts 1000,8000] [--device cuda]

A llama in bfloat16, as a user of PyTorch would write it to be fast: q, k and v are one product, so
are gate and up; the KV cache is static; attention is scaled_dot_product_attention.  Decode runs
eagerly, as a CUDA graph, and as a CUDA graph of layers that torch.compile has fused.  The graphs
replay one position, with a cache of exactly its length, which favours the peer.  Each result is one
line of JSON.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.shapes import SHAPES
from bench.shapes import Shape

MODES = "eager", "graph", "compiled graph"
CONTEXT_TOKENS = 1024  # in the cache before a decode step
WARM_UP = 3
MIN_S = 0.3  # duration of one measurement
COPY_BYTES = 4 << 30
PRODUCT_SIZE = 8192
EPS = 1e-5


class Layer(NamedTuple):
    attention_norm: torch.Tensor
    qkv: torch.Tensor
    attention_output: torch.Tensor
    feed_forward_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    keys: torch.Tensor  # [streams, num_kv_heads, max_length, head_dim]
    values: torch.Tensor


class Llama:
    """Random weights and a cache for `num_streams` sequences of at most `max_length` tokens."""

    def __init__(self, shape: Shape, num_streams: int, max_length: int, device: str) -> None:
        self.shape = shape
        self.device = device
        hidden, inner = shape.hidden_size, shape.intermediate_size
        q_size = shape.num_heads * shape.head_dim
        cache = num_streams, shape.num_kv_heads, max_length, shape.head_dim
        self.layers = [
            Layer(
                self._ones(hidden),
                self._random(shape.qkv_size, hidden),
                self._random(hidden, q_size),
                self._ones(hidden),
                self._random(2 * inner, hidden),
                self._random(hidden, inner),
                self._random(*cache),
                self._random(*cache),
            )
            for _ in range(shape.num_layers)
        ]
        self.embedding = self._random(shape.vocab_size, hidden)
        self.norm = self._ones(hidden)
        tied = self.embedding
        self.output = tied if shape.is_tied else self._random(shape.vocab_size, hidden)
        pairs = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        angles = torch.arange(max_length, device=device)[:, None] * 500000.0**-pairs
        angles = torch.cat([angles, angles], dim=1)
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device=self.device) * 0.02

    def _ones(self, size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16, device=self.device)

    def forward(self, ids: torch.Tensor, start: int, run_layer: Callable[..., Any]) -> torch.Tensor:
        """The next id of each stream, greedily.

        ids    [streams, T], the tokens from position `start` on
        Returns [streams, 1].
        """
        length = ids.shape[1]
        positions = slice(start, start + length)
        cos, sin = self.cos[positions], self.sin[positions]
        x = F.embedding(ids, self.embedding)  # [streams, T, hidden]
        for layer in self.layers:
            x = run_layer(x, layer, cos, sin, start, self.shape)
        last = F.rms_norm(x[:, -1:], self.norm.shape, self.norm, EPS)
        return F.linear(last, self.output).argmax(dim=-1)


def run_layer(
    x: torch.Tensor, layer: Layer, cos: torch.Tensor, sin: torch.Tensor, start: int, shape: Shape
) -> torch.Tensor:
    streams, length, _ = x.shape
    end = start + length
    normed = F.rms_norm(x, layer.attention_norm.shape, layer.attention_norm, EPS)
    qkv = F.linear(normed, layer.qkv).view(streams, length, -1, shape.head_dim).transpose(1, 2)
    sizes = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    q, k, v = qkv.split(sizes, dim=1)  # [streams, heads, T, head_dim]
    layer.keys[:, :, start:end] = rotate(k, cos, sin)
    layer.values[:, :, start:end] = v
    attended = F.scaled_dot_product_attention(
        rotate(q, cos, sin),
        layer.keys[:, :, :end],
        layer.values[:, :, :end],
        is_causal=length > 1,  # a prompt starts at position 0
        enable_gqa=True,
    )
    attended = attended.transpose(1, 2).reshape(streams, length, -1)
    x = x + F.linear(attended, layer.attention_output)
    normed = F.rms_norm(x, layer.feed_forward_norm.shape, layer.feed_forward_norm, EPS)
    gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, layer.down)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# ---- Measurements


def decode_rate(model: Llama, num_streams: int, mode: str) -> float:
    """Tokens per second of all streams together."""
    ids = torch.ones((num_streams, 1), dtype=torch.int64, device=model.device)
    layer = torch.compile(run_layer, dynamic=False) if "compiled" in mode else run_layer

    def step() -> None:
        model.forward(ids, CONTEXT_TOKENS, layer)

    run = captured(step) if "graph" in mode and model.device == "cuda" else step
    return num_streams / seconds(run, model.device)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Replays `run` as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds(run: Callable[[], Any], device: str) -> float:
    """Median over at least five runs and MIN_S."""
    for _ in range(WARM_UP):
        run()
    wait(device)
    times: list[float] = []
    while len(times) < 5 or sum(times) < MIN_S:
        start_s = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def speed(shape: Shape, stream_counts: list[int], prompts: list[int], device: str) -> None:
    for num_streams in stream_counts:
        model = Llama(shape, num_streams, CONTEXT_TOKENS + 1, device)
        for mode in MODES:
            values = dict(part="decode", shape=shape.name, streams=num_streams, mode=mode)
            try:
                report(**values, rate=decode_rate(model, num_streams, mode))
            except Exception as error:  # a mode that fails leaves the others
                report(**values, error=f"{type(error).__name__}: {error}")
        del model
    for length in prompts:
        model = Llama(shape, 1, length, device)
        ids = torch.ones((1, length), dtype=torch.int64, device=device)
        took_s = seconds(functools.partial(model.forward, ids, 0, run_layer), device)
        report(part="prefill", shape=shape.name, tokens=length, mode="eager", rate=length / took_s)
        del model


def limits(device: str, num_bytes: int, size: int) -> None:
    """Bytes per second of a copy, read plus written, and of a sum, which only reads; FLOP per
    second of a bfloat16 product."""
    source = torch.randint(0, 255, (num_bytes // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = seconds(lambda: target.copy_(source), device)
    floats = source.view(torch.int32)
    read_s = seconds(lambda: floats.amax(), device)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in "ab")
    product_s = seconds(lambda: a @ b, device)
    report(
        part="limits",
        copy=num_bytes / copy_s,
        read=source.nbytes / read_s,
        product=2 * size**3 / product_s,
    )


def report(**values: Any) -> None:
    print(json.dumps({"peer": f"PyTorch {torch.__version__}", **values}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("limits", "speed"))
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="tiny")
    parser.add_argument("--streams", default="1,8,32,128")
    parser.add_argument("--prompts", default="1000,8000")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    with torch.inference_mode():
        if options.part == "limits":
            scale = 1 if options.device == "cuda" else 64
            limits(options.device, COPY_BYTES // scale, PRODUCT_SIZE // scale)
        else:
            streams, prompts = (
                [int(number) for number in filter(None, text.split(","))]
                for text in (options.streams, options.prompts)
            )
            speed(SHAPES[options.shape], streams, prompts, options.device)


if __name__ == "__main__":
    main()
