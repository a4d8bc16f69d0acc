"""Our libcuda.so.1, called through ctypes as the detection of devices calls the real one."""

import ctypes
import subprocess
import sys

import pytest

from tests.support.cuda import environment
from tests.support.cuda import load_driver
from tests.support.cuda import needs_emulation

pytestmark = needs_emulation


@pytest.fixture
def driver():
    load_driver()
    return ctypes.CDLL("libcuda.so.1")


def integer(function, *arguments):
    value = ctypes.c_int(-1)
    return function(ctypes.byref(value), *arguments), value.value


def test_environment_describes_the_device(driver, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_DEVICES", "2")
    monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", "120")
    monkeypatch.setenv("CUDA_ON_CPU_DRIVER", "12040")
    monkeypatch.setenv("CUDA_ON_CPU_MEMORY_MIB", "3")
    name, size = ctypes.create_string_buffer(20), ctypes.c_size_t()
    assert driver.cuInit(0) == 0
    assert integer(driver.cuDeviceGetCount) == (0, 2)
    assert integer(driver.cuDriverGetVersion) == (0, 12040)
    assert integer(driver.cuDeviceGet, 1) == (0, 1)
    assert integer(driver.cuDeviceGet, 2)[0] == 101
    assert integer(driver.cuDeviceGetAttribute, 75, 0) == (0, 12)
    assert integer(driver.cuDeviceGetAttribute, 76, 0) == (0, 0)
    assert driver.cuDeviceGetName(name, 20, 0) == 0 and name.value == b"Emulated"
    assert driver.cuDeviceTotalMem_v2(ctypes.byref(size), 0) == 0 and size.value == 3 << 20


@pytest.mark.parametrize(
    "name, value, result", [("INIT_RESULT", "803", 803), ("DEVICES", "0", 100)]
)
def test_driver_that_does_not_work(driver, monkeypatch, name, value, result):
    monkeypatch.setenv(f"CUDA_ON_CPU_{name}", value)
    assert driver.cuInit(0) == result
    assert integer(driver.cuDeviceGetCount)[0] == 3  # not initialized
    text = ctypes.c_char_p()
    assert driver.cuGetErrorString(result, ctypes.byref(text)) == 0
    assert text.value


def test_process_with_the_environment_finds_driver_and_stand_in():
    script = (
        "import ctypes, importlib.metadata, cupy\n"
        "print(ctypes.CDLL('libcuda.so.1').cuInit(0), cupy.cuda.runtime.getDeviceCount(),\n"
        "      importlib.metadata.version('cupy-cuda13x'), cupy.cuda.Device().compute_capability)\n"
    )
    env = environment(num_devices=3, capability=90)
    output = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert output.stdout.split() == ["0", "3", "14.2.0", "90"], output.stderr
