"""The structures of kernels/cuda/sample.cuh, field by field: change both together."""

import numpy as np

from llmsrv.backend.sampling.table import PARAMETERS

THREADS = 256
GROUP = 128  # ids that a warp looks at together
CHUNK = 2048  # ids that a block looks at
NUM_BINS = THREADS
NO_LINE = -1

# The lines of a slot on the device, NO_LINE where it has none
LINE_NAMES = "bias", "counts", "in_prompt", "allowed", "end_ids"
LINES = np.dtype([(name, np.int32) for name in LINE_NAMES])

ROW = np.dtype(
    [
        ("parameters", PARAMETERS),
        ("output_position", np.int64),
        ("target", np.int32),
        ("draft", np.int32),
        ("num_drafted", np.int32),
        ("lines", LINES),
        ("grammar", np.int32),
        ("slot", np.int32),
    ]
)

WRITE = np.dtype([(name, np.int32) for name in ("line", "is_mask", "start", "num_ids")])

STATE = np.dtype(
    [
        ("best", np.uint64),
        ("total", np.uint64),
        ("raw_best", np.uint32),
        ("rank", np.uint32),
        ("num_blocks", np.uint32),
        ("is_drawn", np.int32),
        ("raw_max", np.float32),
        ("max", np.float32),
    ]
)

RESULT = np.dtype(
    [
        ("sum", np.uint64),
        ("max", np.float32),
        ("logit", np.float32),
        ("id", np.int32),
        ("rank", np.int32),
    ]
)
