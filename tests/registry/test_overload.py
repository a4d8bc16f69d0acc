"""Which requests a full queue refuses."""

from typing import Any
from typing import cast

import pytest

from llmsrv.config import Config
from llmsrv.engine.client import EngineClient
from llmsrv.engine.client import Queued
from llmsrv.registry.counters import Counters
from llmsrv.registry.service import Service
from llmsrv.registry.service import TextModel


class Engine:
    def __init__(self, queued: dict[bytes, Queued]) -> None:
        self.queued = lambda: queued


@pytest.mark.parametrize(
    "queued, tenant, status",
    [
        ({}, b"", None),
        ({b"": (9, 999)}, b"", None),
        ({b"": (10, 0)}, b"", 503),
        ({b"": (1, 1000)}, b"", 503),
        ({b"a": (10, 0)}, b"a", 503),  # alone
        ({b"a": (10, 0)}, b"b", None),  # its share stays reserved
        ({b"a": (10, 0), b"b": (4, 0)}, b"b", None),
        ({b"a": (10, 0), b"b": (5, 0)}, b"b", 429),
        ({b"a": (10, 0), b"b": (1, 0)}, b"a", 429),
        ({b"a": (2, 900), b"b": (1, 100)}, b"a", 429),
        ({b"a": (2, 900), b"b": (1, 100)}, b"b", None),
        ({b"a": (5, 0), b"b": (4, 0)}, b"a", None),
    ],
)
def test_a_full_queue_refuses_the_tenants_that_fill_it(
    queued: dict[bytes, Any], tenant: bytes, status: int | None
) -> None:
    engine = Engine({name: Queued(*counts) for name, counts in queued.items()})
    service = Service(
        Config(max_queue=10, max_queue_tokens=1000),
        ["tiny"],
        cast(EngineClient, engine),
        cast(TextModel, None),
        Counters(),
    )
    error = service.overloaded(tenant)
    assert (error and error.status) == status
    if error:
        assert error.headers["Retry-After"] == "1"
        codes = {503: "server_is_overloaded", 429: "rate_limit_exceeded"}
        assert error.code == codes[error.status]
