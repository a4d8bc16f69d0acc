"""Runs the x86 tiers on a CPU with only AVX2: the same kernels, with intrinsics written for AVX2
(intrinsics/immintrin.h).  Loops are not unrolled, because compiling would take minutes."""

import dataclasses
import hashlib
from pathlib import Path

from llmsrv.backend.cpu.tiers import TIERS
from llmsrv.backend.source import CompileError
from llmsrv.backend.source import cpu_features
from llmsrv.backend.source import find_compiler

INTRINSICS = Path(__file__).parent / "intrinsics"
EMULATED = "AMX", "AVX-512", "AVX2 with VNNI"
AVX2 = next(tier for tier in TIERS if tier.name == "AVX2")


def emulated_tiers():
    """The tiers that this CPU lacks; none without AVX2 and gcc."""
    if not AVX2.needs <= cpu_features() or not _gcc_compiles():
        return
    version = hashlib.sha256((INTRINSICS / "immintrin.h").read_bytes()).hexdigest()
    flags = [f"-isystem{INTRINSICS}", f"-DINTRINSICS={version}", "-O1"]
    flags += ["-fdisable-tree-cunroll", "-fdisable-tree-cunrolli"]
    for tier in TIERS:
        if tier.name in EMULATED and not tier.needs <= cpu_features():
            own = [flag for flag in tier.flags if flag.startswith("-D")]
            compiled = [flag for flag in AVX2.flags if flag.startswith("-m")]
            name = f"{tier.name}, emulated"
            yield dataclasses.replace(
                tier, name=name, needs=AVX2.needs, flags=(*own, *compiled, *flags)
            )


def _gcc_compiles():
    try:
        return "gcc" in Path(find_compiler().command[0]).resolve().name
    except CompileError:
        return False
