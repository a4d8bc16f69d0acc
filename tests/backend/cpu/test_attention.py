"""The CPU backend against the reference backend: Attention over the KV cache."""

import pytest

from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.config import default_cache_dir
from tests.support.attention import ATTENTIONS
from tests.support.attention import attention_errors


@pytest.mark.parametrize("heads, kv_heads, head_dim, window, softcap", ATTENTIONS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_attention_over_the_cache(cpu, heads, kv_heads, head_dim, window, softcap, interleaved):
    errors = attention_errors(cpu, heads, kv_heads, head_dim, window, softcap, interleaved)
    # The cache rounds to float16, and large scores amplify the error.
    assert errors.max() < 2e-2
    assert errors.mean() < 5e-4


def test_the_cache_holds_elements_of_eight_bits(cpu8):
    check_attention_errors(cpu8, 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("bits, error", [(8, 2e-2), (32, 1e-5)])
def test_the_cache_holds_elements_of_8_or_32_bits(cpu, bits, error):
    backend = CPUBackend(CPUOptions(default_cache_dir(), 2, kv_cache_bits=bits, tiers=(cpu.tier,)))
    check_attention_errors(backend, error)


def check_attention_errors(backend, error):
    assert attention_errors(backend, 6, 2, 40, None, None).mean() < error
    assert attention_errors(backend, 4, 4, 64, 100, None).mean() < error
