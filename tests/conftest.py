"""Every test runs in float64, with implicit promotion of ranks and types refused."""

import gc
import os
from pathlib import Path

import jax
import jax.random as jr
import pytest

from gradflow.cli import compile_fast


# Most of the time of the tests is compilation. What is timed, the benchmarks and
# notebooks, runs in processes of its own.
os.environ |= compile_fast()
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    """Compiled functions of a thousand tests are more than a process can map: Linux
    ends it at 65530 pieces of memory. Compiling again costs time, so not before."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def getkey():
    """A function that returns a new key at each call, the same ones in every run."""
    counter = iter(range(1_000_000))
    return lambda: jr.fold_in(jr.key(2024), next(counter))
