"""Shards of one study put together."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import checked_arguments
from .cell import Cell
from .difference import differences, FREE
from .files import write_whole
from .folder import read_study, Store


LOG = logging.getLogger("gradflow")


@checked_arguments
def merge(folders: Sequence[Path | str], out: Path | str) -> dict[str, Any]:
    """Copies the chunks of several folders of one study into `out`, each checked.

    Returns what study.json of `out` says. A chunk that several folders have is taken
    from the first.

    **Raises:** `ValueError` if the folders are of different studies, `RuntimeError` if
    `out` can't be written.
    """
    folders = [Path(folder) for folder in folders]
    if not folders:
        raise ValueError("folders is empty: give at least one")
    read = [read_study(folder) for folder in folders]
    whole, _ = read[0]
    for folder, (study, _) in zip(folders, read, strict=True):
        _refuse(folders[0], folder, whole, study)
    by_name: dict[str, list[Cell]] = {}
    for folder, (_, cells) in zip(folders, read, strict=True):
        for cell in cells:
            others = by_name.setdefault(cell.name, [])
            if others:
                _refuse(folders[0], folder, others[0].fields, cell.fields)
            others.append(cell)
    store = Store(
        out,
        whole["settings"],
        experiment=whole["experiment"],
        chunk=whole["chunk"],
    )
    with store:
        for name, cells in by_name.items():
            fields = {
                key: value
                for key, value in cells[0].fields.items()
                if key not in ("name", "draws", "versions")
            }
            versions = cells[0].fields["versions"]
            to = store.cell(name, cells[0].draws, fields, versions)
            _gather(store, to, cells)
    return {**whole, "shard": [1, 1]}


def _gather(store: Store, to: Cell, cells: list[Cell]) -> None:
    for cell in cells:
        twice = 0
        for index, count in cell.done.items():
            if index in to.done:
                twice += not same(cell.read(index)[0], to.read(index)[0])
                continue
            content = cell.path(index).read_bytes()
            try:
                write_whole(to.path(index), content)
            except OSError as error:
                raise store.full(to, index, error) from error
            to.read(index)
            to.done[index] = count
        if twice:
            LOG.warning(
                "%d chunks of %s in %s differ from those of the folders before it, "
                "which were taken",
                *(twice, cell.name, cell.folder.parent.parent),
            )


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether two chunks hold the same bits."""
    return one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind in "fc")
        for name in one
    )


def _refuse(first: Path, folder: Path, one: dict[str, Any], other: dict[str, Any]):
    skip = FREE | {"shard", "versions"}
    if one.get("versions") != other.get("versions"):
        skip |= {"code"}
    # Both ways, as draws may be raised but not differ.
    differ = differences(one, other, skip=skip) or differences(other, one, skip=skip)
    if differ:
        raise ValueError(
            f"{first} (saved) and {folder} (asked) are of different studies: "
            f"{'; '.join(differ[:4])}"
        )


def missing(folder: Path | str) -> int:
    """How many chunks a folder still lacks."""
    _, cells = read_study(Path(folder))
    return sum(len(cell.missing()) for cell in cells)
