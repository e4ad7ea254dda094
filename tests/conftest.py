"""Every test runs in float64, with implicit promotion of ranks and types refused."""

import gc
import os
from pathlib import Path

import jax
import jax.random as jr
import pytest

from gradflow.compiling import compile_fast, keep_compiled


# Most of the time of the tests is compilation; what is compiled is kept for the next
# time, and for the processes that tests start. (No test measures time.)
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache")
os.environ |= compile_fast()
jax.config.update(
    "jax_compilation_cache_dir", keep_compiled()["JAX_COMPILATION_CACHE_DIR"]
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
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
