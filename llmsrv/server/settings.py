"""The limits and timeouts of the server, and what it counts."""

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class ServerSettings:
    """Sizes in bytes, times in seconds; a client over a limit gets the status in brackets."""

    # Heads.  RFC 9112 section 3 asks for at least 8000 octets of request line.
    max_request_line_bytes: int = 8 * KIB  # [414]
    max_header_bytes: int = 32 * KIB  # all fields together [431]
    max_fields: int = 100  # [431]
    header_timeout_s: float = 10.0  # from the first byte to the blank line, in total [408]

    # Bodies.
    body_limit_bytes: int = 8 * MIB  # [413]
    body_timeout_s: float = 30.0  # plus one second per min_rate_bytes received [408]
    min_rate_bytes: int = KIB  # per second, for sending a body or reading a response

    # Connections.
    read_ahead_bytes: int = 64 * KIB  # unread bytes held while the application is busy
    keep_alive_timeout_s: float = 75.0
    half_close_grace_s: float = 1.0  # for the response to start after the client's FIN
    write_high_water_bytes: int = 64 * KIB
    write_stall_timeout_s: float = 30.0  # for a response that drains below min_rate_bytes
    # After our FIN we read and drop the client's bytes.  Closing with unread bytes sends a reset,
    # and the client's kernel would then discard our response (RFC 9112 section 9.6).
    linger_timeout_s: float = 1.0
    linger_bytes: int = 16 * MIB
    # How long new connections wait in the backlog when file descriptors run out.
    accept_pause_s: float = 0.1

    def __post_init__(self) -> None:
        assert self.max_request_line_bytes + self.max_header_bytes < self.read_ahead_bytes


@dataclass
class ServerCounters:
    """Totals since the start; `open_connections` is the current number."""

    open_connections: int = 0
    connections: int = 0
    requests: int = 0
    refused_requests: int = 0  # by the server itself, for framing, size or slowness
    app_errors: int = 0
    client_disconnected: int = 0  # while a request was running
    client_stalled: int = 0  # aborted because they did not read
    accept_failures: int = 0
