"""The tiers of AVX-512 on a CPU that lacks it: the same kernels, the same calls, with intrinsics that
AVX2 computes (intrinsics/immintrin.h).  Their loops are not unrolled, or compiling takes minutes."""

import dataclasses
import hashlib
import shutil
from pathlib import Path

from llmsrv.backend.cpu import TIERS
from llmsrv.backend.source import cpu_features

INTRINSICS = Path(__file__).parent / "intrinsics"
AVX2 = next(tier for tier in TIERS if tier.name == "AVX2")


def emulated_tiers():
    """Those that do not run here by themselves, where AVX2 does and gcc compiles."""
    if not AVX2.needs <= cpu_features() or not shutil.which("gcc"):
        return
    version = hashlib.sha256((INTRINSICS / "immintrin.h").read_bytes()).hexdigest()
    flags = [f"-isystem{INTRINSICS}", f"-DINTRINSICS={version}", "-O1"]
    flags += ["-fdisable-tree-cunroll", "-fdisable-tree-cunrolli"]
    for tier in TIERS:
        if "-DTIER_AVX512" in tier.flags and not tier.needs <= cpu_features():
            own = [flag for flag in (*tier.flags, *AVX2.flags) if flag != "-DTIER_AVX2"]
            own = [flag for flag in own if not flag.startswith(("-mavx512", "-mamx"))]
            name = f"{tier.name}, emulated"
            yield dataclasses.replace(tier, name=name, needs=AVX2.needs, flags=(*own, *flags))
