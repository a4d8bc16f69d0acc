"""What all routes have in common: the shape of errors, keys, hosts, origins, request ids."""

import http.client
import json
import socket
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from llmsrv.files.mapped import read_text
from llmsrv.registry.service import load_text_model
from tests.support.gguf_writer import write_tiny_llama
from tests.support.sdk import openai_client
from tests.support.server import RunningServer
from tests.support.server import run_server
from tests.support.servers import KEY

AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
JSON = AUTHORIZED | {"Content-Type": "application/json"}


def ask(
    server: RunningServer,
    method: str,
    path: str,
    headers: dict[str, str] | None = None,
    body: bytes | None = None,
) -> tuple[int, http.client.HTTPMessage, bytes]:
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.putrequest(method, path, skip_host="Host" in (headers or {}))
    for name, value in (headers or {}).items():
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


def error(body: bytes) -> dict[str, Any]:
    """OpenAI's error object, which has exactly these four keys."""
    document = json.loads(body)
    assert list(document) == ["error"]
    assert set(document["error"]) == {"message", "type", "param", "code"}
    return dict(document["error"])


@pytest.mark.parametrize("path", ["/health", "/ready", "/live"])
def test_health_needs_no_key(tiny_server: RunningServer, path: str) -> None:
    status, headers, body = ask(tiny_server, "GET", path)
    assert (status, json.loads(body)) == (200, {"status": "ok"})
    assert headers["x-request-id"]


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", f"Basic {KEY}", "Bearer wrong", f"Bearer {KEY}x", KEY,
     "Bearer \xff\xfe", "Bearer " + "x" * 20000],
    ids=lambda v: str(v)[:20],
)  # fmt: skip
def test_a_request_without_the_key_is_401(
    tiny_server: RunningServer, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    status, answer, body = ask(tiny_server, "GET", "/v1/models", headers)
    assert status == 401
    assert answer["WWW-Authenticate"] == "Bearer"
    assert error(body)["type"] == "invalid_request_error"
    assert KEY not in body.decode()


def test_a_wrong_key_is_the_sdk_s_authentication_error(tiny_server: RunningServer) -> None:
    client = openai_client(tiny_server.url, "wrong")
    with pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_the_scheme_of_a_key_matches_in_any_case(tiny_server: RunningServer) -> None:
    assert ask(tiny_server, "GET", "/metrics", {"Authorization": f"bearer {KEY}"})[0] == 200


@pytest.mark.parametrize(
    "method, path, status, code",
    [
        ("GET", "/nope", 404, "unknown_url"),
        ("POST", "/v1", 404, "unknown_url"),
        ("GET", "//v1/models", 404, "unknown_url"),
        ("GET", "/v1/models/", 404, "unknown_url"),
        ("GET", "/V1/models", 404, "unknown_url"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_supported"),
        ("DELETE", "/v1/models", 405, "method_not_supported"),
    ],
)
def test_an_unknown_route_is_an_error_object(
    tiny_server: RunningServer, method: str, path: str, status: int, code: str
) -> None:
    got, headers, body = ask(tiny_server, method, path, AUTHORIZED)
    assert (got, error(body)["code"]) == (status, code)
    assert (headers["Allow"] is not None) == (status == 405)


def test_an_unknown_route_is_404_only_with_a_key(tiny_server: RunningServer) -> None:
    assert ask(tiny_server, "GET", "/nope")[0] == 401


def test_an_alias_with_a_slash_is_found_in_the_sdk_s_encoding(tiny_client: OpenAI) -> None:
    assert tiny_client.models.retrieve("org/tiny").id == "org/tiny"
    assert [model.id for model in tiny_client.models.list()] == ["tiny", "org/tiny"]


BODIES = [
    (b"", "invalid_json"),
    (b"{", "invalid_json"),
    (b"nonsense", "invalid_json"),
    (b'{"model": "tiny"} {}', "invalid_json"),
    (b"\xef\xbb\xbf{}", "invalid_json"),
    ('{"model": "tiny"}'.encode("utf-16"), "invalid_json"),
    (b'{"model": "\xff"}', "invalid_json"),
    (b'{"model": "\\ud800"}', "invalid_json"),
    (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "invalid_json"),
    (b'{"model": "tiny", "prompt": "a", "temperature": 1e400}', "invalid_json"),
    (b"[" * 100_000, "invalid_json"),
    (b'{"a":' * 100_000, "invalid_json"),
    (b'{"prompt": "a", "model": ' + b"[" * 100_000, "invalid_json"),
    (b"[]", "invalid_type"),
    (b'"text"', "invalid_type"),
    (b"{}", "missing_required_parameter"),
    (b'{"model": "tiny"}', "missing_required_parameter"),
    (b'{"model": null, "prompt": "a"}', "invalid_type"),
    (b'{"model": "tiny", "prompt": "a", "stream": "yes"}', "invalid_type"),
    (b'{"model": "tiny", "prompt": "a", "n": true}', "invalid_type"),
    (b'{"model": "tiny", "prompt": "a", "n": 1' + b"0" * 5000 + b"}", "invalid_json"),
    (b'{"model": "tiny", "prompt": "a", "max_tokens": 10000000000}', "integer_above_max_value"),
]  # fmt: skip


@pytest.mark.parametrize("body, code", BODIES, ids=lambda v: repr(v)[:40])
def test_a_body_that_is_not_a_request_is_400(
    tiny_server: RunningServer, body: bytes, code: str
) -> None:
    status, _, answer = ask(tiny_server, "POST", "/v1/completions", JSON, body)
    assert (status, error(answer)["code"]) == (400, code)


@pytest.mark.parametrize(
    "fields, status",
    [
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": 'Application/JSON;charset="UTF-8"'}, 200),
        ({"Content-Type": "application/json; charset=utf8"}, 200),
        ({}, 200),
        ({"Origin": "https://app.example"}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json; charset=utf-16"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
    ],
    ids=str,
)
def test_a_body_must_be_declared_as_json(
    tiny_server: RunningServer, fields: dict[str, str], status: int
) -> None:
    body = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'
    got, _, answer = ask(tiny_server, "POST", "/v1/completions", AUTHORIZED | fields, body)
    assert got == status
    if status == 415:
        assert error(answer)["code"] == "unsupported_media_type"


def test_the_last_of_two_equal_keys_counts(tiny_server: RunningServer) -> None:
    body = b'{"model": "none", "model": "tiny", "prompt": "a", "max_tokens": 1}'
    assert ask(tiny_server, "POST", "/v1/completions", JSON, body)[0] == 200


def test_a_body_over_the_limit_is_413_and_readable(tiny_server: RunningServer) -> None:
    body = b'{"model": "tiny", "prompt": "' + b"a" * (9 << 20) + b'"}'
    status, _, answer = ask(tiny_server, "POST", "/v1/completions", JSON, body)
    assert status == 413
    assert "8388608" in error(answer)["message"]


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:80", 200),
        ("192.168.1.7", 200),
        ("host.docker.internal:8000", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
    ],
)
def test_a_foreign_host_name_is_refused_on_loopback(
    tiny_server: RunningServer, host: str, status: int
) -> None:
    got, _, body = ask(tiny_server, "GET", "/live", {"Host": host})
    assert got == status
    if status == 403:
        assert error(body)["code"] == "host_not_allowed"
        assert f"--allowed-hosts {host}" in error(body)["message"]


def test_with_a_key_pages_of_any_origin_may_read_even_errors(tiny_server: RunningServer) -> None:
    origin = {"Origin": "https://app.example"}
    for headers in (origin, origin | AUTHORIZED):
        _, answer, _ = ask(tiny_server, "GET", "/v1/models", headers)
        assert answer["Access-Control-Allow-Origin"] == "*"
        assert "x-request-id" in answer["Access-Control-Expose-Headers"]


@pytest.mark.parametrize(
    "request_line, fields, status",
    [
        ("POST /v1/completions HTTP/1.1", {"Content-Length": str(9 << 20)}, 413),
        ("GET /" + "x" * 9000 + " HTTP/1.1", {}, 414),
        ("POST /v1/completions HTTP/1.1", {"Content-Length": "1", "Expect": "a cake"}, 417),
        ("GET /v1/models HTTP/1.1", {f"X-{i}": "" for i in range(200)}, 431),
        ("GET /v1/models HTTP/1.1", {"X-Long": "x" * 40_000}, 431),
        ("GET /v1/models HTTP/1.1", {"Transfer-Encoding": "gzip"}, 501),
    ],
    ids=str,
)
def test_pages_may_read_errors_that_the_http_server_answers_itself(
    tiny_server: RunningServer, request_line: str, fields: dict[str, str], status: int
) -> None:
    headers = {"Host": "localhost", "Origin": "https://app.example"} | fields
    lines = [request_line, *(f"{name}: {value}" for name, value in headers.items())]
    with http_socket(tiny_server) as sock:
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert response.status == status
        assert error(response.read())["message"]
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert "x-request-id" in response.headers["Access-Control-Expose-Headers"]


def http_socket(server: RunningServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_a_preflight_needs_no_key(tiny_server: RunningServer) -> None:
    headers = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    status, answer, _ = ask(tiny_server, "OPTIONS", "/v1/chat/completions", headers)
    assert status == 204
    assert answer["Access-Control-Allow-Headers"] == "authorization,content-type"


@pytest.mark.parametrize(
    "origin, allowed",
    [("http://localhost:3000", True), ("http://127.0.0.1", True), ("https://evil.example", False)],
)
def test_without_a_key_only_pages_of_this_machine_may_read_responses(
    server: RunningServer, origin: str, allowed: bool
) -> None:
    _, answer, _ = ask(server, "GET", "/v1/models", {"Origin": origin})
    assert (answer["Access-Control-Allow-Origin"] == origin) is allowed


@pytest.mark.parametrize(
    "given, kept", [("my-id.7", True), ("two words", False), ("x" * 129, False), ('{"a":1}', False)]
)
def test_a_client_s_request_id_is_kept_if_it_is_harmless(
    tiny_server: RunningServer, given: str, kept: bool
) -> None:
    _, answer, _ = ask(tiny_server, "GET", "/live", {"X-Request-Id": given})
    assert (answer["x-request-id"] == given) is kept


def test_head_answers_as_get_without_a_body(tiny_server: RunningServer) -> None:
    status, headers, body = ask(tiny_server, "HEAD", "/health")
    assert (status, body) == (200, b"")
    assert headers["Content-Length"] == str(len('{"status":"ok"}'))


def test_metrics_are_prometheus_text_with_the_names_that_dashboards_use(
    tiny_server: RunningServer, tiny_client: OpenAI
) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    tiny_client.completions.create(model="tiny", prompt="abc", max_tokens=2)
    status, headers, body = ask(tiny_server, "GET", "/metrics", AUTHORIZED)
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    labels = families["vllm:num_requests_running"].samples[0].labels
    assert labels == {"model_name": "tiny", "engine": "0"}
    assert families["vllm:prompt_tokens"].samples[0].value >= 3
    assert families["vllm:kv_cache_usage_perc"].samples[0].value == 0


def test_a_model_without_a_template_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_tiny_llama(tmp_path / "bare.gguf", metadata={"tokenizer.chat_template": 0})
    with run_server("--model", str(model)) as server:
        client = openai_client(server.url)
        with pytest.raises(openai.BadRequestError, match="--chat-template FILE"):
            client.chat.completions.create(
                model="bare", messages=[{"role": "user", "content": "a"}]
            )
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    with caplog.at_level("INFO"):
        loaded = load_text_model(model, str(template), tmp_path).template
    assert "no system role" in caplog.messages[-1]
    assert loaded is not None
    assert loaded.render([{"role": "user", "content": "abc"}]) == "abc"


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}", "utf-8-sig")
    loaded = load_text_model(model, str(template), tmp_path).template
    assert loaded is not None
    assert loaded.render([{"role": "user", "content": "abc"}]) == "abc"
    assert read_text(template, "a template") == "{{ messages[0].content }}"
