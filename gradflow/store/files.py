"""What goes to disk: plain values as JSON, and files that are whole or not there."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


# Ends the name of a file that is being written.
PART = ".part"


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part;
    when this returns the new one survives a power cut."""
    temporary = path.with_name(path.name + PART)
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    if os.name == "nt":  # no folder can be opened there
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def plain(value: Any) -> Any:
    """The value made of what JSON has: NaN becomes null, infinity a string.

    **Raises:** `ValueError` for anything but numbers, text, lists and dicts of them.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    array = np.asarray(value)
    if array.dtype == object and array.ndim == 0:
        raise ValueError(f"{value!r} can't be stored: give numbers, text, lists, dicts")
    return plain(array.tolist())


def canonical(value: Any) -> str:
    """The JSON text of a value, the same for equal values."""
    return json.dumps(
        plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False
    )
