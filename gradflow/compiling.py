"""How jax compiles for the command line and the tests. Imports no jax."""

import importlib.metadata
import os
import platform
import zlib
from pathlib import Path


# More than calls of LAPACK that one program makes at once.
LEAST_THREADS = 16


def compile_fast() -> dict[str, str]:
    """Environment variables with which jax compiles in half of the time, for runs of
    seconds: the code it makes is up to twice as slow.

    It is the former code generator of XLA, which releases after 0.10 no longer have
    (they end the process at a flag that they don't know), without its later passes.
    """
    if not importlib.metadata.version("jax").startswith("0.10."):
        return {}
    given = os.environ.get("XLA_FLAGS", "")
    flags = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=1"
    return {"XLA_FLAGS": f"{given} {flags}".strip()}


def enough_threads() -> dict[str, str]:
    """Environment variables with which jax has threads to spare, to be set before it
    is imported.

    Batched LAPACK calls of jaxlib 0.10 wait, on a thread of XLA's pool, for others of
    that pool: with two threads (two cores) two calls at once wait for each other for
    ever, as triangular solves of two views did within minutes.
    """
    return {"NPROC": str(max(LEAST_THREADS, os.cpu_count() or 1))}


def plain_loops() -> dict[str, str]:
    """Environment variables with which jax adds arrays up in plain loops, to be set
    before its first computation.

    In tiles, as XLA of jaxlib 0.10 does it on CPU, an addition took up to 7 times as
    long. An option that a release does not know is no error. Options that are given
    are left alone.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_extra_options" in given:
        return {}
    flag = "--xla_backend_extra_options=xla_cpu_disable_tiled_emitter=true"
    return {"XLA_FLAGS": f"{given} {flag}".strip()}


def keep_compiled() -> dict[str, str]:
    """Environment variables with which jax keeps what it compiles for later processes,
    in the user's folder for such files. To be set before jax is imported."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    # A home that several machines share: compiled code is for one kind of processor.
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    kind = f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"
    folder = Path(root, "gradflow", "compiled", kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a machine without a home for it is no error
        return {}
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
