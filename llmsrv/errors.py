"""What goes wrong, in two kinds: errors told to a client, and to whoever started the server.

ApiError is OpenAI's error object and nothing else: the one shape of every 4xx and 5xx answer and
of every error event in a stream.  Knows nothing of HTTP framing, routes or engines.
"""

import json
from collections.abc import Mapping

# OpenAI's `type` for a status; what is not listed is the caller's fault below 500 and ours above.
TYPE_OF_STATUS = {429: "rate_limit_error", 503: "service_unavailable_error"}
# And `code`, where the error itself names none.
CODE_OF_STATUS = {
    400: "bad_request",
    405: "method_not_supported",
    408: "request_timeout",
    413: "request_too_large",
    414: "uri_too_long",
    417: "expectation_failed",
    431: "headers_too_large",
    500: "server_error",
    501: "not_implemented",
    505: "http_version_not_supported",
}


class ApiError(Exception):
    """A request that ends with an error answer.

    status   HTTP status, 4xx for the caller's fault, 5xx for ours
    param    the request field at fault in OpenAI's notation, as `messages[3].content`
    code     OpenAI's machine-readable code, as `context_length_exceeded`
    headers  further response headers, as Retry-After or Allow
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or CODE_OF_STATUS.get(status)
        default = "server_error" if status >= 500 else "invalid_request_error"
        self.type = type or TYPE_OF_STATUS.get(status, default)
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """OpenAI's error object as JSON; all four keys are always there, null or not."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def invalid(param: str, reason: str) -> ApiError:
    """A field whose value cannot be, and why."""
    return ApiError(400, f"Invalid '{param}': {reason}.", param=param, code="invalid_value")


def missing(param: str) -> ApiError:
    message = f"Missing required parameter: '{param}'."
    return ApiError(400, message, param=param, code="missing_required_parameter")


class StartupError(Exception):
    """The server cannot start or go on; the message says what was found, what was expected and what
    to do next.  The command line prints it as it stands and exits with 1."""


class ModelError(StartupError):
    """A model file or folder that is refused: the message names the file and the tensor or key."""
