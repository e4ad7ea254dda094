r"""What does it cost that a study keeps its draws on disk?

Workload B, verdicts judged by `classify`, without end points held, as `gradflow run`
does it: in memory, and with a new store in each sample, both in one process by turns.

    python benchmarks/bench_store.py --out FOLDER
"""

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench_ensemble
import jax
import timing

import gradflow as gf


TITLE = "The cost of keeping a study's draws on disk."
MEMORY, STORE = "in memory", "with a store"


def candidates(draws: int, batch: int, chunk: int, folder: Path):
    (found,) = (one for one in bench_ensemble.FULL if one.name == "B")
    problem = bench_ensemble.draw(found)
    study = bench_ensemble.judged(problem, draws, batch)
    numbers = itertools.count()

    def in_memory():
        return gf.run_study(
            study, problem.key, progress=False, keep=gf.without_points
        ).finding

    def stored():
        with gf.Store(folder / str(next(numbers)), chunk=chunk) as store:
            return gf.run_study(
                study, problem.key, progress=False, store=store, keep=gf.without_points
            ).finding

    return {MEMORY: in_memory, STORE: stored}


def bench(smoke: bool, repeats: int) -> list[dict[str, Any]]:
    # A chunk is one queue of the lanes, as without a store.
    draws, batch, chunk = (64, 8, 32) if smoke else (2**18, 256, 2**15)
    with tempfile.TemporaryDirectory() as folder:
        made = candidates(draws, batch, chunk, Path(folder))
        ready = {name: timing.warmed(call) for name, call in made.items()}
        timings = timing.interleave(ready, repeats=repeats)
    base = timings[MEMORY].median
    return [
        {
            "what": name,
            "draws": draws,
            "us per draw": 1e6 * found.median / draws,
            "spread": found.spread,
            "overhead": found.median / base - 1,
            "speed over baseline": base / found.median,
            "global minimum": int((found.result.kind == gf.KIND.global_minimum).sum()),
            "compile s": ready[name].compile,
            "samples s": found.samples,
        }
        for name, found in timings.items()
    ]


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
    repeats = given.repeats or (2 if given.smoke else 5)
    rows = bench(given.smoke, repeats)
    setting = {**timing.machine("float64"), "repeats": repeats}
    return timing.finish("store", rows, setting, given.out, failures(rows))


if __name__ == "__main__":
    sys.exit(main())
