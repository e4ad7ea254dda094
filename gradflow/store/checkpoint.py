"""How far a draw is that takes minutes: its state, kept until the draw is done."""

import logging

import numpy as np

from .cell import Cell
from .chunk import Damaged, pack, unpack
from .files import write_whole


LOG = logging.getLogger("gradflow")
# Beside chunk-000003.npz, and of the same format.
STATE = ".state"


class Checkpoint:
    """The state of one draw of a cell whose chunks are single draws. It is no more than
    time saved: a damaged one is left aside, and the draw begins anew."""

    def __init__(self, cell: Cell, index: int):
        self.path = cell.path(index).with_suffix(STATE)
        self._whose = {"study": cell.identity, "first": index * cell.chunk}

    def write(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """**Raises:** `OSError` if the disk is full."""
        write_whole(self.path, pack(arrays, {"step": step, **self._whose}))

    def read(self) -> tuple[int, dict[str, np.ndarray]] | None:
        """The step and the arrays last written, `None` if there are none to use."""
        try:
            arrays, made = unpack(self.path.read_bytes())
            if {key: made.get(key) for key in self._whose} != self._whose:
                raise Damaged("it is of another study")
        except FileNotFoundError:
            return None
        except (Damaged, OSError) as error:
            LOG.warning("%s can't be used (%s): its draw begins anew", self.path, error)
            return None
        return made["step"], arrays

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def begun(cell: Cell) -> bool:
    """Whether a draw is under way."""
    return any(cell.folder.glob("*" + STATE))
