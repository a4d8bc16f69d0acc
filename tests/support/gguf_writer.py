"""Writes small GGUF files for tests: any metadata and tensors, or a whole random llama.

Deliberately shares no code with llmsrv.files.gguf, the reader it tests.
Source: the GGUF specification, docs/gguf.md of the ggml project.
"""

import struct
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

VALUE_TYPES = {
    "UINT8": (0, "B"),
    "INT8": (1, "b"),
    "UINT16": (2, "H"),
    "INT16": (3, "h"),
    "UINT32": (4, "I"),
    "INT32": (5, "i"),
    "FLOAT32": (6, "f"),
    "BOOL": (7, "?"),
    "STRING": (8, ""),
    "ARRAY": (9, ""),
    "UINT64": (10, "Q"),
    "INT64": (11, "q"),
    "FLOAT64": (12, "d"),
}
TENSOR_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type

Array = NDArray[np.float32] | NDArray[np.float16]
RawTensor = tuple[str | int, Sequence[int], bytes]  # type, shape (rows, columns), data


@dataclass(frozen=True)
class Typed:
    """A metadata value whose type Python's own does not imply, such as Typed("INT8", -1)."""

    type: str
    value: object


def write_gguf(
    path: Path,
    metadata: Mapping[str, object],
    tensors: Mapping[str, Array | RawTensor] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
) -> Path:
    """Writes a GGUF file and returns its path.

    metadata   bool, int (UINT32), float (FLOAT32), str, bytes (a STRING, valid UTF-8 or not), a
               list of one of them (ints as INT32), or Typed; general.alignment is added if not 32
    tensors    float32 or float16 arrays, or (type, shape, bytes); shape is outermost first
    """
    entries = dict(metadata)
    if alignment != 32:
        entries.setdefault("general.alignment", alignment)
    raw = {name: _raw(tensor) for name, tensor in (tensors or {}).items()}
    head = b"GGUF" + struct.pack("<IQQ", version, len(raw), len(entries))
    head += b"".join(_string(key) + _value(value) for key, value in entries.items())
    offset = 0
    for name, (type_, shape, data) in raw.items():
        offset += -offset % alignment
        number = TENSOR_TYPES[type_] if isinstance(type_, str) else type_
        head += _string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", number, offset)
        offset += len(data)
    with path.open("wb") as file:
        file.write(head + b"\0" * (-len(head) % alignment))
        for _, _, data in raw.values():
            file.write(b"\0" * (-file.tell() % alignment))
            file.write(data)
    return path


def _raw(tensor: Array | RawTensor) -> RawTensor:
    if isinstance(tensor, tuple):
        return tensor
    return {"f4": "F32", "f2": "F16"}[tensor.dtype.str[1:]], tensor.shape, tensor.tobytes()


def _string(text: object) -> bytes:
    data = text if isinstance(text, bytes) else str(text).encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: object) -> bytes:
    if isinstance(value, list):
        first = value[0] if value else 0
        type_ = "INT32" if type(first) is int else _type_of(first)
        items = b"".join(_payload(type_, item) for item in value)
        return struct.pack("<IIQ", 9, VALUE_TYPES[type_][0], len(value)) + items
    type_ = _type_of(value)
    return struct.pack("<I", VALUE_TYPES[type_][0]) + _payload(type_, value)


def _type_of(value: object) -> str:
    if isinstance(value, Typed):
        return value.type
    return {bool: "BOOL", int: "UINT32", float: "FLOAT32"}.get(type(value), "STRING")


def _payload(type_: str, value: object) -> bytes:
    bare = value.value if isinstance(value, Typed) else value
    return _string(bare) if type_ == "STRING" else struct.pack("<" + VALUE_TYPES[type_][1], bare)


# ---- Quantizers: plain rounding, like ggml's reference; blocks of 32 values along a row.


def quantize(weight_type: str, weights: NDArray[np.float32]) -> RawTensor:
    """Quantizes float32 weights [rows, columns] to F32, F16, BF16, Q8_0, Q4_0 or Q4_1."""
    return weight_type, weights.shape, _QUANTIZERS[weight_type](weights)


def _bf16(weights: NDArray[np.float32]) -> bytes:
    bits = weights.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    return rounded.astype("<u2").tobytes()


def _q8_0(weights: NDArray[np.float32]) -> bytes:
    x = weights.reshape(-1, 32)
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    q = np.round(x / np.where(d == 0, 1, d)).astype(np.int8)
    return _blocks(d.astype("<f2"), q)


def _q4_0(weights: NDArray[np.float32]) -> bytes:
    x = weights.reshape(-1, 32)
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    d = largest / np.float32(-8)
    q = np.minimum(15, np.floor(x / np.where(d == 0, 1, d) + 8.5)).astype(np.uint8)
    return _blocks(d.astype("<f2"), q[:, :16] | q[:, 16:] << 4)


def _q4_1(weights: NDArray[np.float32]) -> bytes:
    x = weights.reshape(-1, 32)
    m = x.min(axis=1, keepdims=True)
    d = (x.max(axis=1, keepdims=True) - m) / np.float32(15)
    q = np.minimum(15, np.floor((x - m) / np.where(d == 0, 1, d) + 0.5)).astype(np.uint8)
    return _blocks(d.astype("<f2"), m.astype("<f2"), q[:, :16] | q[:, 16:] << 4)


def _blocks(*columns: NDArray[np.generic]) -> bytes:
    """Concatenates the parts of each block, as bytes."""
    return np.concatenate([np.ascontiguousarray(c).view(np.uint8) for c in columns], 1).tobytes()


_QUANTIZERS = {
    "F32": lambda weights: weights.astype("<f4").tobytes(),
    "F16": lambda weights: weights.astype("<f2").tobytes(),
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
}


# ---- A tiny llama

TINY_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Each merge builds on the bytes and the merges before it; byte-level BPE writes a space as Ġ.
TINY_MERGES = ("h e", "l l", "Ġ t", "i n", "e r", "o u", "Ġt he", "Ġ w", "he ll", "hell o", "Ġw o")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_characters() -> list[str]:
    """The character that byte-level BPE uses for each of the 256 bytes (GPT-2's encoder.py)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(256 + others.index(b)) if b in others else chr(b) for b in range(256)]


def tiny_vocabulary(vocab_size: int | None = None) -> dict[str, object]:
    """tokenizer.* metadata: ids 0 to 2 are the special tokens, 3 to 258 the bytes in order, then
    the merges, then unused tokens up to vocab_size.  End of text is 0, EOS <|im_end|> is 2, and no
    BOS is added."""
    tokens = [*TINY_SPECIALS, *byte_characters(), *(m.replace(" ", "") for m in TINY_MERGES)]
    types = [CONTROL] * len(TINY_SPECIALS) + [NORMAL] * (len(tokens) - len(TINY_SPECIALS))
    fillers = max(0, (vocab_size or 0) - len(tokens))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + [f"<|unused_{i}|>" for i in range(fillers)],
        "tokenizer.ggml.token_type": types + [UNUSED] * fillers,
        "tokenizer.ggml.merges": list(TINY_MERGES),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def write_tiny_llama(
    path: Path,
    *,
    layers: int = 2,
    context_length: int = 512,
    vocab_size: int | None = None,
    weight_type: str = "F32",
    hidden_size: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    tied: bool = True,
    seed: int = 0,
    metadata: Mapping[str, object] | None = None,
    tensors: Mapping[str, Array | RawTensor] | None = None,
) -> Path:
    """Writes a random llama of about 0.1 M parameters that loads in milliseconds.

    The same seed gives the same bytes.  Matrices have weight_type, norms are float32; `metadata`
    and `tensors` add to the defaults or replace them."""
    vocabulary = tiny_vocabulary(vocab_size)
    tokens = vocabulary["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    head_dim = hidden_size // num_heads
    intermediate_size = 2 * hidden_size
    entries: dict[str, object] = {
        "general.architecture": "llama",
        "general.name": "tiny llama",
        "llama.block_count": layers,
        "llama.context_length": context_length,
        "llama.embedding_length": hidden_size,
        "llama.feed_forward_length": intermediate_size,
        "llama.attention.head_count": num_heads,
        "llama.attention.head_count_kv": num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": head_dim,
        "llama.vocab_size": len(tokens),
        **vocabulary,
        **(metadata or {}),
    }
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> RawTensor:
        scale = columns**-0.5
        return quantize(weight_type, rng.normal(0, scale, (rows, columns)).astype(np.float32))

    def norm() -> Array:
        return rng.normal(1, 0.05, hidden_size).astype(np.float32)

    ours: dict[str, Array | RawTensor] = {"token_embd.weight": matrix(len(tokens), hidden_size)}
    for layer in range(layers):
        block = f"blk.{layer}."
        ours[block + "attn_norm.weight"] = norm()
        ours[block + "attn_q.weight"] = matrix(hidden_size, hidden_size)
        ours[block + "attn_k.weight"] = matrix(num_kv_heads * head_dim, hidden_size)
        ours[block + "attn_v.weight"] = matrix(num_kv_heads * head_dim, hidden_size)
        ours[block + "attn_output.weight"] = matrix(hidden_size, hidden_size)
        ours[block + "ffn_norm.weight"] = norm()
        ours[block + "ffn_gate.weight"] = matrix(intermediate_size, hidden_size)
        ours[block + "ffn_up.weight"] = matrix(intermediate_size, hidden_size)
        ours[block + "ffn_down.weight"] = matrix(hidden_size, intermediate_size)
    ours["output_norm.weight"] = norm()
    if not tied:
        ours["output.weight"] = matrix(len(tokens), hidden_size)
    return write_gguf(path, entries, {**ours, **(tensors or {})})
