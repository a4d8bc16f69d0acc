"""The two kinds of errors: ApiError for clients, StartupError for the server's operator.

Every 4xx and 5xx response and every error event in a stream comes from an ApiError.  It is encoded
as OpenAI's error object, unless the route has another dialect (asgi/dialect.py).  Knows nothing
about HTTP framing, routes or engines.
"""

import json
from collections.abc import Mapping

# OpenAI's `type` by status; other statuses are invalid_request_error below 500, else server_error.
TYPE_OF_STATUS = {429: "rate_limit_error", 503: "service_unavailable_error"}
# OpenAI's `code` by status, for errors without a code of their own.
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
    """A request that ends with an error.

    status   HTTP status: 4xx if the client is at fault, 5xx if the server is
    param    the request field at fault in OpenAI's notation, such as `messages[3].content`
    code     OpenAI's machine-readable code, such as `context_length_exceeded`
    headers  additional response headers, such as Retry-After or Allow
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
        """OpenAI's error object as JSON; all four keys are always present, even if null."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def invalid(param: str, reason: str) -> ApiError:
    """The error for a field with an invalid value; reason completes the sentence."""
    return ApiError(400, f"Invalid '{param}': {reason}.", param=param, code="invalid_value")


def missing(param: str) -> ApiError:
    message = f"Missing required parameter: '{param}'."
    return ApiError(400, message, param=param, code="missing_required_parameter")


class StartupError(Exception):
    """The server cannot start or continue.

    The message says what was found, what was expected and what to do next.  The command line prints
    it unchanged and exits with 1.
    """


class ModelError(StartupError):
    """A model file or folder is refused; the message names the file and the tensor or key."""
