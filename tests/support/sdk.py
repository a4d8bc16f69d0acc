"""OpenAI's Python client, for servers that run in tests."""

from functools import cache

from openai import DefaultHttpxClient
from openai import OpenAI


@cache
def connections() -> DefaultHttpxClient:
    """One pool for all clients: every new pool would read all certificates of this machine."""
    return DefaultHttpxClient()


def openai_client(url: str, key: str = "none") -> OpenAI:
    """A client for the server at `url` that does not retry."""
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=connections())
