"""The rate of a large matrix product on the GPU, to compare our kernels with."""

import time

import numpy as np

from llmsrv.backend.cuda.device import Device

SIZE = 8192
REPEATS = 20


def product_rate(device: Device) -> float | None:
    """Multiplications of float16 values per second; None if CuPy cannot multiply matrices, which
    needs cuBLAS."""
    cp = device.cp
    few = np.random.default_rng(0).normal(size=(SIZE // 16, SIZE)).astype(np.float16)
    a = cp.asarray(np.tile(few, (16, 1)))
    out = cp.empty((SIZE, SIZE), np.float16)
    try:
        cp.matmul(a, a, out=out)
    except (AttributeError, ImportError, RuntimeError):
        return None
    times = []
    for _ in range(3):
        cp.cuda.runtime.deviceSynchronize()
        start_s = time.perf_counter()
        for _ in range(REPEATS):
            cp.matmul(a, a, out=out)
        cp.cuda.runtime.deviceSynchronize()
        times.append((time.perf_counter() - start_s) / REPEATS)
    return SIZE**3 / min(times)
