"""Who may come in: the Host header while bound to loopback, and API keys.

Without the Host check a web page could reach a server on its visitor's machine by a name that it
resolves to 127.0.0.1 (DNS rebinding).
"""

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Iterable
from pathlib import Path

from llmsrv.asgi.request import Request
from llmsrv.errors import ApiError
from llmsrv.errors import StartupError

OPEN_PATHS = frozenset({"/health", "/ready", "/live", "/", "/docs", "/openapi.json"})
# For the operator: without keys, only who is on this machine counts as such.
OPERATOR_PATHS = frozenset({"/models/load", "/models/unload"})
LOOPBACK_NAMES = frozenset({"localhost", "host.docker.internal"})


class Gate:
    def __init__(self, host: str, allowed_hosts: Iterable[str], keys: Iterable[str]) -> None:
        self._checks_host = is_loopback(host)
        self._allowed_hosts = LOOPBACK_NAMES | {name.lower() for name in allowed_hosts}
        # Keyed digests in a set: how long a look-up takes tells nothing of the keys.
        self._secret = secrets.token_bytes(32)
        self.replace_keys(keys)

    @property
    def has_keys(self) -> bool:
        return bool(self._digests)

    def replace_keys(self, keys: Iterable[str]) -> None:
        """What came in before is not concerned; keys that stay keep their tenant."""
        self._digests = {self._digest(key.encode()) for key in keys}

    def check(self, request: Request) -> None:
        """Raises ApiError 403 or 401 for a request that may not come in; notes whose it is as
        request.state["tenant"], bytes that say nothing of the key."""
        if self._checks_host:
            self._check_host(request.headers.get("host"))
        if self.has_keys and request.path not in OPEN_PATHS:
            request.state["tenant"] = self._check_key(request.headers.get("authorization"))
        elif request.path in OPERATOR_PATHS and not self._checks_host:
            raise ApiError(
                403,
                f"{request.path} needs an API key while the server listens beyond this machine; "
                "start it with --api-key-file.",
                code="api_key_required",
            )

    def _check_host(self, host: str | None) -> None:
        name = host_name(host or "localhost")  # HTTP/1.0 may come without
        if not _is_address(name) and name not in self._allowed_hosts:
            raise ApiError(
                403,
                f"Host '{name}' is not allowed while the server listens on loopback; "
                f"to allow it, start the server with --allowed-hosts {name}.",
                code="host_not_allowed",
            )

    def _check_key(self, authorization: str | None) -> bytes:
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized(
                "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'.", None
            )
        digest = self._digest(key.strip().encode("latin-1", "replace"))
        if digest not in self._digests:
            raise _unauthorized("Incorrect API key provided.", "invalid_api_key")
        return digest

    def _digest(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, key, hashlib.sha256)


def read_keys(keys: Iterable[str], path: str | None) -> list[str]:
    """The keys given directly and those in a file, one a line; StartupError when there are none."""
    found = list(keys)
    if path is not None:
        try:
            lines = Path(path).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"cannot read --api-key-file {path}: {error}") from None
        found += [line.strip() for line in lines if line.strip()]
        if not found:
            raise StartupError(f"--api-key-file {path} holds no key; put one key on each line")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in found):
        raise StartupError("an API key has a character that no header can carry; use ASCII")
    return found


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback


def host_name(host: str) -> str:
    """The name of a Host header, without port and IPv6 brackets, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _unauthorized(message: str, code: str | None) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})
