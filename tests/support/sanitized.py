"""A pytest plugin: compiles the CPU kernels with AddressSanitizer and UBSan.

Loaded by cpu/test_sanitized.py as `-p tests.support.sanitized`, in a process that has the runtimes
preloaded.
"""

FLAGS = (
    "-O1",
    "-g1",  # lines for reports; more makes compiling half as long again
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
)
TIMEOUT_S = 600.0


def pytest_collection() -> None:
    from llmsrv.backend.cpu import backend
    from llmsrv.backend import source

    backend.FLAGS = (*backend.FLAGS, *FLAGS)
    source.COMPILE_TIMEOUT_S = TIMEOUT_S
