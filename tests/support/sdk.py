"""OpenAI's own client, for servers that run in tests."""

from functools import cache

from openai import DefaultHttpxClient
from openai import OpenAI


@cache
def connections() -> DefaultHttpxClient:
    """One pool for all clients: each of its own would read every certificate of this machine."""
    return DefaultHttpxClient()


def openai_client(url: str, key: str = "none") -> OpenAI:
    """A client that does not try again, of the server at url."""
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=connections())
