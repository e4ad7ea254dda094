"""The chunks of one study on disk: which are there, which are missing, each checked."""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from .chunk import Damaged, pack, unpack
from .files import canonical, PART, write_whole


LOG = logging.getLogger("gradflow")


class Cell:
    """The chunks of one study, `chunk` draws each but for the last.

    - `fields`: its name, draws, key and what else it is made of.
    - `study`: a hash of the settings of the whole. A chunk says whose it is.
    - `turn`: this study's place among those of its store, and the shard (i, n).
    - `done`: how many draws each sound chunk has.
    """

    def __init__(
        self,
        folder: Path,
        fields: dict[str, Any],
        chunk: int,
        study: str,
        turn: tuple[int, int, int] = (0, 1, 1),
    ):
        self.folder, self.fields, self.chunk = folder, fields, chunk
        self.name, self.draws = fields["name"], fields["draws"]
        whose = canonical([study, self.name, fields.get("key")])
        self.identity = hashlib.sha256(whose.encode()).hexdigest()[:16]
        self._turn = turn
        self.done: dict[int, int] = {}

    @property
    def chunks(self) -> int:
        return -(-self.draws // self.chunk)

    def rows(self, index: int) -> range:
        """The draws of a chunk."""
        first = index * self.chunk
        return range(first, min(first + self.chunk, self.draws))

    def path(self, index: int) -> Path:
        return self.folder / f"chunk-{index:06d}.npz"

    def mine(self, index: int) -> bool:
        """Whether it is this shard's to compute; chunks are dealt out like cards."""
        place, shard, count = self._turn
        return (index + place) % count == shard - 1

    def todo(self) -> list[int]:
        """The chunks that this shard has yet to compute."""
        return [index for index in self.missing() if self.mine(index)]

    def missing(self) -> list[int]:
        """The chunks that are not here, whosever they are."""
        return [index for index in range(self.chunks) if index not in self.done]

    def look(self, *, repair: bool) -> None:
        """Sees what is there. `repair`: what is damaged is moved away, and what was
        being written is removed; only for who holds the lock."""
        if repair:
            for part in self.folder.glob("*" + PART):
                part.unlink()
        for index in range(self.chunks):
            path = self.path(index)
            if not path.exists():
                continue
            try:
                _, made = self._checked(index)
            except Damaged as error:
                text = f"chunk {index} of {self.name} is damaged ({error})"
                if repair:
                    bad = path.with_name(path.name + ".bad")
                    os.replace(path, bad)
                    text += f"; moved to {bad.name}, to be computed again"
                LOG.warning(text)
            else:
                # The last one may be short of draws that have been raised since.
                if made["count"] == len(self.rows(index)):
                    self.done[index] = made["count"]

    def write(
        self, index: int, arrays: dict[str, np.ndarray], made: dict[str, Any]
    ) -> None:
        """**Raises:** `OSError` if the disk is full."""
        rows = self.rows(index)
        whose = {"study": self.identity, "first": rows.start, "count": len(rows)}
        write_whole(self.path(index), pack(arrays, {**made, **whose}))
        self.done[index] = len(rows)

    def read(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays of a chunk, and what it was made with.

        **Raises:** `ValueError` if it is not there or damaged.
        """
        try:
            return self._checked(index)
        except (Damaged, OSError) as error:
            raise ValueError(
                f"{self.path(index)} can't be used ({error}): run the study again, "
                "which computes it again"
            ) from None

    def _checked(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays, made = unpack(self.path(index).read_bytes())
        first, count = index * self.chunk, made.get("count")
        if (made.get("study"), made.get("first")) != (self.identity, first):
            raise Damaged("it is of another study")
        # Never more than asked: draws can't be lowered.
        if type(count) is not int or not 0 < count <= len(self.rows(index)):
            raise Damaged("it has other draws")
        if any(array.shape[:1] != (count,) for array in arrays.values()):
            raise Damaged("its arrays are not of its draws")
        return arrays, made
