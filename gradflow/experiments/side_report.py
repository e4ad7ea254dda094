"""The report on both sides of thresholds: rows, notes, and panels with theory."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ..critical import describe
from ..report import environment, Report, TRAJECTORIES
from ..statistics import fraction
from ..study import find_device, precision
from .sides import (
    AbstractProblem,
    beside,
    CUT,
    flow_times,
    METHODS,
    Side,
    side_of,
    SidesConfig,
    updates_seen,
)


def report(
    experiment: str,
    claim: str,
    config: SidesConfig,
    make: Any,
    progress: bool | None,
) -> Report:
    """Runs both methods on all sides of the problem that `make` gives."""
    device = find_device(config.device)
    began = time.perf_counter()
    with precision(config.dtype), jax.default_device(device):
        problem = make()
        asked = [
            (place, side, value)
            for place in problem.places()
            for side, value in zip(
                ("below", "above"),
                beside(place.value, problem.thresholds, config.apart),
                strict=True,
            )
        ]
        # tqdm: None means off where stderr is no terminal.
        hide = None if progress is None else not progress
        sides = [
            side_of(config, problem, *one)
            for one in tqdm(asked, unit=" sides", disable=hide)
        ]
        return Report(
            experiment,
            claim,
            dataclasses.asdict(config),
            environment(config.dtype, device, TRAJECTORIES),
            [side.row(problem.name) for side in sides],
            _notes(sides),
            {
                "title": claim.split(":")[0],
                "panels": [
                    _count_panel(problem, sides),
                    _nats_panel(config, problem, sides),
                    *_curve_panels(config, problem, sides),
                ],
            },
            {"all": time.perf_counter() - began},
        )


def _notes(sides: list[Side]) -> list[str]:
    lines = []
    for method in METHODS:
        flags = [
            end.active == side.active for side in sides for end in side.ends[method]
        ]
        lines.append(f"{method}: as many active as in theory, {fraction(flags)}")
    known = [end.certified for side in sides for end in side.ends["flow"]]
    lines.append(f"flow: certified at the minimum, {fraction(known)}")
    for side in sides:
        for draw, end in enumerate(side.ends["flow"]):
            if not end.certified:
                lines.append(
                    f"{side.side} {side.place.what}, draw {draw}: "
                    + describe(end.verdict)
                )
    return lines


def _count_panel(problem: AbstractProblem, sides: list[Side]) -> dict[str, Any]:
    order = sorted(sides, key=lambda side: side.value)
    values = np.array([side.value for side in order])
    steps = np.sort(problem.thresholds)
    grid = np.unique([values[0], values[-1], *(steps * (1 - 1e-9)), *(steps * 1.0)])
    grid = grid[(grid >= values[0]) & (grid <= values[-1])]
    counts = [active_in_theory(problem, value) for value in grid]
    styles = {"flow": {"mfc": "none", "ms": 7}, "Adam": {"fmt": "x", "ms": 5}}
    return {
        "title": f"active latents at the end, by {problem.name}",
        "sets": [
            {
                "label": method,
                "x": values,
                "runs": np.array(
                    [[end.active for end in side.ends[method]] for side in order],
                    dtype=float,
                ).T,
                "style": styles[method],
            }
            for method in METHODS
        ],
        "points": True,
        "lines": [{"x": grid, "y": counts}],
        "xticks": _ticks(values),
        "xlabel": problem.name,
        "ylabel": f"latents above {CUT:g} nats",
        "xscale": "log",
        "yscale": "linear",
    }


def _ticks(values: np.ndarray) -> np.ndarray:
    """1, 2 and 5 times powers of ten within the range of some values."""
    powers = 10.0 ** np.arange(np.floor(np.log10(values[0])), np.log10(values[-1]) + 1)
    ticks = np.sort(np.concatenate([powers, 2 * powers, 5 * powers]))
    return ticks[(ticks >= 0.95 * values[0]) & (ticks <= 1.05 * values[-1])]


def active_in_theory(problem: AbstractProblem, value: float) -> int:
    wanted = problem.wanted(problem.posed(float(value))[1])
    return int((np.asarray(wanted) > 0).sum())


def _nats_panel(
    config: SidesConfig, problem: AbstractProblem, sides: list[Side]
) -> dict[str, Any]:
    """The nats of the marked modes at the end of the flow."""
    order = sorted(sides, key=lambda side: side.value)
    values = np.array([side.value for side in order])
    near = [problem.thresholds, problem.thresholds * (1 + 1e-6)]
    grid = np.unique(np.concatenate([np.geomspace(values[0], values[-1], 100), *near]))
    grid = grid[(grid >= values[0]) & (grid <= values[-1])]
    known = np.array([problem.wanted(problem.posed(float(v))[1]) for v in grid])
    modes = np.array(config.marks) - 1
    return {
        "title": "nats of modes at the end of the flow",
        "sets": [
            {
                "label": f"mode {mode + 1}",
                "x": values,
                "runs": np.array(
                    [[end.nats[mode] for end in side.ends["flow"]] for side in order]
                ).T,
                "style": {"ms": 3},
            }
            for mode in modes
        ],
        "points": True,
        "lines": [{"x": grid, "y": known[:, mode]} for mode in modes],
        "xticks": _ticks(values),
        "xlabel": problem.name,
        "ylabel": "KL from the prior (nats)",
        "xscale": "log",
        "yscale": "linear",
    }


def _curve_panels(
    config: SidesConfig, problem: AbstractProblem, sides: list[Side]
) -> list[dict[str, Any]]:
    """Of the largest, a middle and the least value, with all starts."""
    order = sorted(sides, key=lambda side: -side.value)
    chosen = [order[i] for i in sorted({0, 1, len(order) // 2, len(order) - 1})]
    axes = {
        "flow": (flow_times(config), "flow time"),
        "Adam": (updates_seen(config.updates), "steps of Adam"),
    }
    return [
        {
            "title": f"distance from theory, {method}",
            "sets": [
                {
                    "label": f"{problem.name} = {side.value:.4g}",
                    "x": axes[method][0],
                    "runs": [end.curve for end in side.ends[method]],
                }
                for side in chosen
            ],
            "lines": [],
            "xlabel": axes[method][1],
            "ylabel": "D_MA, the largest of all spectra",
            "xscale": "log",
            "yscale": "log",
        }
        for method in METHODS
    ]
