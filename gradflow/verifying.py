"""Is what a folder has what would be computed again?"""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .arguments import checked_arguments
from .environment import environment
from .precision import check_dtype, find_devices, precision
from .report import Report
from .runner import Runner
from .store.arrays import arrays_of
from .store.cell import Cell
from .store.files import canonical
from .store.folder import read_study, slug_of
from .store.merging import same
from .types import Key


@dataclasses.dataclass(frozen=True)
class Checked:
    """`sound`: nothing differs but last digits, and these only where versions or
    devices do. `summary`: that in one line, of the `lines` on each part."""

    sound: bool
    summary: str
    lines: list[str]


@checked_arguments
def verify_studies(
    studies: Mapping[str, tuple[Any, Key]],
    folder: Path | str,
    *,
    chunks: int = 3,
    dtype: str = "float64",
    device: str | None = None,
    progress: bool | None = None,
) -> Checked:
    """Computes `chunks` chunks of a folder again, evenly spread over what it has, and
    compares. `studies`: as `run_studies` was given them.

    **Raises:** `ValueError` for a folder without draws, or of other studies.
    """
    if isinstance(chunks, bool) or chunks < 1:
        raise ValueError(f"chunks must be a whole number >= 1, got {chunks}")
    del progress  # chunks are few
    devices = find_devices(device)
    check_dtype(dtype)
    _, cells = read_study(Path(folder))
    by_slug = {slug_of(name): (name, *study) for name, study in studies.items()}
    every = [(cell, index) for cell in cells for index in sorted(cell.done)]
    unknown = [cell.name for cell in cells if slug_of(cell.name) not in by_slug]
    if unknown or not every:
        what = f"draws of {unknown[0]}, which is not asked" if unknown else "no draws"
        raise ValueError(f"{folder} has {what}: nothing can be compared")
    places = np.unique(np.linspace(0, len(every) - 1, chunks).round().astype(int))
    lines, verdicts = [], []
    with precision(dtype), jax.default_device(devices[0]):
        runners: dict[str, Runner] = {}
        for place in places:
            cell, index = every[place]
            name, study, key = by_slug[slug_of(cell.name)]
            if name not in runners:
                runners[name] = Runner(study, key, dtype, devices)
            verdict, text = _compared(runners[name], cell, index)
            verdicts.append(verdict)
            lines.append(f"chunk {index} of {cell.name}: {text}")
    count = f"{len(lines)} of {len(every)} chunks computed again"
    if all(verdict == "same" for verdict in verdicts):
        return Checked(True, f"{count}: the same bits", lines)
    if "other" in verdicts:
        first = lines[verdicts.index("other")]
        return Checked(False, f"{count}: not the same; {first}", lines)
    first = lines[verdicts.index("digits")]
    return Checked(True, f"{count}: the same verdicts; {first}", lines)


def _compared(runner: Runner, cell: Cell, index: int) -> tuple[str, str]:
    """How a chunk compares: same, (last) digits, or other; and that in words."""
    saved, made = cell.read(index)
    rows, whole = cell.rows(index), min(cell.chunk, cell.draws)
    again = arrays_of(*runner.draws([rows], whole, lambda finding: None))
    if same(saved, again):
        return "same", "the same bits"
    if saved.keys() != again.keys():
        return "other", "its arrays have other names"
    for name, array in saved.items():
        if array.dtype.kind in "SU" and array.shape == again[name].shape:
            differ = array != again[name]
            # What rests on rounding may come out otherwise.
            limited = saved.get("finding.precision_limited")
            if limited is not None:
                differ &= ~limited & ~again["finding.precision_limited"]
            if differ.any():
                draw = rows[int(np.flatnonzero(differ)[0])]
                count = int(differ.sum())
                return "other", f"{count} draws differ in {name}, first draw {draw}"
    largest = max(_difference(saved[name], again[name]) for name in saved)
    text = f"values differ by at most {largest:.2g} of their size"
    here = environment(runner.dtype, runner.devices[0])
    others = [f"{k} {made.get(k)}" for k in here if made.get(k) != here[k]]
    if others:
        return "digits", f"{text}; it was made with {', '.join(others)}"
    return "other", f"{text}, with the same versions on the same device"


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference relative to the largest number, if they are numbers."""
    if one.dtype.kind not in "fc" or one.shape != other.shape or one.size == 0:
        return 0.0
    finite = np.isfinite(one) & np.isfinite(other)
    if not finite.any():
        return 0.0
    scale = float(np.max(np.abs(one[finite])))
    return float(np.max(np.abs(one[finite] - other[finite]))) / (scale or 1.0)


def same_rows(before: Report, again: Report) -> Checked:
    """Compares the table of a report that was read with that of one made again."""
    rows = json.loads(canonical(again.rows))
    differ = [
        f"row {number}: {there}, now {here}"
        for number, (there, here) in enumerate(itertools.zip_longest(before.rows, rows))
        if there != here
    ]
    if not differ:
        return Checked(True, f"{len(rows)} rows computed again: the same", [])
    text = f"{len(differ)} of {len(rows)} rows computed again are not the same"
    return Checked(False, text, differ)
