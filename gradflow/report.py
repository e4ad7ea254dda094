"""What a study found, as a file: configuration, environment, rows, curves."""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


# The packages whose versions can change a number.
VERSIONED = ("gradflow", "jax", "jaxlib", "diffrax", "equinox", "optimistix", "numpy")


@dataclasses.dataclass(frozen=True)
class Report:
    """What one experiment found.

    - `experiment`: its name. `claim`: what it tests, in one sentence.
    - `config`: its settings. `environment`: versions, device, dtype.
    - `rows`: the table, one dict per row, all with the same keys.
    - `notes`: sentences on single draws that need one, such as undecided ones.
    - `figure`: what the figure shows beyond the rows (curves, reference lines).
    - `seconds`: of each stage.

    All made of numbers, strings, lists and dicts: it is stored as JSON.
    """

    experiment: str
    claim: str
    config: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]
    notes: list[str]
    figure: dict[str, Any]
    seconds: dict[str, float]

    def to_json(self) -> str:
        """JSON text; numbers that JSON does not have (NaN, infinity) become null and
        strings."""
        return json.dumps(_plain(dataclasses.asdict(self)), indent=1, allow_nan=False)

    def to_markdown(self) -> str:
        """The claim, the table, and what it was made with."""
        settings = ", ".join(f"{k}={v}" for k, v in self.config.items())
        made = ", ".join(f"{k} {v}" for k, v in self.environment.items())
        times = ", ".join(f"{k} {v:.2f} s" for k, v in self.seconds.items())
        notes = "".join(f"- {note}\n" for note in self.notes)
        return (
            f"# {self.experiment}\n\n{self.claim}\n\n{self.table()}\n\n"
            f"{notes + chr(10) if notes else ''}"
            f"Settings: {settings}.\n\nEnvironment: {made}.\n\nTime: {times}.\n"
        )

    def table(self) -> str:
        """The rows as a Markdown table, aligned to be read as plain text too."""
        head = list(self.rows[0])
        body = [[_cell(row[key]) for key in head] for row in self.rows]
        wide = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = [head, ["-" * width for width in wide], *body]
        return "\n".join(
            "| "
            + " | ".join(c.ljust(w) for c, w in zip(line, wide, strict=True))
            + " |"
            for line in lines
        )

    def write(self, folder: Path) -> None:
        """Writes `report.json` and `report.md`, each whole or not at all.

        **Raises:** `ValueError` if the folder holds the report of other settings.
        """
        folder.mkdir(parents=True, exist_ok=True)
        existing = folder / "report.json"
        if existing.exists():
            found = read_report(folder)
            mine = json.loads(self.to_json())
            if (found.experiment, found.config) != (mine["experiment"], mine["config"]):
                raise ValueError(
                    f"{folder} holds a report of {found.experiment} with other "
                    "settings: give a new folder with --out"
                )
        write_whole(existing, self.to_json().encode())
        write_whole(folder / "report.md", self.to_markdown().encode())


def read_report(folder: Path) -> Report:
    """Reads what `Report.write` wrote.

    **Raises:** `ValueError` if there is none or it is damaged.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no report.json: give a folder written by gradflow run"
        )
    try:
        return Report(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): run the study again") from None


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def environment(dtype: str, device: Any) -> dict[str, Any]:
    """What the numbers may depend on beside the settings."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    return {
        "python": platform.python_version(),
        **versions,
        "device": f"{device.platform} ({device.device_kind})",
        "dtype": dtype,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray) or hasattr(value, "__jax_array__"):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return _plain(np.asarray(value).tolist())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
