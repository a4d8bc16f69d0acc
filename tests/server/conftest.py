from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from llmsrv.asgi.types import ASGIApp
from llmsrv.server.settings import ServerSettings
from tests.support.serving import LOOPS
from tests.support.serving import Serving
from tests.support.serving import serving

Serve = Callable[..., AbstractContextManager[Serving]]


@pytest.fixture(params=list(LOOPS))
def serve(request: pytest.FixtureRequest) -> Serve:
    def serve_on_loop(app: ASGIApp, **settings: float) -> AbstractContextManager[Serving]:
        return serving(app, ServerSettings(**settings), request.param)  # type: ignore[arg-type]

    return serve_on_loop
