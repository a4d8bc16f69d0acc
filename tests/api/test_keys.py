"""API keys: which header they come in, which routes need them, and how they change at runtime."""

import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from llmsrv.api.brake import MAX_WRONG_KEYS
from llmsrv.api.brake import Brake
from llmsrv.api.gate import Gate
from llmsrv.asgi.request import Request
from llmsrv.asgi.router import Access
from llmsrv.errors import ApiError
from tests.support.gguf_writer import write_tiny_llama
from tests.support.server import RunningServer
from tests.support.server import eventually
from tests.support.server import run_server


Fields = list[tuple[bytes, bytes]]


def make_request(headers: Fields) -> Request:
    async def receive() -> Any: ...

    return Request({"method": "GET", "path": "/v1/models", "headers": headers}, receive)


def tenant(gate: Gate, key: str, name: bytes = b"authorization") -> bytes | None:
    """The tenant of a request with this key; None if it is not let in."""
    value = key if name == b"x-api-key" else f"Bearer {key}"
    request = make_request([(name, value.encode())])
    try:
        gate.check(request, Access.KEY)
    except ApiError as error:
        assert error.status == 401
        return None
    return bytes(request.state["tenant"])


@pytest.mark.parametrize(
    "headers, is_let_in",
    [
        ([(b"x-api-key", b"one")], True),
        ([(b"x-api-key", b" two ")], True),
        ([(b"x-api-key", b"three")], False),
        ([(b"x-api-key", b"")], False),
        ([(b"x-api-key", b"\xff\xfe")], False),
        ([(b"x-api-key", b"Bearer one")], False),
        ([], False),
        # Authorization wins, whatever it holds.
        ([(b"authorization", b"Bearer one"), (b"x-api-key", b"wrong")], True),
        ([(b"x-api-key", b"wrong"), (b"authorization", b"Bearer one")], True),
        ([(b"authorization", b"Bearer wrong"), (b"x-api-key", b"one")], False),
        ([(b"authorization", b"Basic one"), (b"x-api-key", b"one")], False),
        ([(b"authorization", b""), (b"x-api-key", b"one")], False),
    ],
)
def test_a_key_comes_in_authorization_or_else_in_x_api_key(
    headers: Fields, is_let_in: bool
) -> None:
    gate = Gate("0.0.0.0", [], ["one", "two"])
    request = make_request(headers)
    if is_let_in:
        gate.check(request, Access.KEY)
    else:
        with pytest.raises(ApiError) as caught:
            gate.check(request, Access.KEY)
        assert caught.value.status == 401
        assert caught.value.headers == {"WWW-Authenticate": "Bearer"}


def test_a_key_has_the_same_tenant_in_either_header() -> None:
    gate = Gate("0.0.0.0", [], ["one", "two"])
    assert tenant(gate, "one") == tenant(gate, "one", b"x-api-key") is not None
    assert tenant(gate, "two", b"x-api-key") != tenant(gate, "one", b"x-api-key")


@pytest.mark.parametrize(
    "access, host, keys, headers, status",
    [
        (Access.OPEN, "0.0.0.0", ["k"], [], None),
        (Access.OPEN, "0.0.0.0", [], [], None),
        (Access.KEY, "0.0.0.0", ["k"], [], 401),
        (Access.KEY, "127.0.0.1", ["k"], [], 401),
        (Access.KEY, "0.0.0.0", ["k"], [(b"x-api-key", b"k")], None),
        (Access.KEY, "0.0.0.0", [], [], None),
        (Access.OPERATOR, "127.0.0.1", ["k"], [], 401),
        (Access.OPERATOR, "0.0.0.0", ["k"], [(b"x-api-key", b"k")], None),
        (Access.OPERATOR, "0.0.0.0", [], [], 403),
        (Access.OPERATOR, "127.0.0.1", [], [], None),
    ],
)
def test_the_access_of_a_route_decides_who_is_let_in(
    access: Access, host: str, keys: list[str], headers: Fields, status: int | None
) -> None:
    gate = Gate(host, [], keys)
    if status is None:
        gate.check(make_request(headers), access)
    else:
        with pytest.raises(ApiError) as caught:
            gate.check(make_request(headers), access)
        assert caught.value.status == status


@pytest.mark.parametrize(
    "server, status",
    [
        (("127.0.0.1", 80), None),
        (["::1", 80], None),
        (("10.0.0.1", 80), 403),
        (("/run/socket", None), 403),
        (None, 403),
    ],
)
def test_under_another_server_the_address_that_a_request_came_to_counts(
    server: Any, status: int | None
) -> None:
    gate = Gate(None, [], [])
    request = make_request([(b"host", b"localhost")])
    request.scope["server"] = server
    gate.check(request, Access.KEY)
    if status is None:
        gate.check(request, Access.OPERATOR)
        rebound = make_request([(b"host", b"evil.example")])
        rebound.scope["server"] = server
        with pytest.raises(ApiError, match="'evil.example' is not allowed"):
            gate.check(rebound, Access.OPEN)
    else:
        with pytest.raises(ApiError, match="needs an API key"):
            gate.check(request, Access.OPERATOR)


def test_a_removed_key_is_refused_and_a_kept_one_stays_the_same_tenant() -> None:
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
def test_sighup_reloads_the_key_file(tmp_path: Path) -> None:
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
        eventually(lambda: "keeping the current API keys" in server.output)
        assert status(server, "new") == 200


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def status_of(gate: Gate, key: str, host: str = "192.0.2.7") -> int:
    request = make_request([(b"x-api-key", key.encode())])
    request.client = (host, 1)
    try:
        gate.check(request, Access.KEY)
    except ApiError as error:
        if error.status == 429:
            assert error.code == "rate_limit_exceeded"
            assert error.headers == {"Retry-After": "1"}
        return error.status
    return 200


def test_128_an_address_that_tries_out_keys_is_slowed_down_to_one_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr("llmsrv.api.gate.Brake", lambda: Brake(clock))
    gate = Gate("0.0.0.0", [], ["one", "two"])
    assert status_of(gate, "one") == 200
    statuses = [status_of(gate, f"wrong {number}") for number in range(4440)]
    assert statuses == [401] * MAX_WRONG_KEYS + [429] * (4440 - MAX_WRONG_KEYS)
    assert status_of(gate, "two") == 429  # otherwise an attacker would learn that it is right
    assert status_of(gate, "one") == 200  # known from before
    assert status_of(gate, "wrong 1") == 401
    assert status_of(gate, "two", "192.0.2.8") == 200  # from elsewhere
    for second in range(3):
        clock.now_s += 1
        keys = [f"{second} {number}" for number in range(3)]
        assert [status_of(gate, key) for key in keys] == [401, 429, 429]
    clock.now_s += 1
    assert status_of(gate, "two") == 200


def test_a_client_that_keeps_sending_one_wrong_key_locks_nobody_out() -> None:
    gate = Gate("0.0.0.0", [], ["one"])
    assert {status_of(gate, "old") for _ in range(4440)} == {401}
    assert status_of(gate, "one") == 200


def test_the_addresses_of_one_ipv6_network_share_a_budget() -> None:
    gate = Gate("0.0.0.0", [], ["one"])
    hosts = [f"2001:db8::{number:x}" for number in range(MAX_WRONG_KEYS + 1)]
    assert [status_of(gate, host, host) for host in hosts] == [401] * MAX_WRONG_KEYS + [429]
    assert status_of(gate, "no", "2001:db8:0:1::1") == 401
    assert status_of(gate, "no", "fe80::1%eth0") == 401


def test_what_is_remembered_of_addresses_and_keys_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmsrv.api.brake.MAX_ADDRESSES", 10)
    monkeypatch.setattr("llmsrv.api.brake.MAX_KEYS", 10)
    brake = Brake()
    for number in range(20):
        brake.note_key(str(number), b"digest", is_right=False)
    assert len(brake._budgets) == len(brake._answered) == 10
