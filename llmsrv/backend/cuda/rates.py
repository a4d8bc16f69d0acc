"""The rate of a large matrix product on the GPU, to compare our kernels with."""

import time

from llmsrv.backend.cuda.device import Device

SIZE = 8192
REPEATS = 20


def product_rate(device: Device) -> float | None:
    """Multiplications of float16 values per second; None if cuBLAS is not installed."""
    cp = device.cp
    try:
        a, b = (cp.random.standard_normal((SIZE, SIZE), cp.float32) for _ in "ab")
        a, b = a.astype(cp.float16), b.astype(cp.float16)
        out = cp.matmul(a, b)
    except (ImportError, RuntimeError):
        return None
    times = []
    for _ in range(3):
        cp.cuda.runtime.deviceSynchronize()
        start_s = time.perf_counter()
        for _ in range(REPEATS):
            cp.matmul(a, b, out=out)
        cp.cuda.runtime.deviceSynchronize()
        times.append((time.perf_counter() - start_s) / REPEATS)
    return SIZE**3 / min(times)
