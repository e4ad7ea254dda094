"""Interleaved timing of several callables that do the same work.

One sample of each in turn, round after round, so that a machine that slows down slows
all of them down. What is compared are medians of one run, as ratios to a named
baseline; seconds of different runs are not comparable.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import drawing
import jax

from gradflow.compiling import plain_loops
from gradflow.report import environment


# As the command line has it, for all candidates; no computation was made yet.
os.environ |= plain_loops()

K = TypeVar("K")
# A sample shorter than this is noise of the clock and of dispatch: calls are repeated.
SHORTEST_SAMPLE = 0.1
# To a call this long cold caches make no difference.
LONG = 5.0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to time: a call without arguments, and the seconds that compiling it
    took (`None` where nothing is compiled)."""

    call: Callable[[], Any]
    compile: float | None = None


def compiled(
    function: Callable[..., Any], *arguments: Any
) -> tuple[Callable[..., Any], float]:
    """A traceable function compiled for arguments like these, and the seconds taken."""
    began = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    return program, time.perf_counter() - began


def warmed(call: Callable[[], Any]) -> Candidate:
    """A call that compiles what it needs when it is first made; that took the first
    call's seconds less the second's."""
    first, _ = _timed(call, 1)
    second, _ = _timed(call, 1)
    return Candidate(call, max(0.0, first - second))


def count(text: str) -> int:
    """A whole number >= 1 from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call in each `sample`, a mean over `calls` calls; the result; and
    seconds of the processor, of all threads together, where they were taken."""

    samples: list[float]
    calls: int
    result: Any
    processor: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Largest minus smallest sample, relative to the median."""
        return (max(self.samples) - min(self.samples)) / self.median


def interleave(
    candidates: Mapping[K, Candidate], *, repeats: int = 5
) -> dict[K, Timing]:
    """Times each candidate `repeats` times, in turn, after two calls that are not
    counted. Results are waited for, on any device."""
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    results, calls = {}, {}
    for name, candidate in candidates.items():
        # The first call meets cold caches: it would make the samples too short.
        once, results[name] = _timed(candidate.call, 1)
        if once < LONG:
            once, results[name] = _timed(candidate.call, 1)
        calls[name] = max(1, round(SHORTEST_SAMPLE / max(once, 1e-9)))
    samples: dict[K, list[float]] = {name: [] for name in candidates}
    processor: dict[K, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(repeats):
        # Another one begins each round: the one after a long one finds a cold cache.
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.process_time()
            seconds, _ = _timed(candidates[name].call, calls[name])
            processor[name].append((time.process_time() - began) / calls[name])
            samples[name].append(seconds)
    return {
        name: Timing(samples[name], calls[name], results[name], processor[name])
        for name in names
    }


def _timed(call: Callable[[], Any], calls: int) -> tuple[float, Any]:
    result = None
    began = time.perf_counter()
    for _ in range(calls):
        result = jax.block_until_ready(call())
    return (time.perf_counter() - began) / calls, result


def machine(dtype: str) -> dict[str, Any]:
    """What the numbers depend on: device, dtype, versions, cores."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        **environment(dtype, jax.devices()[0]),
        "scipy": importlib.metadata.version("scipy"),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
    }


def flags(title: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--smoke", action="store_true", help="tiny, a few seconds")
    parser.add_argument("--repeats", type=count, help="samples of each (default 5)")
    parser.add_argument("--out", type=Path, help="folder for the table and its figure")
    return parser


def finish(
    name: str,
    rows: list[dict[str, Any]],
    setting: dict[str, Any],
    out: Path | None,
    failures: list[str],
    draw: Callable[[list[dict[str, Any]], Path], None] = drawing.bars,
) -> int:
    """Prints the table and what is wrong, writes the files, returns the exit code."""
    print(f"\n{text(rows, setting)}")
    if out is not None:
        write(out, name, rows, setting, draw)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def text(rows: list[dict[str, Any]], setting: dict[str, Any]) -> str:
    """The table and what it was made with."""
    made = ", ".join(f"{key} {value}" for key, value in setting.items())
    return f"{table(rows)}\n\nMade with {made}.\n"


def write(
    out: Path,
    name: str,
    rows: list[dict[str, Any]],
    setting: dict[str, Any],
    draw: Callable[[list[dict[str, Any]], Path], None],
) -> None:
    """Writes `name.json`, with every sample, `name.md` and `name.png`."""
    out.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": name, "setting": setting, "rows": rows}
    (out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / f"{name}.md").write_text(text(rows, setting))
    draw(rows, out / f"{name}.png")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; lists (the samples) are left to the JSON file."""
    head = [key for key, value in rows[0].items() if not isinstance(value, list)]
    lines = [head, ["---"] * len(head)]
    lines += [[_cell(row[key]) for key in head] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
