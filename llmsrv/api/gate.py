"""Which requests are let in: checks API keys, and the Host header while bound to loopback.

Without the Host check, a web page could reach a server on its visitor's machine through a name that
resolves to 127.0.0.1 (DNS rebinding).
"""

import hashlib
import hmac
import ipaddress
import math
import secrets
from collections.abc import Iterable
from pathlib import Path

from llmsrv.api.brake import Brake
from llmsrv.api.brake import network_of
from llmsrv.asgi.request import Headers
from llmsrv.asgi.request import Request
from llmsrv.asgi.router import Access
from llmsrv.errors import ApiError
from llmsrv.errors import StartupError

LOOPBACK_NAMES = frozenset({"localhost", "host.docker.internal"})


class Gate:
    def __init__(
        self, host: str | None, allowed_hosts: Iterable[str], keys: Iterable[str]
    ) -> None:
        """host: the address that the server listens on; None if another program decides that, and
        the address that each request came to counts."""
        self._is_on_loopback = None if host is None else is_loopback(host)
        self._allowed_hosts = LOOPBACK_NAMES | {name.lower() for name in allowed_hosts}
        # A set of keyed digests: the time of a look-up reveals nothing about the keys.
        self._secret = secrets.token_bytes(32)
        self._brake = Brake()
        self.replace_keys(keys)

    @property
    def has_keys(self) -> bool:
        return bool(self._digests)

    def replace_keys(self, keys: Iterable[str]) -> None:
        """Requests that are already running are not affected; keys that stay keep their tenant."""
        self._digests = {self._digest(key.encode()) for key in keys}

    def check(self, request: Request, access: Access) -> None:
        """Raises ApiError 403, 401 or 429 for a request that is not let in; access: of its route.

        Sets request.state["tenant"] to bytes that identify the client but do not reveal its key.
        """
        is_on_loopback = self._is_on_loopback
        if is_on_loopback is None:
            server = request.scope.get("server")
            is_on_loopback = server is not None and is_loopback(server[0])
        if is_on_loopback:
            self._check_host(request.headers.get("host"))
        if self.has_keys and access is not Access.OPEN:
            request.state["tenant"] = self._check_key(request)
        elif access is Access.OPERATOR and not is_on_loopback:
            raise ApiError(
                403,
                f"{request.path} needs an API key while the server listens beyond this machine; "
                "start it with --api-key-file.",
                code="api_key_required",
            )

    def _check_host(self, host: str | None) -> None:
        name = host_name(host or "localhost")  # HTTP/1.0 does not require it
        if not _is_address(name) and name not in self._allowed_hosts:
            raise ApiError(
                403,
                f"Host '{name}' is not allowed while the server listens on loopback; "
                f"to allow it, start the server with --allowed-hosts {name}.",
                code="host_not_allowed",
            )

    def _check_key(self, request: Request) -> bytes:
        """The digest of the request's key.

        Raises ApiError 401 if it has none or a wrong one, and 429 after too many wrong ones.
        """
        key = _sent_key(request.headers)
        if not key:
            raise _unauthorized(
                "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'.", None
            )
        digest = self._digest(key.encode("latin-1", "replace"))
        network = network_of(request.client[0] if request.client else "")
        if (wait_s := self._brake.retry_after_s(network, digest)) > 0:
            raise _too_many_wrong_keys(wait_s)
        is_right = digest in self._digests
        self._brake.note_key(network, digest, is_right)
        if not is_right:
            raise _unauthorized("Incorrect API key provided.", "invalid_api_key")
        return digest

    def _digest(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, key, hashlib.sha256)


def _sent_key(headers: Headers) -> str:
    """The key in `Authorization: Bearer KEY`, else in `x-api-key: KEY`; "" if there is none.

    Authorization wins even if it holds no usable key: a proxy that checks or replaces it must not
    be bypassed by a second header.
    """
    authorization = headers.get("authorization")
    if authorization is None:
        return (headers.get("x-api-key") or "").strip()
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def read_keys(keys: Iterable[str], path: str | None) -> list[str]:
    """The given keys and those in the file, one per line.

    Raises StartupError if the file cannot be read or holds no key, or if a key cannot be sent in a
    header.
    """
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
    """The name in a Host header, in lower case, without the port and IPv6 brackets."""
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


def _too_many_wrong_keys(wait_s: float) -> ApiError:
    message = "Too many incorrect API keys came from your address. Please try again later."
    headers = {"Retry-After": str(math.ceil(wait_s))}
    return ApiError(429, message, code="rate_limit_exceeded", headers=headers)
