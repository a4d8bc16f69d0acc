"""Collects wheels for a GPU machine that cannot reach a package index.

python -m bench.cuda_wheels DIR [--python 3.12] [PACKAGE ...]

Fetches the packages, without what they depend on, for Linux on x86-64; by default those that our
engine needs and that images for machine learning lack.  Copy DIR along with the repository, and run
the command that is printed there before bench.cuda.
"""

import argparse
import subprocess
import sys
from pathlib import Path

PACKAGES = "orjson>=3.9", "msgspec>=0.19", "llguidance>=1.9"  # as in setup.cfg
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("packages", nargs="*", default=PACKAGES, metavar="PACKAGE")
    parser.add_argument("--python", default="3.12", help="the version of Python on that machine")
    options = parser.parse_args()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={options.python}"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([*command, f"--dest={options.folder}", *options.packages], check=True)
    wheels = sorted(options.folder.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:6.1f} MB  {wheel.name}")
    print(f"{sum(wheel.stat().st_size for wheel in wheels) / 1e6:6.1f} MB in all; run there:")
    print(
        f"python3 -m pip install --no-index --no-deps --target /tmp/site {options.folder}/*.whl "
        "&& PYTHONPATH=/tmp/site python3 -m bench.cuda"
    )


if __name__ == "__main__":
    main()
