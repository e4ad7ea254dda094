"""Many draws: initialize, descend, inspect; and what fraction of them did what."""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from tqdm import tqdm

from .ensemble import descend
from .iterate import Iterator
from .solution import Solution
from .solve import Integrator
from .types import Key, P


F = TypeVar("F")
# "mixed": descents in float32, verdicts in float64.
DTYPES = ("float64", "float32", "mixed")


class Study(eqx.Module, Generic[P, F]):
    """Three functions composed over many draws.

    - `initialize`: from a key to a point.
    - `descend`: from a point to a `Solution`: an `Integrator` or an `Iterator`, whose
      lanes begin anew as they end, or any function (your own loop), which is vmapped.
    - `inspect`: from that solution to a finding, e.g. `classify`.
    - `draws`: how many. `batch`: how many are run at once; it bounds memory and does
      not change what draw i is.

    **Raises:** `ValueError` if `draws` or `batch` is not a whole number >= 1, or if
    one of the others can't be called.
    """

    initialize: Callable[[Key], P]
    descend: Callable[[P], Solution[P]]
    inspect: Callable[[Solution[P]], F]
    draws: int = eqx.field(static=True)
    batch: int = eqx.field(static=True, default=64)

    def __check_init__(self):
        for name in ("draws", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        takes = {"initialize": "a key", "descend": "a point", "inspect": "a solution"}
        for name, of in takes.items():
            value = getattr(self, name)
            if not callable(value):
                raise ValueError(
                    f"{name} must be a function of {of}, got {type(value).__name__}"
                )


class Outcome(eqx.Module, Generic[P, F]):
    """One `Solution` and one finding per draw: every leaf is a numpy array with a
    leading axis of draws. `seconds`: of first batches, compilation included, and of
    all others."""

    solution: Solution[P]
    finding: F
    seconds: dict[str, float]


@contextlib.contextmanager
def precision(dtype: str):
    """A context in which new arrays have this dtype, whatever jax's global flag:
    float64 for "mixed".

    **Raises:** `ValueError` unless dtype is one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    with jax.enable_x64(dtype != "float32"):
        yield


def find_device(name: str | None) -> Any:
    """The first device of a kind, see `find_devices`."""
    return find_devices(name)[0]


def find_devices(name: str | None) -> list[Any]:
    """This process's devices of a kind: cpu, gpu, tpu; `None` is jax's own choice.

    **Raises:** `ValueError` if there is none.
    """
    if name is None:
        return jax.local_devices()
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


def run_study(
    study: Study[P, F],
    key: Key,
    *,
    dtype: str = "float64",
    device: str | None = None,
    progress: bool | None = None,
) -> Outcome[P, F]:
    """Runs every draw. Draw i depends on `study`, `key` and i only.

    An `Integrator` or an `Iterator` runs on all devices of the kind, each with its own
    queue and batch.

    **Arguments:**

    - `dtype`: all of the study's arrays are converted to it, and it holds whatever
      jax's global flag says. "mixed": the float64 starts are rounded and descended in
      float32, and their ends are inspected in float64.
    - `device`: cpu, gpu or tpu.
    - `progress`: a bar of draws done on stderr; by default when that is a terminal.

    **Raises:** `ValueError` for a key that is none, an unknown dtype or a device that
    is not there. A draw that fails is no error: its `result` says so and it stays in
    the denominator.
    """
    _check_key(key)
    devices = find_devices(device)
    with precision(dtype), jax.default_device(devices[0]):
        inspected = _converted(study, "float64" if dtype == "mixed" else dtype)
        study = inspected
        if dtype == "mixed":
            study = _converted(study, "float32")
            study = eqx.tree_at(
                lambda s: s.initialize, study, _Rounded(inspected.initialize)
            )
        seconds = {"first batches": 0.0, "other batches": 0.0}
        # tqdm: None means off where stderr is no terminal.
        hide = None if progress is None else not progress
        with tqdm(total=study.draws, unit=" draws", disable=hide) as bar:
            solution = _descend_all(study, key, seconds, bar, devices)
            if dtype == "mixed":
                solution = _converted(solution, "float64")
            finding = _in_batches(
                partial(_inspect, inspected.inspect),
                solution,
                study,
                seconds,
                lambda found: None,
            )
    return Outcome(solution, finding, seconds)


class _Rounded(eqx.Module):
    """Starts of another initializer, in float32."""

    initialize: Callable[[Key], Any]

    def __call__(self, key):
        return _converted(self.initialize(key), "float32")


def _converted(tree, dtype):
    """Its floating arrays in another dtype, numpy's as numpy's."""
    inexact = lambda leaf: (
        isinstance(leaf, (jax.Array, np.ndarray, np.generic))
        and jnp.issubdtype(leaf.dtype, jnp.inexact)
    )
    return jax.tree.map(lambda x: x.astype(dtype) if inexact(x) else x, tree)


def _check_key(key):
    array = isinstance(key, jax.Array)
    typed = array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = array and key.dtype == jnp.uint32
    if not (typed and key.shape == () or raw and key.shape == (2,)):
        raise ValueError(
            f"key must be one key such as jax.random.key(0), got {type(key).__name__} "
            f"of shape {np.shape(key)}"
        )


def _descend_all(study, key, seconds, bar, devices):
    if isinstance(study.descend, (Integrator, Iterator)):
        return _descend_refilled(study, key, seconds, bar, devices)
    points = _in_batches(
        partial(_initialize, study.initialize, key),
        np.arange(study.draws),
        study,
        seconds,
        lambda points: None,
    )
    return _in_batches(
        partial(_descend, study.descend),
        points,
        study,
        seconds,
        lambda solution: bar.update(len(solution.time)),
    )


def _descend_refilled(study, key, seconds, bar, devices):
    blocks = []
    stage, began = "first batches", time.perf_counter()
    for solution, _ in descend(
        study.descend, study.initialize, key, study.draws, study.batch, devices
    ):
        blocks.append(solution)
        seconds[stage] += time.perf_counter() - began
        stage, began = "other batches", time.perf_counter()
        bar.update(len(solution.time))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *blocks)


def _in_batches(function, inputs, study, seconds, done):
    """`function` of all draws, a batch at a time, as numpy arrays."""
    total = jax.tree.leaves(inputs)[0].shape[0]
    results = []
    for start in range(0, total, study.batch):
        began = time.perf_counter()
        count = min(study.batch, total - start)
        # A short batch repeats its last draw: one shape, one compilation.
        size = min(study.batch, study.draws)
        rows = np.minimum(np.arange(start, start + size), start + count - 1)
        batch = jax.tree.map(lambda leaf: leaf[rows], inputs)  # noqa: B023
        result = jax.device_get(function(batch))
        result = jax.tree.map(lambda leaf: np.array(leaf[:count]), result)  # noqa: B023
        results.append(result)
        done(result)
        stage = "first batches" if start == 0 else "other batches"
        seconds[stage] += time.perf_counter() - began
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *results)


@eqx.filter_jit
def _initialize(initialize, key, draws):
    return jax.vmap(lambda draw: initialize(jr.fold_in(key, draw)))(draws)


@eqx.filter_jit
def _descend(descend, points):
    return jax.vmap(descend)(points)


@eqx.filter_jit
def _inspect(inspect, solutions):
    # One after the other: most verdicts are cheap and skip the Hessian, which vmap
    # would form for all.
    return jax.lax.map(inspect, solutions)


class Fraction(eqx.Module):
    """How often, of how many, and what that says.

    - `low`, `high`: the exact (Clopper-Pearson) 95 % interval of the probability.
    - `outer_low`, `outer_high`: its least lower and greatest upper end when the
      undecided draws, counted both ways, are allowed for.
    """

    count: int
    draws: int
    undecided: int
    low: float
    high: float
    outer_low: float
    outer_high: float

    @property
    def estimate(self) -> float:
        return self.count / self.draws

    def __str__(self) -> str:
        text = (
            f"{self.count} of {self.draws}, 95 % interval "
            f"[{self.low:.4f}, {self.high:.4f}]"
        )
        if self.undecided:
            text += (
                f", [{self.outer_low:.4f}, {self.outer_high:.4f}] with "
                f"{self.undecided} undecided"
            )
        return text


def fraction(flags: Any, undecided: Any = None) -> Fraction:
    """The `Fraction` of draws for which `flags` is true.

    `undecided` marks draws (not among the flags) whose answer is open; they stay in
    the denominator.

    **Raises:** `ValueError` for no draws, for anything but truth values, or for a
    draw that is both flagged and undecided.

    *Reference:* Clopper, Pearson (1934); `scipy.stats.binomtest`.
    """
    flags = _truths("flags", flags)
    unknown = (
        np.zeros_like(flags) if undecided is None else _truths("undecided", undecided)
    )
    if unknown.shape != flags.shape:
        raise ValueError(
            f"flags has {flags.size} draws and undecided {unknown.size}: both must "
            "be of the same draws"
        )
    if np.any(flags & unknown):
        raise ValueError("a draw is both in flags and undecided: it can only be one")
    count, left, draws = int(flags.sum()), int(unknown.sum()), flags.size
    low, high = clopper_pearson(count, draws)
    return Fraction(
        count,
        draws,
        left,
        low,
        high,
        low,
        clopper_pearson(count + left, draws)[1],
    )


def clopper_pearson(count: int, draws: int) -> tuple[float, float]:
    """The exact 95 % interval for the probability of `count` out of `draws`."""
    # Imported late: scipy.stats costs half a second.
    from scipy.stats import binomtest

    interval = binomtest(count, draws).proportion_ci(0.95, method="exact")
    return float(interval.low), float(interval.high)


def _truths(name, values):
    try:
        values = np.asarray(values)
    except ValueError:  # ragged
        values = np.asarray(values, dtype=object)
    if values.dtype != bool or values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"{name} must be a list of at least one truth value, one per draw, got "
            f"{values.dtype} of shape {values.shape}"
        )
    return values
