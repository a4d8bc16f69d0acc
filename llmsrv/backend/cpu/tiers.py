"""The instruction sets that the CPU kernels are written for, the fastest first."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tier:
    """An instruction set, and how to compile the kernels for it.

    needs              the cpu_features() that it requires
    always_16_bits     its kernels only have 16-bit activations, which are faster here than 8-bit
                       ones elsewhere
    has_integer_cache  its KV cache stores integers, except with 32 bits (KV_INT8 in kv_cache.h)
    """

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]
    always_16_bits: bool = False
    has_integer_cache: bool = False


AVX512 = Tier(
    "AVX-512",
    frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c"}),
    (
        "-DTIER_AVX512",
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
        *("-mfma", "-mf16c"),
    ),
    has_integer_cache=True,
)
TIERS = (
    Tier(
        "AMX",
        AVX512.needs | {"amx_tile", "amx_int8"},
        (*AVX512.flags, "-DTIER_AMX", "-mamx-tile", "-mamx-int8"),
        always_16_bits=True,
        has_integer_cache=True,
    ),
    AVX512,
    Tier(
        "AVX2 with VNNI",
        frozenset({"avx2", "fma", "f16c", "avx_vnni"}),
        ("-DTIER_AVX2", "-DTIER_AVX_VNNI", "-mavx2", "-mfma", "-mf16c", "-mavxvnni"),
    ),
    Tier(
        "AVX2",
        frozenset({"avx2", "fma", "f16c"}),
        ("-DTIER_AVX2", "-mavx2", "-mfma", "-mf16c"),
    ),
    Tier(
        "NEON with I8MM",
        frozenset({"asimddp", "i8mm"}),
        ("-DTIER_NEON", "-DTIER_I8MM", "-march=armv8.2-a+dotprod+i8mm"),
    ),
    Tier("NEON", frozenset({"asimddp"}), ("-DTIER_NEON", "-march=armv8.2-a+dotprod")),
    Tier("portable", frozenset(), (), always_16_bits=True),
)
