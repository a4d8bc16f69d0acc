"""Which GPU is used, and one sentence about whatever is missing."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pytest

from llmsrv.backend.base import CannotRun
from llmsrv.backend.cuda import device
from llmsrv.backend.cuda import driver
from llmsrv.backend.cuda.device import open_device
from llmsrv.backend.cuda.driver import Driver
from llmsrv.backend.cuda.driver import DriverDevice
from llmsrv.backend.cuda.driver import NoDriver
from llmsrv.backend.cuda.driver import query_driver
from llmsrv.errors import StartupError
from tests.support.cuda import install_stand_in
from tests.support.cuda import needs_emulation

H200 = DriverDevice("NVIDIA H200", 90)
PASCAL = DriverDevice("NVIDIA GeForce GTX 1080", 61)


def machine(
    monkeypatch: pytest.MonkeyPatch,
    *packages: str,
    cuda: int = 13000,
    devices: tuple[DriverDevice, ...] = (H200,),
) -> None:
    """A machine with these packages of CuPy, and a driver that runs CUDA up to this version."""

    def distribution(name: str) -> str:
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return name

    monkeypatch.setattr(device, "query_driver", lambda: Driver(cuda, devices))
    monkeypatch.setattr(importlib.metadata, "distribution", distribution)


def reason(name: str = "cuda:0") -> str:
    with pytest.raises(CannotRun) as error:
        open_device(name, Path("/nowhere"))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_machine_without_a_driver_is_an_ordinary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "no-such-library.so")
    with pytest.raises(NoDriver) as error:
        query_driver()
    assert error.value.is_ordinary
    assert str(error.value) == "no GPU is used: there is no NVIDIA driver"


def test_without_cupy_the_extra_to_install_fits_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=13010)
    assert reason().endswith("CuPy is not installed; run: pip install 'llmsrv[cuda13]'")
    machine(monkeypatch, cuda=12040)
    assert reason().endswith("run: pip install 'llmsrv[cuda12]'")


def test_a_driver_older_than_the_cupy_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "cupy-cuda13x", cuda=12080)
    assert reason() == (
        "the NVIDIA driver runs CUDA up to 12.8, but cupy-cuda13x needs 13.0; install a newer "
        "driver, or run: pip uninstall cupy-cuda13x; then: pip install 'llmsrv[cuda12]'"
    )


def test_a_driver_too_old_for_any_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "cupy-cuda12x", cuda=11080)
    assert reason() == (
        "the NVIDIA driver runs CUDA up to 11.8; 12.0 or higher is needed: install a newer driver"
    )


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "cupy-cuda12x", devices=(H200, PASCAL))
    assert reason("cuda:1") == (
        "cuda:1 is a NVIDIA GeForce GTX 1080 of compute capability 6.1; 7.5 or higher is needed"
    )


def test_two_packages_of_cupy_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "cupy-cuda12x", "cupy-cuda13x")
    assert reason() == (
        "2 packages of CuPy are installed, which break each other; run: pip uninstall "
        "cupy-cuda12x cupy-cuda13x; then: pip install 'llmsrv[cuda13]'"
    )


@pytest.mark.parametrize(
    "name, message",
    [
        ("cuda:2", "there is no cuda:2; there are 2 GPUs, up to cuda:1"),
        ("cuda:x", "--device must be cuda:N, such as cuda:0, got 'cuda:x'"),
        ("gpu", "--device must be cuda:N, such as cuda:0, got 'gpu'"),
    ],
)
def test_a_gpu_that_does_not_exist_is_final(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    """Another backend would not be what was asked for."""
    machine(monkeypatch, "cupy-cuda13x", devices=(H200, H200))
    with pytest.raises(StartupError) as error:
        open_device(name, Path("/nowhere"))
    assert str(error.value) == message and not isinstance(error.value, CannotRun)


def test_a_cupy_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "raise ImportError('\\n=====\\nlibnvrtc.so.13 is missing\\n')"
    (tmp_path / "cupy.py").write_text(text)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    machine(monkeypatch, "cupy-cuda13x")
    assert reason() == "cupy-cuda13x is installed but cannot be imported: libnvrtc.so.13 is missing"


@needs_emulation
def test_a_compiler_without_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("CUDA headers not found.\nSet CUDA_PATH.")

    machine(monkeypatch, "cupy-cuda13x")
    monkeypatch.setattr(install_stand_in(), "RawModule", fail)
    assert reason() == (
        "CUDA's compiler NVRTC or its headers do not work or are not installed "
        "(CUDA headers not found.); run: pip install 'llmsrv[cuda13]'"
    )
