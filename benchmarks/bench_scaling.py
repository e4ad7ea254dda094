r"""How the cost of a verdict grows: with the number of draws, the size and depth of the
network, and how it falls with devices and processes.

- **draws**: 10^2 to 10^6 draws of one workload, with the memory that the process had
  taken by then; diffrax vmapped over all of them, with the same certificate as its
  event, as far as `--vmapped`.
- **width**, **depth**: one network after the other, against the same.
- **queue**: the share of lane steps in which a lane waits for others, against the
  draws that each lane takes one after the other.
- **devices**: the same draws on one and on two devices of this machine. A CPU is split
  into two, each held to one thread.
- **processes**: by one process, and by two in a `jax.distributed` job that take half of
  the draws each.

    python benchmarks/bench_scaling.py --out FOLDER
"""

import dataclasses
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import bench_ensemble
import diffrax
import drawing
import jax
import jax.random as jr
import numpy as np
import timing
from bench_ensemble import Workload

import gradflow as gf
from gradflow.ensemble import descend
from gradflow.initial import section7_widths


TITLE = "The cost of a verdict against draws, width, depth, devices and processes."
OURS = "gradflow, verdicts"
VMAPPED = "diffrax, our velocity, certificate"
B = Workload("B", (5, 2, 5), 0, 256)
PARTS = ("draws", "width", "depth", "queue", "devices", "processes")
# Each device has one thread, so that two have twice the cores of one.
SPLIT = "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    draws: tuple[int, ...] = (100, 1000, 10_000, 100_000, 1_000_000)
    vmapped: int = 10_000
    widths: tuple[int, ...] = (5, 10, 20, 40, 80)
    depths: tuple[int, ...] = (2, 3, 4, 5)
    lanes: int = 1024
    few: int = 128
    shared: int = 65_536
    queues: tuple[int, ...] = (16, 32, 64, 128)


SMOKE = Sizes((20, 40), 20, (5, 6), (2, 3), 16, 8, 64, (2,))


def verdicts(problem: bench_ensemble.Problem) -> gf.Integrator:
    return gf.Integrator(
        problem.flow,
        stop=problem.theory.certificate,
        rtol=bench_ensemble.VERDICT_RTOL,
        tolerance=1e-1,
        max_steps=bench_ensemble.MOST_STEPS,
    )


def ours(problem, draws: int, devices=()) -> Callable[[], int]:
    """A call that counts the draws that were certified, and keeps none of them."""
    integrator, certificate = verdicts(problem), problem.theory.certificate
    lanes = min(problem.workload.resident, draws)

    def call():
        count = 0
        for solution, _ in descend(
            integrator, problem.start, problem.key, [range(draws)], lanes, devices
        ):
            count += int(np.sum(certificate.holds(solution.energy)))
        return count

    return call


def vmapped(problem, lanes: int) -> timing.Candidate:
    return bench_ensemble.by_diffrax(
        problem, lanes, bench_ensemble.fast, bench_ensemble.certain, diffrax.Tsit5()
    )


def memory() -> float:
    """The most megabytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def row(part, value, what, draws, certified, seconds: timing.Timing, **more):
    return {
        "part": part,
        "value": value,
        "what": what,
        "draws": draws,
        "us per draw": 1e6 * seconds.median / draws,
        "spread": seconds.spread,
        "certified": certified,
        "speed over baseline": None,
        "memory MB": None,
        "idle": None,
        **more,
        "samples s": seconds.samples,
    }


def bench_draws(sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    problem = bench_ensemble.draw(B)
    candidates, taken = {}, {}

    def watched(draws, call):
        def run():
            result = call()
            taken.setdefault(draws, memory())
            return result

        return run

    # The largest come last: memory taken is never given back.
    for draws in sizes.draws:
        call = watched(draws, ours(problem, draws))
        candidates[draws, OURS] = timing.Candidate(call)
    timings = timing.interleave(candidates, repeats=repeats)
    others = {
        (draws, VMAPPED): vmapped(problem, draws)
        for draws in sizes.draws
        if draws <= sizes.vmapped
    }
    timings |= timing.interleave(others, repeats=repeats)
    rows = []
    for draws, what in sorted(timings):
        found = timings[draws, what]
        rows.append(
            row(
                "draws", draws, what, draws, _certified(found.result), found,
                **{"memory MB": taken[draws] if what == OURS else None},
            )
        )  # fmt: skip
    return _compared(rows)


def bench_networks(part: str, networks: dict[int, tuple[int, ...]], sizes, repeats):
    rows = []
    for value, widths in networks.items():
        problem = bench_ensemble.draw(Workload(part, widths, 0, 64))
        candidates = {
            VMAPPED: vmapped(problem, sizes.few),
            OURS: timing.Candidate(ours(problem, sizes.lanes)),
        }
        timings = timing.interleave(candidates, repeats=repeats)
        for what, draws in ((VMAPPED, sizes.few), (OURS, sizes.lanes)):
            certified = _certified(timings[what].result)
            rows.append(row(part, value, what, draws, certified, timings[what]))
    return _compared(rows)


def _certified(result) -> int:
    return result if isinstance(result, int) else int(np.sum(np.asarray(result[0])))


def _compared(rows):
    """Fills in the speed over diffrax at the same value."""
    cost = {(r["value"], r["what"]): r["us per draw"] for r in rows}
    for r in rows:
        base = cost.get((r["value"], VMAPPED))
        if base is not None:
            r["speed over baseline"] = base / r["us per draw"]
    return rows


def bench_queue(sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    """Verdicts of two workloads, with Tsit5 and with method "auto"."""
    rows = []
    for workload in (w for w in bench_ensemble.FULL if w.name in "BE"):
        problem = bench_ensemble.draw(workload)
        candidates = {
            (method, queue): bench_ensemble.by_gradflow(
                problem, queue * workload.resident, method=solver,
                rtol=bench_ensemble.VERDICT_RTOL, tolerance=1e-1,
                stop=problem.theory.certificate,
            )
            for method, solver in (("Tsit5", diffrax.Tsit5()), ("auto", "auto"))
            for queue in sizes.queues
        }  # fmt: skip
        timings = timing.interleave(candidates, repeats=repeats)
        for (method, queue), found in timings.items():
            ends = bench_ensemble.gradflow_ends(problem, found.result)
            what = f"{workload.name}, {method}, verdicts"
            draws = queue * workload.resident
            certified = int(ends.certified.sum())
            rows.append(
                row("queue", queue, what, draws, certified, found, idle=ends.idle)
            )
    return rows


def bench_devices(sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    problem = bench_ensemble.draw(B)
    devices = jax.devices()[:2]
    candidates = {
        count: timing.Candidate(ours(problem, sizes.shared, devices[:count]))
        for count in range(1, len(devices) + 1)
    }
    timings = timing.interleave(candidates, repeats=repeats)
    return [
        row(
            "devices", count, OURS, sizes.shared, timings[count].result,
            timings[count],
            **{"speed over baseline": timings[1].median / timings[count].median},
        )
        for count in candidates
    ]  # fmt: skip


def in_split_devices(sizes: Sizes, repeats: int, smoke: bool) -> list[dict[str, Any]]:
    """On a machine with one device, in a process that sees it as two."""
    if len(jax.devices()) > 1:
        return bench_devices(sizes, repeats)
    found = subprocess.run(
        _again("devices", repeats, smoke, "--child", "0"),
        env={**os.environ, "XLA_FLAGS": SPLIT},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(found.stdout.splitlines()[-1])


def _again(part: str, repeats: int, smoke: bool, *more: str) -> list[str]:
    command = [sys.executable, __file__, "--only", part, "--repeats", str(repeats)]
    return [*command, *(["--smoke"] if smoke else []), *more]


def in_processes(repeats: int, smoke: bool) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    children = [
        subprocess.Popen(
            _again("processes", repeats, smoke, "--child", str(child), "--port", port),
            env={**os.environ, "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for child in range(2)
    ]
    printed = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError("a process of the two failed: see above")
    first, second = (json.loads(text.splitlines()[-1]) for text in printed)
    for mine, other in zip(first, second, strict=True):
        mine["certified"] += other["certified"]
    return first


def process(child: int, sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    """One of two: the first does all the draws alone, then each does half."""
    from jax.experimental.multihost_utils import sync_global_devices

    problem = bench_ensemble.draw(B)
    # Draws of its own: a key for each process.
    problem = dataclasses.replace(problem, key=jr.fold_in(problem.key, child))
    alone = ours(problem, sizes.shared) if child == 0 else lambda: 0
    calls = {1: alone, 2: ours(problem, sizes.shared // 2)}
    samples, certified = {1: [], 2: []}, {}
    for number in range(repeats + 1):
        for processes, call in calls.items():
            sync_global_devices(f"begin {number} {processes}")
            began = time.perf_counter()
            certified[processes] = call()
            sync_global_devices(f"end {number} {processes}")
            # The first round compiles.
            if number > 0:
                samples[processes].append(time.perf_counter() - began)
    timings = {p: timing.Timing(s, 1, certified[p]) for p, s in samples.items()}
    return [
        row(
            "processes", p, OURS, sizes.shared, certified[p], timings[p],
            **{"speed over baseline": timings[1].median / timings[p].median},
        )
        for p in timings
    ]  # fmt: skip


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence for each row of ours with a draw that was not certified."""
    return [
        f"{r['part']}={r['value']}: {r['certified']} of {r['draws']} draws certified"
        for r in rows
        if r["what"] != VMAPPED and r["certified"] < r["draws"]
    ]


def bench(part: str, sizes: Sizes, repeats: int, smoke: bool) -> list[dict[str, Any]]:
    if part == "draws":
        return bench_draws(sizes, repeats)
    if part == "width":
        return bench_networks(
            part, {d: (d, 2, d) for d in sizes.widths}, sizes, repeats
        )
    if part == "depth":
        networks = {n: section7_widths(10, n, 2) for n in sizes.depths}
        return bench_networks(part, networks, sizes, repeats)
    if part == "queue":
        return bench_queue(sizes, repeats)
    if part == "devices":
        return in_split_devices(sizes, repeats, smoke)
    return in_processes(repeats, smoke)


def main(arguments: list[str] | None = None) -> int:
    parser = timing.flags(TITLE)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--most", type=timing.count, help="draws (default 1000000)")
    parser.add_argument("--vmapped", type=timing.count, help="most lanes of diffrax")
    # This script calls itself for what needs another process.
    parser.add_argument("--child", type=int, help="for this script's own use")
    parser.add_argument("--port", type=int, help="for this script's own use")
    given = parser.parse_args(arguments)
    if given.port is not None:
        jax.distributed.initialize(f"localhost:{given.port}", 2, given.child)
    jax.config.update("jax_enable_x64", True)
    repeats = given.repeats or (2 if given.smoke else 5)
    sizes = SMOKE if given.smoke else Sizes()
    if given.most is not None:
        draws = tuple(n for n in sizes.draws if n <= given.most)
        sizes = dataclasses.replace(sizes, draws=draws)
    if given.vmapped is not None:
        sizes = dataclasses.replace(sizes, vmapped=given.vmapped)
    if given.child is not None:
        found = (
            bench_devices(sizes, repeats)
            if given.port is None
            else process(given.child, sizes, repeats)
        )
        print(json.dumps(found))
        return 0
    rows = []
    for part in given.only:
        rows += bench(part, sizes, repeats, given.smoke)
    setting = {**timing.machine("float64"), "repeats": repeats}
    return timing.finish(
        "scaling", rows, setting, given.out, failures(rows), drawing.curves
    )


if __name__ == "__main__":
    sys.exit(main())
