r"""What does it cost that a study keeps its draws on disk?

Workload B, verdicts judged by `classify`, without end points held, as `gradflow run`
does it: in memory, and with a new store in each sample, all in one process by turns.
What is compared are the runs of one round, by the clock and by the processor's time.

    python benchmarks/bench_store.py --out FOLDER
"""

import functools
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench_ensemble
import jax
import numpy as np
import scipy.stats
import timing

import gradflow as gf
from gradflow.ensemble import QUEUE
from gradflow.runs import REFILLS


TITLE = "The cost of keeping a study's draws on disk."
MEMORY = "in memory"
BATCH = 256
# Draws per file: one queue of the lanes, as without a store; and `gradflow run`'s own.
CHUNKS = (QUEUE * BATCH, REFILLS * BATCH)


def candidates(draws: int, batch: int, chunks: tuple[int, ...], folder: Path):
    (found,) = (one for one in bench_ensemble.FULL if one.name == "B")
    problem = bench_ensemble.draw(found)
    study = bench_ensemble.judged(problem, draws, batch)
    options: dict[str, Any] = {"progress": False, "keep": gf.without_points}
    numbers = itertools.count()

    def in_memory():
        return gf.run_study(study, problem.key, **options).finding

    def stored(chunk):
        with gf.Store(folder / str(next(numbers)), chunk=chunk) as store:
            return gf.run_study(study, problem.key, store=store, **options).finding

    files = {f"files of {n} draws": functools.partial(stored, n) for n in chunks}
    return {MEMORY: in_memory, **files}


def bench(smoke: bool, repeats: int) -> list[dict[str, Any]]:
    draws, batch, chunks = (64, 8, (32,)) if smoke else (4 * CHUNKS[0], BATCH, CHUNKS)
    with tempfile.TemporaryDirectory() as folder:
        made = candidates(draws, batch, chunks, Path(folder))
        ready = {name: timing.warmed(call) for name, call in made.items()}
        timings = timing.interleave(ready, repeats=repeats)
    base = timings[MEMORY]
    rows = []
    for name, found in timings.items():
        row = {"what": name, "draws": draws, "us per draw": 1e6 * found.median / draws}
        row |= _more("", found.samples, base.samples)
        row |= _more("CPU ", found.processor, base.processor)
        certified = int((found.result.kind == gf.KIND.global_minimum).sum())
        row |= {"speed over baseline": base.median / found.median}
        row |= {"global minimum": certified, "compile s": ready[name].compile}
        row |= {"samples s": found.samples, "CPU samples s": found.processor}
        rows.append(row)
    return rows


def _more(of: str, samples: list[float], base: list[float]) -> dict[str, Any]:
    """How much more a run takes than the one in memory of the same round: the median of
    all rounds and its 95 % interval, whatever the distribution."""
    more = np.array(samples) / np.array(base) - 1
    interval = scipy.stats.quantile_test(more, p=0.5).confidence_interval(0.95)
    return {
        f"{of}overhead": float(np.median(more)),
        f"{of}95 % low": float(interval.low),
        f"{of}95 % high": float(interval.high),
    }


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence for each row that is not as it should be."""
    return [
        f"{row['what']}: {row['global minimum']} of {row['draws']} at the minimum"
        for row in rows
        if row["global minimum"] < row["draws"]
    ]


def main(arguments: list[str] | None = None) -> int:
    given = timing.flags(TITLE).parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    repeats = given.repeats or (2 if given.smoke else 12)
    rows = bench(given.smoke, repeats)
    setting = {**timing.machine("float64"), "repeats": repeats}
    return timing.finish("store", rows, setting, given.out, failures(rows))


if __name__ == "__main__":
    sys.exit(main())
