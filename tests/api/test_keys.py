"""API keys that change while the server runs."""

import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from llmsrv.api.gate import Gate
from llmsrv.asgi.request import Request
from llmsrv.errors import ApiError
from tests.support.gguf_writer import write_tiny_llama
from tests.support.server import RunningServer
from tests.support.server import eventually
from tests.support.server import run_server


def tenant(gate: Gate, key: str) -> bytes | None:
    """Whose a request with this key is; None when it may not come in."""

    async def receive() -> Any: ...

    headers = [(b"authorization", f"Bearer {key}".encode())]
    request = Request({"method": "GET", "path": "/v1/models", "headers": headers}, receive)
    try:
        gate.check(request)
    except ApiError as error:
        assert error.status == 401
        return None
    return bytes(request.state["tenant"])


def test_a_key_that_is_gone_is_refused_and_one_that_stays_is_the_same_client_s() -> None:
    gate = Gate("0.0.0.0", [], ["stays", "goes"])
    before = tenant(gate, "stays")
    gate.replace_keys(["stays", "comes"])
    assert tenant(gate, "stays") == before is not None
    assert tenant(gate, "goes") is None
    assert tenant(gate, "comes") is not None


def status(server: RunningServer, key: str) -> int:
    request = urllib.request.Request(f"{server.url}/v1/models")
    request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_sighup_has_the_file_of_keys_read_again(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("old\n")
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    with run_server("--model", str(model), "--api-key-file", str(keys)) as server:
        assert (status(server, "old"), status(server, "new")) == (200, 401)
        keys.write_text("new\n")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: status(server, "old") == 401)
        assert status(server, "new") == 200
        keys.write_text("")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: "stay as they were" in server.output)
        assert status(server, "new") == 200
