"""Chunks written while the next ones are computed."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from .cell import Cell
from .folder import Store


class Writer:
    """Writes chunks of a store in a thread of its own, one at a time and in order.

    ```
    with Writer(store) as writer:
        writer.write(cell, {index: arrays}, made)
    ```

    When `write` returns, all chunks before these are on disk; after the `with`, all.
    What one could not write is raised by what comes next.
    """

    def __init__(self, store: Store):
        self._store, self._last = store, Future()
        self._last.set_result(None)
        self._pool = ThreadPoolExecutor(1, "gradflow-writer")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self._last.result()

    def write(
        self,
        cell: Cell,
        chunks: dict[int, dict[str, np.ndarray]],
        made: dict[str, Any],
    ) -> None:
        """**Raises:** `RuntimeError` if a chunk before these can't be written."""
        self._last.result()
        self._last = self._pool.submit(self._write, cell, chunks, made)

    def _write(self, cell, chunks, made):
        for index, arrays in chunks.items():
            self._store.write(cell, index, arrays, made)
