r"""What a study waits for before its first verdict: compilation, in a process that
finds nothing compiled, and in one that finds what an earlier one kept.

Each sample is a new process that runs one study twice; compiling took the first run's
seconds less the second's. The settings are those of `gradflow run`, which keeps what it
compiles in the user's cache folder, here an empty one.

    python benchmarks/bench_compile.py --out FOLDER
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from gradflow.compiling import compile_fast, keep_compiled


WORKLOADS = ("A", "B", "E")
COLD, FAST, KEPT = "cold", "cold, as gradflow demo", "new process, kept"
SETTINGS = (COLD, KEPT, FAST)


def child(workload: str, smoke: bool) -> dict[str, Any]:
    """Runs the study twice in this process."""
    began = time.perf_counter()
    import bench_ensemble
    import jax
    import numpy as np

    import gradflow as gf

    jax.config.update("jax_enable_x64", True)
    sizes = bench_ensemble.SMOKE if smoke else bench_ensemble.FULL
    (found,) = (one for one in sizes if one.name == workload)
    problem = bench_ensemble.draw(found)
    study = bench_ensemble.judged(problem, found.resident, found.resident)
    seconds = {"before the study": time.perf_counter() - began}
    for name in ("first run", "second run"):
        began = time.perf_counter()
        outcome = gf.run_study(study, problem.key, progress=False)
        seconds[name] = time.perf_counter() - began
    certified = int(np.sum(outcome.finding.kind == gf.KIND.global_minimum))
    return {**seconds, "certified": certified, "draws": study.draws}


def in_new_process(
    workload: str, environment: dict[str, str], smoke: bool
) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", workload]
    done = subprocess.run(
        [*command, *(["--smoke"] if smoke else [])],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def bench(workload: str, repeats: int, smoke: bool) -> list[dict[str, Any]]:
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            # An empty folder for the first process, its leavings for the second.
            os.environ["XDG_CACHE_HOME"] = folder
            kept = keep_compiled()
            for name in (COLD, KEPT):
                samples[name].append(in_new_process(workload, kept, smoke))
        samples[FAST].append(in_new_process(workload, compile_fast(), smoke))
    rows = []
    for name, found in samples.items():
        compiling = sorted(one["first run"] - one["second run"] for one in found)
        middle = compiling[len(compiling) // 2]
        rows.append(
            {
                "workload": workload,
                "what": f"gradflow study, {name}",
                "compile s": middle,
                "spread": (compiling[-1] - compiling[0]) / middle,
                "first run s": sorted(one["first run"] for one in found)[
                    len(found) // 2
                ],
                "second run s": sorted(one["second run"] for one in found)[
                    len(found) // 2
                ],
                "certified": min(one["certified"] for one in found),
                "draws": found[0]["draws"],
                "samples s": compiling,
            }
        )
    for row in rows:
        row["speed over baseline"] = rows[0]["compile s"] / row["compile s"]
    return rows


def failures(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['what']} on {row['workload']}: {row['certified']} of {row['draws']} "
        "draws certified"
        for row in rows
        if row["certified"] < row["draws"]
    ]


def main(arguments: list[str] | None = None) -> int:
    import timing

    parser = timing.flags(
        "What a study waits for before its first verdict: compilation."
    )
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=None)
    # This script calls itself for a new process.
    parser.add_argument("--child", choices=WORKLOADS, help="for this script's own use")
    given = parser.parse_args(arguments)
    if given.child is not None:
        print(json.dumps(child(given.child, given.smoke)))
        return 0
    repeats = given.repeats or (1 if given.smoke else 5)
    rows = []
    for workload in given.only or (("B",) if given.smoke else ("A",)):
        rows += bench(workload, repeats, given.smoke)
    setting = {**timing.machine("float64"), "repeats": repeats}
    return timing.finish("compile", rows, setting, given.out, failures(rows))


if __name__ == "__main__":
    sys.exit(main())
