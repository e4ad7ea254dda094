"""What a study found, as a file: configuration, environment, rows, curves."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from .arguments import check_all_fields, checked_arguments
from .environment import (
    environment as environment,
    TRAJECTORIES as TRAJECTORIES,
    VERDICTS as VERDICTS,
)
from .store.difference import FREE
from .store.files import plain, write_whole


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

    def __post_init__(self):
        check_all_fields(self)

    def to_json(self) -> str:
        """JSON text; numbers that JSON does not have (NaN, infinity) become null and
        strings."""
        return json.dumps(plain(dataclasses.asdict(self)), indent=1, allow_nan=False)

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
        if not self.rows:
            return "(no rows)"
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

        **Raises:** as `check_folder`.
        """
        folder = Path(folder)
        check_folder(folder, self.experiment, self.config)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "report.json", self.to_json().encode())
        write_whole(folder / "report.md", self.to_markdown().encode())


@checked_arguments
def read_report(folder: Path | str) -> Report:
    """Reads what `Report.write` wrote.

    **Raises:** `ValueError` if there is none or it is damaged.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no report.json: give a folder written by gradflow run"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    expected = {
        "experiment": str,
        "claim": str,
        "config": dict,
        "environment": dict,
        "rows": list,
        "notes": list,
        "figure": dict,
        "seconds": dict,
    }
    if not isinstance(content, dict) or content.keys() != expected.keys():
        raise _damaged(path, f"its keys are not {', '.join(expected)}")
    for key, kind in expected.items():
        if not isinstance(content[key], kind):
            raise _damaged(path, f"{key} is no {kind.__name__}")
    return Report(**content)


def check_folder(folder: Path, experiment: str, config: dict[str, Any]) -> None:
    """Checks that a report of this experiment with these settings can go to `folder`.

    **Raises:** `ValueError` if it is no folder, can't be written to, or holds the
    report of other settings (draws may be raised) or a damaged one.
    """
    present = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
        reason = "not writable" if present.is_dir() else "no folder"
        raise ValueError(f"{present} is {reason}: give another folder with --out")
    if not (folder / "report.json").exists():
        return
    found = read_report(folder)
    mine = json.loads(json.dumps(plain(config)))
    # A study goes on with more draws, or elsewhere.
    goes_on = set(FREE)
    if _whole(found.config.get("draws"), mine.get("draws")):
        if mine["draws"] > found.config["draws"]:
            goes_on.add("draws")
    differ = [
        f"{key} was {found.config.get(key)}, now {mine.get(key)}"
        for key in {**found.config, **mine}
        if key not in goes_on and found.config.get(key) != mine.get(key)
    ]
    if found.experiment != experiment:
        differ = [f"experiment was {found.experiment}, now {experiment}"]
    if differ:
        what = "; ".join(differ[:3]) + "; ..." * (len(differ) > 3)
        raise ValueError(
            f"{folder} holds a report of {found.experiment} with other settings "
            f"({what}): give a new folder with --out"
        )


def _whole(*values: Any) -> bool:
    return all(type(value) is int for value in values)


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} is damaged ({what}): move it away and run the study again"
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        shown = f"{value:.4g}"
        # A share that is not 1 must not look like it: 1 - 3.7e-6.
        return f"1 - {1 - value:.2g}" if shown == "1" and value < 1 else shown
    return str(value)
