"""llmsrv.files.hub and hub_fetch: which files are chosen, and the real library on a fake hub."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmsrv.errors import StartupError
from llmsrv.files import hub
from llmsrv.files import hub_fetch
from llmsrv.files.cache import cached_models
from tests.support.fake_hub import COMMIT
from tests.support.fake_hub import FakeHub
from tests.support.fake_hub import fake_hub
from tests.support.parameters import slow_but
from tests.support.server import ROOT

GGUF = b"GGUF" + bytes(range(256)) * 4000
FOLDER = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "tokenizer_config.json": b"{  }",
    "chat_template.jinja": b"x",
    "model.safetensors.index.json": b"{   }",
    "model-00001-of-00002.safetensors": b"1" * 1000,
    "model-00002-of-00002.safetensors": b"2" * 1000,
}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "model.pt": b"pickle",
    "modeling_new.py": b"code",
    "consolidated.safetensors": b"the same again",
    "onnx/model.safetensors": b"elsewhere",
    "README.md": b"text",
    "training_args.json": b"{}",
}


# ---- Names and choices


def test_a_name_has_an_organisation_a_repository_and_an_optional_file() -> None:
    assert hub.parse_hub_name("hf:org/na.me-1") == hub.HubName("org", "na.me-1", None)
    named = hub.parse_hub_name("hf:org/name:sub/file-Q4_K_M.gguf")
    assert named == hub.HubName("org", "name", "sub/file-Q4_K_M.gguf")
    assert str(named) == "hf:org/name:sub/file-Q4_K_M.gguf"


@pytest.mark.parametrize("name", ["hf:", "hf:a", "hf:a/b/c", "hf:a/b:", "hf:a b/c", "hf:/c", "a/b"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(StartupError, match="is not a hub name; write hf:org/name"):
        hub.parse_hub_name(name)


SPLIT = [f"q/m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "files", "wanted"),
    [
        ("hf:o/n", ["m.gguf", "README.md"], ["m.gguf"]),
        ("hf:o/n", ["m.gguf", *FOLDER, *UNWANTED], ["m.gguf"]),
        ("hf:o/n", ["mmproj-m.gguf", "m.gguf"], ["m.gguf"]),
        ("hf:o/n", [*SPLIT], SPLIT),
        ("hf:o/n", [*FOLDER, *UNWANTED], list(FOLDER)),
        ("hf:o/n", ["a.gguf", "b.gguf", *FOLDER], list(FOLDER)),
        ("hf:o/n", ["config.json", "model.safetensors"], ["config.json", "model.safetensors"]),
        ("hf:o/n:b.gguf", ["a.gguf", "b.gguf"], ["b.gguf"]),
        ("hf:o/n:b", ["a.gguf", "b.gguf"], ["b.gguf"]),
        ("hf:o/n:q/b.gguf", ["b.gguf", "q/b.gguf"], ["q/b.gguf"]),
        (f"hf:o/n:{SPLIT[0]}", ["a.gguf", *SPLIT], SPLIT),
    ],
)
def test_the_files_chosen_from_a_repository(name: str, files: list[str], wanted: list[str]) -> None:
    assert hub.choose_files(hub.parse_hub_name(name), files) == wanted


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("hf:o/n", [], "hf:o/n has neither a GGUF file nor safetensors weights"),
        ("hf:o/n", list(UNWANTED), "neither a GGUF file nor safetensors weights"),
        (
            "hf:o/n",
            ["a.gguf", "b.gguf"],
            "several GGUF files; name one, as in hf:o/n:a.gguf.  Files: a.gguf, b.gguf",
        ),
        (
            "hf:o/n:c",
            ["a.gguf", "b.gguf"],
            "hf:o/n:c does not exist; GGUF files in the repository: a.gguf, b.gguf",
        ),
        (
            "hf:o/n:model.safetensors",
            list(FOLDER),
            "does not exist; GGUF files in the repository: none",
        ),
        ("hf:o/n:../a.gguf", ["../a.gguf"], "does not exist"),
        ("hf:o/n", ["../a.gguf", "/b.gguf", "c\\d.gguf"], "neither a GGUF file"),
        ("hf:o/n", SPLIT[:2], "is missing a part of the model: q/m-00003-of-00003.gguf"),
    ],
)
def test_the_error_says_why_no_file_is_chosen(name: str, files: list[str], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        hub.choose_files(hub.parse_hub_name(name), files)


# ---- Fetching with the real library


@pytest.fixture
def server() -> Iterator[FakeHub]:
    repositories = {
        "org/one": {"m.gguf": GGUF, "README.md": b"text"},
        "org/folder": FOLDER | UNWANTED,
        "org/several": {"a.gguf": GGUF[:5000], "b.gguf": GGUF[:6000]},
        "org/closed": {"m.gguf": GGUF},
    }
    with fake_hub(repositories) as running:
        yield running


def start_pull(
    server: FakeHub, cache: Path, name: str, *options: str, **environment: str
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "llmsrv.py", "pull", name, "--cache-dir", str(cache), *options],
        cwd=ROOT,
        env=os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(cache / "home")} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pull(
    server: FakeHub, cache: Path, name: str, *options: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    process = start_pull(server, cache, name, *options, **environment)
    output, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def test_a_gguf_file_is_fetched_once_and_then_found_without_the_hub(
    server: FakeHub, tmp_path: Path
) -> None:
    ended = pull(server, tmp_path, "hf:org/one")
    assert ended.returncode == 0, ended.stderr
    path = Path(ended.stdout.strip())
    assert path.name == "m.gguf" and path.read_bytes() == GGUF
    assert ended.stderr.splitlines()[0] == "fetching hf:org/one (1 MB, once)"
    assert ended.stderr.splitlines()[-1] == "fetching hf:org/one: 100 %"
    assert server.fetched() == ["m.gguf"]
    assert stat.S_IMODE((tmp_path / "hf").stat().st_mode) == 0o700
    assert hub.cached_path("hf:org/one", tmp_path / "hf") == path
    assert hub.cached_path("hf:org/one:m.gguf", tmp_path / "hf") == path
    assert hub.cached_path("hf:org/one:other", tmp_path / "hf") is None
    assert hub.cached_path("hf:org/two", tmp_path / "hf") is None


@pytest.mark.slow
def test_only_weights_json_and_templates_are_fetched(server: FakeHub, tmp_path: Path) -> None:
    ended = pull(server, tmp_path, "hf:org/folder")
    assert ended.returncode == 0, ended.stderr
    folder = Path(ended.stdout.strip())
    assert server.fetched() == list(FOLDER)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FOLDER
    assert hub.cached_path("hf:org/folder", tmp_path / "hf") == folder
    again = pull(server, tmp_path, "hf:org/folder")
    assert (again.returncode, again.stdout) == (0, ended.stdout)
    assert server.fetched() == list(FOLDER)


@pytest.mark.slow
def test_an_interrupted_fetch_is_resumed(
    server: FakeHub, tmp_path: Path
) -> None:
    content = os.urandom(12_000_000)  # the library writes 10 MiB at a time
    server.repositories["org/large"] = {"m.gguf": content}
    server.hold_after = 11_000_000
    process = start_pull(server, tmp_path, "hf:org/large")
    assert process.stderr is not None
    while "80 %" not in (line := process.stderr.readline()):
        assert line, process.wait()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in errors
    assert hub.cached_path("hf:org/large", tmp_path / "hf") is None
    (unfinished,) = cached_models(tmp_path)
    assert (unfinished.name, unfinished.path) == ("hf:org/large", None)
    ended = pull(server, tmp_path, "hf:org/large")
    assert ended.returncode == 0, ended.stderr
    assert Path(ended.stdout.strip()).read_bytes() == content
    asked = [request for request in server.requests if "/resolve/" in request]
    assert [request.endswith(" Range") for request in asked] == [False, True]


@pytest.mark.slow
def test_a_file_with_the_wrong_digest_is_deleted(server: FakeHub, tmp_path: Path) -> None:
    for name in ("hf:org/one", "hf:org/folder"):  # SHA-256 and git's SHA-1
        server.wrong = True
        ended = pull(server, tmp_path, name)
        assert ended.returncode == 1
        assert "does not match the digest that the hub lists; it was deleted" in ended.stderr
        assert hub.cached_path(name, tmp_path / "hf") is None
        server.wrong = False
        assert pull(server, tmp_path, name).returncode == 0


@pytest.mark.slow
def test_one_of_several_files_is_not_used_for_another(server: FakeHub, tmp_path: Path) -> None:
    refused = pull(server, tmp_path, "hf:org/several")
    assert "name one, as in hf:org/several:a.gguf" in refused.stderr
    assert pull(server, tmp_path, "hf:org/several:a.gguf").returncode == 0
    assert hub.cached_path("hf:org/several:a", tmp_path / "hf") is not None
    assert hub.cached_path("hf:org/several:b", tmp_path / "hf") is None
    assert server.fetched() == ["a.gguf"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("RepoNotFound", "no model org/closed, or it is private"),
        ("GatedRepo", "must accept its terms"),
    ],
)
def test_a_closed_repository_needs_a_token_that_is_never_printed(
    server: FakeHub, tmp_path: Path, code: str, message: str
) -> None:
    server.closed["org/closed"] = code
    refused = pull(server, tmp_path, "hf:org/closed")
    assert refused.returncode == 1
    assert message in refused.stderr and "HF_TOKEN or --hf-token" in refused.stderr
    wrong = pull(server, tmp_path, "hf:org/closed", "--hf-token", "hf_wrong")
    assert wrong.returncode == 1 and "hf_wrong" not in wrong.stderr
    for options, environment in (
        (["--hf-token", server.token], {}),
        ([], {"HF_TOKEN": server.token}),
        ([], {"LLMSRV_HF_TOKEN": server.token}),
    ):
        ended = pull(server, tmp_path, "hf:org/closed", *options, **environment)
        assert ended.returncode == 0, ended.stderr
        assert server.token not in ended.stdout + ended.stderr


def test_the_error_for_a_name_unknown_to_the_hub(server: FakeHub, tmp_path: Path) -> None:
    ended = pull(server, tmp_path, "hf:org/missing")
    assert ended.returncode == 1
    assert "the hub has no model org/missing" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        pytest.param({"HF_HUB_OFFLINE": "1"}, marks=pytest.mark.slow),
    ],
)
def test_the_error_without_a_hub_says_what_to_do_next(
    server: FakeHub, tmp_path: Path, environment: dict[str, str]
) -> None:
    start = time.monotonic()
    ended = pull(server, tmp_path, "hf:org/one", **environment)
    assert time.monotonic() - start < 20
    assert ended.returncode == 1
    assert "hf:org/one could not be fetched, and it is not complete in" in ended.stderr
    assert "'llmsrv pull hf:org/one' resumes" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_too_little_space_is_noticed_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = hub_fetch.shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(hub_fetch.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StartupError, match="5 MB are needed and 1 free; choose another place"):
        hub_fetch._check_space(tmp_path, 5_000_000)


# ---- Finding


def write_repository(folder: Path, commit: str, listing: str, *files: str) -> None:
    repository = folder / "models--org--one"
    for file in files:
        (repository / "snapshots" / COMMIT / file).parent.mkdir(parents=True, exist_ok=True)
        (repository / "snapshots" / COMMIT / file).write_bytes(GGUF)
    for part, text in (("refs/main", commit), (f"listings/{COMMIT}.json", listing)):
        (repository / part).parent.mkdir(parents=True, exist_ok=True)
        (repository / part).write_bytes(text.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    ("commit", "listing"),
    [
        ("", '["m.gguf"]'),
        ("../../..", '["m.gguf"]'),
        (COMMIT.upper(), '["m.gguf"]'),
        ("a" * 40, '["m.gguf"]'),
        ("\udcff", '["m.gguf"]'),
        (COMMIT, ""),
        (COMMIT, "[]"),
        (COMMIT, "\udcff"),
    ],
)
def test_files_that_no_fetch_wrote_are_not_a_model(
    tmp_path: Path, commit: str, listing: str
) -> None:
    write_repository(tmp_path, commit, listing, "m.gguf")
    assert hub.cached_path("hf:org/one", tmp_path) is None
    write_repository(tmp_path, COMMIT, '["m.gguf"]', "m.gguf")
    found = hub.cached_path("hf:org/one", tmp_path)
    assert found == tmp_path / "models--org--one" / "snapshots" / COMMIT / "m.gguf"


def test_a_name_refers_to_the_same_files_whatever_else_was_fetched(tmp_path: Path) -> None:
    names = json.dumps([*FOLDER, "a.gguf", "b.gguf"])
    write_repository(tmp_path, COMMIT, names, "a.gguf")
    assert hub.cached_path("hf:org/one", tmp_path) is None
    assert hub.cached_path("hf:org/one:a.gguf", tmp_path) is not None
    write_repository(tmp_path, COMMIT, names, *FOLDER)
    found = hub.cached_path("hf:org/one", tmp_path)
    assert found == tmp_path / "models--org--one" / "snapshots" / COMMIT
    (found / "config.json").unlink()
    assert hub.cached_path("hf:org/one", tmp_path) is None


@pytest.mark.parametrize(
    "token", slow_but(["hf_bad\ntoken", "hf_bad token", "hf_bäd"], "hf_bad\ntoken")
)
def test_a_token_that_cannot_be_sent_is_never_printed(
    server: FakeHub, tmp_path: Path, token: str
) -> None:
    ended = pull(server, tmp_path, "hf:org/one", "--hf-token", token)
    assert ended.returncode == 1
    assert ended.stderr == (
        "llmsrv: the Hugging Face token contains characters that no token can have\n"
    )


def test_huggingface_hub_is_imported_only_to_fetch() -> None:
    script = (
        "import sys, llmsrv.serve, llmsrv.commands; from pathlib import Path\n"
        "from llmsrv.files.source import resolve_model\n"
        "assert resolve_model('llmsrv.py', Path('x'), sys.stderr)\n"
        "assert 'huggingface_hub' not in sys.modules, sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
