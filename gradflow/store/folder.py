"""A folder that keeps a study's draws, chunk by chunk, while they are computed.

    DIR/draws/study.json             what the study is, and what it was begun with
    DIR/draws/lock                   held by the one process that writes
    DIR/draws/NAME/cell.json         one study of several: its key, functions, arrays
    DIR/draws/NAME/chunk-000003.npz  its draws 3 n to 4 n, see `chunk.py`

Every file is written whole (`files.py`), so a process may be killed at any time: what
has a name is complete, the rest is computed again.
"""

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import checked_arguments
from .cell import Cell
from .checkpoint import begun
from .difference import differences, FREE
from .files import canonical, PART, plain, sync_folder, write_whole


try:
    import fcntl
except ImportError:  # Windows: two writers are not told of each other
    fcntl = None

LOG = logging.getLogger("gradflow")
FORMAT = 1
# Draws per chunk: enough for lanes to be refilled often, few enough to lose.
CHUNK = 1024


class Store:
    """A folder in which `run_study` keeps draws and finds them again.

    ```
    with gf.Store("runs/a") as store:
        outcome = gf.run_study(study, jr.key(0), store=store)
    ```

    computes what is missing in `runs/a` and reads the rest. Another study is refused;
    `draws` may be raised.

    - `settings`: what the study is, beside its own functions and arrays: numbers, text,
      lists and dicts. `experiment`: the name of what makes it.
    - `chunk`: draws per file. By default as the folder has it, or 1024.
    - `shard`: (i, n) computes every n-th chunk only, for `merge` with the others.

    **Raises:** `ValueError` for a chunk or shard out of range, and on entering for
    settings that differ from the folder's; `RuntimeError` if another process is writing
    there.
    """

    @checked_arguments
    def __init__(
        self,
        folder: Path | str,
        settings: Mapping[str, Any] | None = None,
        *,
        experiment: str = "",
        chunk: int | None = None,
        shard: tuple[int, int] = (1, 1),
    ):
        if chunk is not None and (_not_whole(chunk) or chunk < 1):
            raise ValueError(f"chunk must be a whole number >= 1, got {chunk!r}")
        self.folder, self.chunk = Path(folder), chunk
        self.shard = _checked_shard(shard)
        self.cells: dict[str, Cell] = {}
        self.experiment, self.settings = experiment, plain(dict(settings or {}))
        self._root = self.folder / "draws"
        self._lock: int | None = None
        self._made: list[Path] = []
        self._versions: dict[str, str] = {}

    def __enter__(self) -> "Store":
        self._make(self._root)
        try:
            self._take_lock()
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            if not any(cell.done or begun(cell) for cell in self.cells.values()):
                self._leave_nothing()
            os.close(self._lock)
            self._lock = None

    def cell(
        self, name: str, draws: int, fields: dict[str, Any], versions: dict[str, str]
    ) -> Cell:
        """The chunks of one study, by its name. `fields`: what it is made of.
        `versions`: of the packages that its numbers depend on.

        **Raises:** `ValueError` if the folder has other fields under this name, or if
        the store was not entered.
        """
        if self._lock is None or self.chunk is None:
            raise ValueError(
                f"the store {self.folder} is not open: use it as `with Store(...) as "
                "store:`"
            )
        slug = slug_of(name)
        if slug in self.cells:
            raise ValueError(f"two studies of {self.folder} are named {name!r}")
        path = self._root / slug / "cell.json"
        asked = {"name": name, "draws": draws, **plain(fields), "versions": versions}
        saved = read_json(path)
        if saved is None:
            self._make(path.parent)
            save_json(path, asked)
            self._made.append(path)
        else:
            other = _other_versions(saved.get("versions", {}), versions)
            if other and other != self._versions:
                self._versions = other
                LOG.warning(
                    "%s was begun with %s: new draws may differ from what those would "
                    "have been in their last digits",
                    self.folder,
                    ", ".join(f"{k} {v}" for k, v in other.items()),
                )
            # Other versions print the same code otherwise.
            skip = FREE | {"versions"} | ({"code"} if other else set())
            self._refuse(differences(saved, asked, skip=skip))
            asked = {**saved, "draws": draws}
            if saved != asked:
                save_json(path, asked)
        turn = (len(self.cells), *self.shard)
        cell = Cell(path.parent, asked, self.chunk, self._identity, turn)
        cell.look(repair=True)
        self.cells[slug] = cell
        return cell

    def safe(self) -> tuple[int, int, int]:
        """How many of this shard's chunks are done, how many it has, and the draws in
        those done."""
        cells = self.cells.values()
        done = [(c, i) for c in cells for i in c.done if c.mine(i)]
        left = sum(len(cell.todo()) for cell in cells)
        return len(done), len(done) + left, sum(c.done[i] for c, i in done)

    def write(
        self,
        cell: Cell,
        index: int,
        arrays: dict[str, np.ndarray],
        made: dict[str, Any],
    ) -> None:
        """Writes a chunk.

        **Raises:** `RuntimeError` if it can't be written.
        """
        try:
            cell.write(index, arrays, made)
        except OSError as error:
            raise self.full(cell, index, error) from error

    def full(self, cell: Cell, index: int, error: OSError) -> RuntimeError:
        """What to tell of a chunk that can't be written."""
        chunks, _, draws = self.safe()
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        return RuntimeError(
            f"could not write chunk {index} of {cell.name} to {self.folder} "
            f"({reason}). {chunks} chunks ({draws} draws) are safe; free space and run "
            "the same command to go on"
        )

    def _begin(self) -> None:
        path = self._root / "study.json"
        saved = read_json(path)
        chunk = CHUNK
        if saved is not None:
            check_format(saved, self.folder)
            chunk = saved["chunk"]
        self.chunk = chunk if self.chunk is None else self.chunk
        asked = {
            "format": FORMAT,
            "experiment": self.experiment,
            "settings": self.settings,
            "chunk": self.chunk,
            "shard": list(self.shard),
        }
        if saved is not None:
            self._refuse(differences(saved, asked))
        self._identity = identity_of(asked)
        for part in self._root.glob("*" + PART):
            part.unlink()
        if saved != asked:
            save_json(path, asked)
            if saved is None:
                self._made.append(path)

    def _refuse(self, differ: list[str]) -> None:
        if differ:
            what = "; ".join(differ[:4]) + "; ..." * (len(differ) > 4)
            raise ValueError(
                f"{self.folder} was started with different settings: {what}. Use a new "
                "folder"
            )

    def _take_lock(self) -> None:
        path = self._root / "lock"
        while True:
            known = path.exists()
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if fcntl is None:
                break
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(lock, 200).decode(errors="replace").strip()
                os.close(lock)
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                who = f" ({holder})" if holder else ""
                raise RuntimeError(
                    f"another process{who} is writing {self.folder}: wait for it, or "
                    "use a new folder"
                ) from None
            # It may have been another's, who has just removed it.
            if _is_at(lock, path):
                break
            os.close(lock)
        self._lock = lock
        if not known:
            self._made.append(path)
        os.ftruncate(lock, 0)
        os.write(lock, f"pid {os.getpid()}".encode())

    def _make(self, folder: Path) -> None:
        """Makes a folder and those above it, and remembers which."""
        missing = [p for p in (folder, *folder.absolute().parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            sync_folder(made.parent)
        self._made += reversed(missing)

    def _leave_nothing(self) -> None:
        """Takes back what was made here, as long as nothing else is in it."""
        for path in reversed(self._made):
            try:
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
            except OSError:  # something else is in it
                pass


def slug_of(name: str) -> str:
    """The name of a study's folder."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", name).strip("-.") or "study"


def identity_of(study: dict[str, Any]) -> str:
    """A hash of what must not change in study.json; shards have the same."""
    settings = {
        name: value
        for name, value in study["settings"].items()
        if name not in FREE | {"draws"}
    }
    whose = canonical([study["experiment"], settings, study["chunk"]])
    return hashlib.sha256(whose.encode()).hexdigest()[:16]


def read_study(folder: Path) -> tuple[dict[str, Any], list[Cell]]:
    """What the study in a folder is, and its cells with what is sound of them, in the
    order of their names. Needs no lock and changes nothing.

    **Raises:** `ValueError` if there is none.
    """
    study = read_json(folder / "draws" / "study.json")
    if study is None:
        raise ValueError(
            f"{folder} has no draws/study.json: give a folder in which gradflow run "
            "keeps its draws"
        )
    check_format(study, folder)
    cells = []
    for path in sorted((folder / "draws").glob("*/cell.json")):
        fields = read_json(path)
        assert fields is not None  # it was just listed
        cell = Cell(path.parent, fields, study["chunk"], identity_of(study))
        cell.look(repair=False)
        cells.append(cell)
    return study, cells


def check_format(study: dict[str, Any], folder: Path) -> None:
    if study.get("format") != FORMAT:
        raise ValueError(
            f"{folder} is of format {study.get('format')}, this gradflow reads format "
            f"{FORMAT}: use a new folder"
        )


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, `None` if there is no file.

    **Raises:** `ValueError` if it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): use a new folder") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no object): use a new folder")
    return content


def save_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(plain(content), indent=1) + "\n").encode())


def _other_versions(saved: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """What was used, and is used now, where that differs."""
    return {
        name: f"{version}, this is {now[name]}"
        for name, version in saved.items()
        if name in now and now[name] != version
    }


def _is_at(opened: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened), os.stat(path))
    except FileNotFoundError:
        return False


def _not_whole(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, (int, np.integer))


def _checked_shard(shard: tuple[int, int]) -> tuple[int, int]:
    number, count = shard
    if _not_whole(number) or _not_whole(count) or not 1 <= number <= count:
        raise ValueError(
            f"shard={number}/{count} must be i/n with whole numbers 1 <= i <= n"
        )
    return int(number), int(count)
