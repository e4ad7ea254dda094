"""As many draws as an answer takes, and an interval that holds all the same."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .arguments import check, checked_arguments
from .environment import environment, versions
from .precision import find_devices, precision
from .runner import Runner
from .statistics import counted, Fraction
from .store.arrays import arrays_of, outcome_from
from .store.folder import CHUNK, Store
from .study import check_key, Outcome, Progress, Study
from .types import Key


@dataclasses.dataclass(frozen=True)
class Narrower:
    """Until the interval, with undecided draws counted both ways, is no wider than
    `width`.

    **Raises:** `ValueError` unless 0 < width < 1.
    """

    width: float

    def __post_init__(self):
        _check_probability("width", self.width)

    def __call__(self, share: Fraction) -> bool:
        return share.outer_high - share.outer_low <= self.width


@dataclasses.dataclass(frozen=True)
class Decided:
    """Until it is certain whether the probability is below or above a number.

    **Raises:** `ValueError` unless 0 < probability < 1.
    """

    probability: float

    def __post_init__(self):
        _check_probability("probability", self.probability)

    def __call__(self, share: Fraction) -> bool:
        return not share.outer_low <= self.probability <= share.outer_high


@checked_arguments
def run_until(
    study: Study,
    key: Key,
    flag: Callable[[Any], Any],
    until: Callable[[Fraction], bool],
    *,
    every: int = CHUNK,
    dtype: str = "float64",
    device: str | None = None,
    progress: bool | None = None,
    store: Store | None = None,
) -> tuple[Outcome, Fraction]:
    """Runs draws 0, 1, ... until the share of those flagged answers a question, at most
    `study.draws`. The interval is one of a confidence sequence: it covers the true
    probability in 95 % of studies whatever the rule.

    **Arguments:**

    - `flag`: from findings with a leading axis of draws to which are flagged, or to
      that and which are undecided.
    - `until`: such as `Narrower(0.05)` or `Decided(0.01)`.
    - `every`: draws between two looks; those of a `store` are its chunks.

    The others are those of `run_study`.

    **Raises:** `ValueError` as `run_study`, or for a store of a shard.
    """
    check_key(key)
    if store is not None and store.shard != (1, 1):
        raise ValueError(
            f"{store.folder} is shard {store.shard[0]} of {store.shard[1]}: when to "
            "stop can't be seen from a part of the draws"
        )
    if isinstance(every, bool) or every < 1:
        raise ValueError(f"every must be a whole number >= 1, got {every}")
    devices = find_devices(device)
    with precision(dtype), jax.default_device(devices[0]):
        runner = Runner(study, key, dtype, devices)
        cell = None
        if store is not None:
            cell = store.cell("study", study.draws, runner.fields(), versions())
            every = cell.chunk
        made = environment(dtype, devices[0])
        parts, counts, share = [], np.zeros(3, dtype=int), counted(0, 1)
        with Progress(study.draws, 0, progress) as bar:
            for index in range(-(-study.draws // every)):
                first = index * every
                rows = range(first, min(first + every, study.draws))
                if cell is not None and index in cell.done:
                    like = parts[0] if parts else runner.like()
                    part = outcome_from(like, cell.read(index)[0])
                    bar.done(part[1])
                else:
                    part = runner.draws([rows], min(every, study.draws), bar.done)
                    if store is not None and cell is not None:
                        store.write(cell, index, arrays_of(*part), made)
                parts.append(part)
                counts += _counts(flag(part[1]), len(rows))
                share = counted(*map(int, counts), sequential=True)
                if until(share):
                    break
    solution, finding = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return Outcome(solution, finding, runner.seconds), share


def _counts(flagged: Any, draws: int) -> np.ndarray:
    """Flagged, all and undecided draws."""
    flags, undecided = flagged if isinstance(flagged, tuple) else (flagged, None)
    flags = np.asarray(flags)
    undecided = np.zeros_like(flags) if undecided is None else np.asarray(undecided)
    for array in (flags, undecided):
        if array.dtype != bool or array.shape != (draws,):
            raise ValueError(
                f"flag must give one truth value per draw ({draws}), got {array.dtype} "
                f"of shape {array.shape}"
            )
    if np.any(flags & undecided):
        raise ValueError("flag gives a draw as flagged and as undecided: only one")
    return np.array([flags.sum(), draws, undecided.sum()])


def _check_probability(name: str, value: float) -> None:
    check(name, value, float)
    if not 0 < value < 1:
        raise ValueError(f"{name} must be a number between 0 and 1, got {value!r}")
