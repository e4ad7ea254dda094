"""In which arithmetic, and on which devices, a study runs."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .arguments import check_one_of


# "mixed": descents in float32, verdicts in float64.
DTYPES = ("float64", "float32", "mixed")


@contextlib.contextmanager
def precision(dtype: str):
    """A context in which new arrays have this dtype, whatever jax's global flag:
    float64 for "mixed".

    **Raises:** `ValueError` unless dtype is one of `DTYPES`.
    """
    check_dtype(dtype)
    with jax.enable_x64(dtype != "float32"):
        yield


def check_dtype(dtype: Any) -> None:
    """**Raises:** `ValueError` unless it is one of `DTYPES`."""
    check_one_of("dtype", dtype, DTYPES)


def find_device(name: str | None) -> Any:
    """The first device of a kind, see `find_devices`."""
    return find_devices(name)[0]


def find_devices(name: str | None) -> list[Any]:
    """This process's devices of a kind: cpu, gpu, tpu; `None` is jax's own choice.

    **Raises:** `ValueError` if there is none.
    """
    if name is None:
        return jax.local_devices()
    if not name:
        raise ValueError("device='' must be cpu, gpu or tpu")
    present = sorted({device.platform for device in jax.devices()} | {"cpu"})
    try:
        return jax.local_devices(backend=name)
    except RuntimeError:
        extra = {"gpu": "jax[cuda13]", "cuda": "jax[cuda13]", "tpu": "jax[tpu]"}
        install = f"install {extra[name]} or " if name in extra else ""
        raise ValueError(
            f"device={name} asked, but JAX sees only {', '.join(present)}: "
            f"{install}use --device {present[0]}"
        ) from None


def converted(tree, dtype):
    """Its floating arrays in another dtype, numpy's as numpy's."""
    inexact = lambda leaf: (
        isinstance(leaf, (jax.Array, np.ndarray, np.generic))
        and jnp.issubdtype(leaf.dtype, jnp.inexact)
    )
    return jax.tree.map(lambda x: x.astype(dtype) if inexact(x) else x, tree)
