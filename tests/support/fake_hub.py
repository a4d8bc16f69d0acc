"""The parts of the Hugging Face hub that fetching a model needs, on a free port of 127.0.0.1.

test_hub.py runs the real huggingface_hub against it, so the library checks that it behaves like
the hub."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field

LARGE_BYTES = 1000
COMMIT = hashlib.sha1(b"commit").hexdigest()


@dataclass
class FakeHub:
    """State of the fake.

    repositories  repository -> file name -> contents
    token         required for requests to a repository in `closed`
    hold_after    stop sending the next file after this many bytes, once
    wrong         serve contents that differ from the listing
    requests      "METHOD path" of each request, plus " Range" if it asked for a part
    """

    repositories: dict[str, dict[str, bytes]]
    token: str = "hf_secret"
    closed: dict[str, str] = field(default_factory=dict)  # repository -> the hub's error code
    hold_after: int | None = None
    wrong: bool = False
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> list[str]:
        """The names of the requested files, in order."""
        gets = [request.split() for request in self.requests if "/resolve/" in request]
        return [words[1].split(f"/resolve/{COMMIT}/")[1] for words in gets if words[0] == "GET"]


def _sibling(name: str, data: bytes) -> dict[str, object]:
    """A file as the hub lists it: a large one with its SHA-256, others with git's SHA-1."""
    git = hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()
    entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git}
    if len(data) >= LARGE_BYTES:
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 100}
    return entry


@contextmanager
def fake_hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[FakeHub]:
    hub = FakeHub(repositories)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        asks_for_part = " Range" if "Range" in self.headers else ""
        self.hub.requests.append(f"{self.command} {self.path}{asks_for_part}")
        path = self.path.split("?")[0].strip("/")
        if path.startswith("api/models/"):
            self.answer_listing(path.removeprefix("api/models/"))
        elif "/resolve/" in path:
            repository, _, file = path.partition(f"/resolve/{COMMIT}/")
            data = self.hub.repositories[repository][file]
            self.answer_file(bytes(len(data)) if self.hub.wrong else data)
        else:
            self.answer(404, b"{}", {})

    do_HEAD = do_GET

    def answer_listing(self, repository: str) -> None:
        if repository not in self.hub.repositories:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        code = self.hub.closed.get(repository)
        if code and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(401, b"{}", {"X-Error-Code": code})
        files = self.hub.repositories[repository]
        siblings = [_sibling(name, data) for name, data in files.items()]
        listing = {"id": repository, "sha": COMMIT, "siblings": siblings, "tags": []}
        self.answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def answer_file(self, data: bytes) -> None:
        headers = {"Accept-Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.answer(206 if start else 200, data[start:], headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "GET":
            return
        if self.hub.hold_after is not None and "/resolve/" in self.path:
            body, self.hub.hold_after = body[: self.hub.hold_after], None
            self.wfile.write(body)
            self.rfile.read()  # until the client is gone
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
