"""Many draws: initialize, descend, inspect."""

import logging
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from .arguments import checked_arguments
from .ensemble import QUEUE
from .environment import environment, versions
from .precision import find_device as find_device, find_devices, precision as precision
from .runner import Keep, Runner
from .solution import Solution
from .store.arrays import arrays_of, is_member, outcome_from
from .store.cell import Cell
from .store.folder import slug_of, Store
from .store.writing import Writer
from .types import Key, names_of, P


F = TypeVar("F")
# Seconds of draws that are computed between two writes of a store, if a file's take
# less: what is lost where a study is killed.
AT_ONCE = 5.0
LOG = logging.getLogger("gradflow")


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
    all others; draws that were read from a store took none."""

    solution: Solution[P]
    finding: F
    seconds: dict[str, float]


@checked_arguments
def without_points(solution: Solution, finding: Any) -> tuple[Solution, Any]:
    """All but the end points and what was observed: a study's memory then hardly grows
    with the size of its points."""
    bare = (None, None, None)
    leave = lambda s: (s.point, s.times, s.history)
    return eqx.tree_at(leave, solution, bare, is_leaf=lambda x: x is None), finding


@checked_arguments
def run_study(
    study: Study[P, F],
    key: Key,
    *,
    dtype: str = "float64",
    device: str | None = None,
    progress: bool | None = None,
    store: Store | None = None,
    keep: Keep | None = None,
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
    - `store`: keeps draws on disk as they are done; those it has are read.
    - `keep`: which parts of the solution and the finding of some draws are held in
      memory, such as `gf.without_points`; a store has all of them.

    **Raises:** `ValueError` for a key that is none, an unknown dtype, a device that
    is not there, or a store of another study; `RuntimeError` if the store can't be
    written. A draw that fails is no error: its `result` says so and it stays in the
    denominator.
    """
    return run_studies(
        {"study": (study, key)},
        dtype=dtype,
        device=device,
        progress=progress,
        store=store,
        keep=keep,
    )["study"]


class Collected:
    """What is held of a study's draws in memory, from chunks in any order."""

    def __init__(self, draws: int, keep: Keep | None):
        self.chunks: set[int] = set()
        self.like: Any = None
        self.seconds: dict[str, float] | None = None
        self._draws, self._keep = draws, keep
        self._whole: list[np.ndarray] = []
        self._structure: Any = None

    def add(self, index: int, rows: range, part: tuple[Any, Any]) -> None:
        """The solutions and findings of one chunk."""
        held = part if self._keep is None else self._keep(*part)
        leaves, self._structure = jax.tree.flatten(held)
        if not self._whole:
            shapes = [(self._draws, *leaf.shape[1:]) for leaf in leaves]
            self._whole = [
                np.empty(shape, leaf.dtype)
                for shape, leaf in zip(shapes, leaves, strict=True)
            ]
        for array, leaf in zip(self._whole, leaves, strict=True):
            array[rows.start : rows.stop] = leaf
        self.chunks.add(index)

    def outcome(self) -> tuple[Any, Any]:
        """Of all draws."""
        return jax.tree.unflatten(self._structure, self._whole)


@checked_arguments
def run_studies(
    studies: Mapping[str, tuple[Study, Key]],
    *,
    dtype: str = "float64",
    device: str | None = None,
    progress: bool | None = None,
    store: Store | None = None,
    keep: Keep | None = None,
) -> dict[str, Outcome]:
    """Runs several studies, each with its key, as `run_study` does one.

    **Raises:** also `ValueError` if draws of other shards are missing in the store.
    """
    collected = {
        name: Collected(int(study.draws), keep) for name, (study, _) in studies.items()
    }
    if store is not None:
        fill_studies(
            studies,
            store,
            dtype=dtype,
            device=device,
            progress=progress,
            collected=collected,
        )
        check_complete(store)
    devices = find_devices(device)
    total = sum(study.draws for study, _ in studies.values())
    outcomes = {}
    with precision(dtype), jax.default_device(devices[0]):
        # What a store has is read in no time.
        with Progress(total, 0, progress if store is None else False) as bar:
            for name, (study, key) in studies.items():
                check_key(key)
                runner = Runner(study, key, dtype, devices)
                bar.studying(name if len(studies) > 1 else "")
                if store is None:
                    rows = [range(study.draws)]
                    solution, finding = runner.draws(rows, study.draws, bar.done, keep)
                    seconds = runner.seconds
                else:
                    cell = store.cells[slug_of(name)]
                    found = collected.pop(name)
                    seconds = found.seconds or runner.seconds
                    solution, finding = _read(cell, found, runner)
                outcomes[name] = Outcome(solution, finding, seconds)
    return outcomes


def fill_studies(
    studies: Mapping[str, tuple[Study, Key]],
    store: Store,
    *,
    dtype: str = "float64",
    device: str | None = None,
    progress: bool | None = None,
    collected: Mapping[str, Collected] | None = None,
) -> None:
    """Computes those chunks of a store that are missing and this shard's, writes each
    while the next is computed, and collects it by the study's name."""
    devices = find_devices(device)
    made = environment(dtype, devices[0])
    with precision(dtype), jax.default_device(devices[0]):
        runners, cells = {}, {}
        for name, (study, key) in studies.items():
            check_key(key)
            runner = runners[name] = Runner(study, key, dtype, devices)
            draws = int(study.draws)
            cells[name] = store.cell(name, draws, runner.fields(), versions())
        done, all_chunks, draws = store.safe()
        if done:
            LOG.info(
                "resuming %s: %d of %d chunks done", store.folder, done, all_chunks
            )
        left = sum(len(c.rows(i)) for c in cells.values() for i in c.todo())
        with Progress(draws + left, draws, progress) as bar, Writer(store) as writer:
            for name, cell in cells.items():
                bar.studying(name if len(studies) > 1 else "")
                runner = runners[name]
                for parts in _computed(runner, cell, bar.done):
                    arrays = {index: arrays_of(*part) for index, part in parts.items()}
                    writer.write(cell, arrays, made)
                    if collected is None:
                        continue
                    for index, part in parts.items():
                        collected[name].add(index, cell.rows(index), part)
                        collected[name].like = jax.tree.map(lambda leaf: leaf[:0], part)
                    collected[name].seconds = runner.seconds


def _computed(
    runner: Runner, cell: Cell, done: Callable[[Any], None]
) -> Generator[dict[int, Any], None, None]:
    """The missing chunks of a cell: as many at once as are computed in `AT_ONCE`
    seconds, so that lanes seldom idle at the end of a queue."""
    queues = QUEUE * runner.study.batch * len(runner.devices)
    whole, most = min(cell.chunk, cell.draws), min(queues, cell.draws)
    todo, count = cell.todo(), 1
    while todo:
        now, todo = todo[:count], todo[count:]
        rows = [cell.rows(index) for index in now]
        began = time.perf_counter()
        found = runner.draws(rows, whole, done, most=most)
        each = (time.perf_counter() - began) / len(now)
        count = max(1, min(int(AT_ONCE / each), most // cell.chunk))
        ends = np.cumsum([len(part) for part in rows])
        yield {
            index: jax.tree.map(lambda leaf: leaf[end - len(part) : end], found)  # noqa: B023
            for index, part, end in zip(now, rows, ends, strict=True)
        }


def check_complete(store: Store) -> None:
    """**Raises:** `ValueError` if chunks are missing, which are other shards'."""
    missing = sum(len(cell.missing()) for cell in store.cells.values())
    if missing:
        number, count = store.shard
        raise ValueError(
            f"{store.folder} is shard {number} of {count}: {missing} chunks are those "
            "of others; when all are done put them together with gradflow merge"
        )


def _read(cell: Cell, found: Collected, runner: Runner) -> tuple[Any, Any]:
    """All draws of a cell: what was not collected when it was computed is read, a chunk
    in memory at a time."""
    left = [index for index in range(cell.chunks) if index not in found.chunks]
    if left:
        like = runner.like() if found.like is None else found.like
        for index in left:
            part = outcome_from(like, cell.read(index)[0])
            found.add(index, cell.rows(index), part)
    return found.outcome()


def check_key(key: Any) -> None:
    """**Raises:** `ValueError` for anything but one key."""
    array = isinstance(key, jax.Array)
    typed = array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = array and key.dtype == jnp.uint32
    if not (typed and key.shape == () or raw and key.shape == (2,)):
        raise ValueError(
            f"key must be one key such as jax.random.key(0), got {type(key).__name__} "
            f"of shape {np.shape(key)}"
        )


class Progress:
    """A bar of draws done, with the shares of their verdicts so far."""

    def __init__(self, total: int, done: int, show: bool | None):
        # tqdm: None means off where stderr is no terminal.
        hide = None if show is None else not show
        self._bar = tqdm(total=total, initial=done, unit=" draws", disable=hide)
        self.studying("")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def studying(self, name: str) -> None:
        self._counts: dict[str, int] = {}
        if name:
            self._bar.set_description(name, refresh=False)

    def done(self, finding: Any) -> None:
        if not self._bar.disable:
            for kind in _kinds(finding):
                self._counts[kind] = self._counts.get(kind, 0) + 1
            total = sum(self._counts.values())
            shares = [f"{k} {n / total:.4g}" for k, n in self._counts.items()]
            self._bar.set_postfix_str(", ".join(shares), refresh=False)
        self._bar.update(len(jax.tree.leaves(finding)[0]))


def _kinds(finding: Any) -> list[str]:
    """The verdicts of findings that have a field `kind`, such as `CriticalPoint`."""
    kind = vars(finding).get("kind") if isinstance(finding, eqx.Module) else None
    if kind is None or not is_member(kind):
        return []
    return list(names_of(kind._enumeration, kind))
