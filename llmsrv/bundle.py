"""Packs the program into one file: python -m llmsrv.bundle llmsrv.pyz, then python llmsrv.pyz.

The file holds our own code and the kernels' source; the packages it needs must be installed where
it runs.
"""

import shutil
import sys
import tempfile
import zipapp
from pathlib import Path

MAIN = '''\
if __name__ == "__main__":
    from llmsrv.cli import main

    raise SystemExit(main())
'''
NOT_PACKED = shutil.ignore_patterns("__pycache__", "*.pyc")


def bundle(target: Path) -> None:
    """Writes the zipapp, replacing an existing file."""
    package = Path(__file__).parent
    with tempfile.TemporaryDirectory() as directory:
        stage = Path(directory)
        shutil.copytree(package, stage / "llmsrv", ignore=NOT_PACKED)
        if not (package / "kernels").exists():  # in a checkout they are next to the package
            kernels = package.parent / "kernels"
            shutil.copytree(kernels, stage / "llmsrv" / "kernels", ignore=NOT_PACKED)
        (stage / "__main__.py").write_text(MAIN)
        zipapp.create_archive(stage, target, interpreter="/usr/bin/env python3", compressed=True)


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m llmsrv.bundle FILE.pyz", file=sys.stderr)
        return 2
    target = Path(sys.argv[1])
    bundle(target)
    print(f"wrote {target} ({target.stat().st_size // 1024} KiB); run it with: python {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
