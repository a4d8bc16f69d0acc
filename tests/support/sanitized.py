"""A pytest plugin: compiles the CPU kernels with AddressSanitizer and UBSan.

Loaded by cpu/test_sanitized.py as `-p tests.support.sanitized`, in a process that preloads the
runtimes.
"""

FLAGS = (
    "-O1",
    "-g1",  # line numbers in reports; -g makes compiling 1.5 times as long
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
