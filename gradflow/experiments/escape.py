r"""How long does rounding take to push a run off a saddle?

`remark42.py` beside this file has the start, the ways to compute the flow from it, and
the theory of what grows beside it.

*Claim under test:* the exact flow ends at the saddle; an imbalance of size
$\varepsilon$ leads away from it after $\ln(1/\varepsilon) / \lambda_1$, and so does
rounding. *Reference:* Bah, Rauhut, Terstiege, Westdickenberg 2020, Remark 42.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import time
from typing import Any

import jax
import numpy as np
from cyclopts import Parameter

from ..report import environment, Report, TRAJECTORIES
from ..solve import TOLERANCE_RATIO
from ..study import find_device, precision
from ..theory.dynamics import remark42
from .base import positive, RunConfig
from .remark42 import crossing, draw, Drawn, measure, predictions, Series, TIMES


CLAIM = (
    "The balanced start with opposite signs flows to the saddle at 0; a perturbation "
    "eps leads away from it after ln(1/eps) / lambda_1, and rounding is one (Bah et "
    "al. 2020, Remark 42)."
)
SOURCE = "Bah et al. 2020, Remark 42"
COST = "20 s of processor time, most of it compilation, for the default settings"
# Runs last this many times as long as theory says that the last escape takes.
PATIENCE = 1.6
# Runs of a series in the figure.
SHOWN = 3
# Undecided draws that notes name.
LISTED = 10
# A run that is this close to the exact flow at the end, relatively, has stayed on it.
STAYED = 0.01


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings: one row of the table for each way to compute and perturbation."""

    eigenvalues: tuple[float, ...] = (2.0, 0.8, 0.4)
    "Of xx, descending; with the second above half of the first, balanced runs pause."
    eps: tuple[float, ...] = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 1e-14)
    "Planted perturbations, along what grows fastest and as large across it."
    draws: int = 8
    "Eigenvectors, and perturbations across, per row."
    tolerance: float = 1e-6
    "The solver works at a thousandth of this, or at the least that it can."
    horizon: float = math.inf
    "Flow time at which a run is stopped; by default what the last escape needs."
    max_steps: int = 10**5
    "Steps after which a run is given up."

    def __post_init__(self):
        super().__post_init__()
        for name in ("eigenvalues", "eps"):
            positive(self, name)
        if len(self.eigenvalues) < 2 or not all(
            a > b for a, b in itertools.pairwise(self.eigenvalues)
        ):
            raise ValueError(
                f"eigenvalues={self.eigenvalues} must be at least two, descending: "
                "the first is the rate of the escape"
            )
        if max(self.eps) > 0.1:
            raise ValueError(
                f"eps has {max(self.eps):g}: give numbers <= 0.1, the start has size 1"
            )
        if len(set(self.eps)) < 2:
            raise ValueError(f"eps={self.eps}: a slope needs two different numbers")


def run(config: Config, *, progress: bool | None = None) -> Report:
    """Runs every series and reports one row for each of its perturbations."""
    del progress  # rows are few and quick
    device = find_device(config.device)
    began = time.perf_counter()
    own, both = config.dtype, ("float32", "float64")
    series = [
        *(Series("factors", "random", "rounding", dtype) for dtype in both),
        Series("factors", "eigenbasis", "none", own),
        Series("fixed rank", "random", "rounding", own),
        Series("fixed rank", "eigenbasis", "none", own),
        Series("separated", "eigenbasis", "unbalanced", own, config.eps),
        Series("separated", "eigenbasis", "balanced", own, config.eps),
        *(
            Series("factors", "random", "unbalanced", dtype, config.eps)
            for dtype in both
        ),
    ]
    drawn = draw(config.seed, config.draws, len(config.eigenvalues))
    # Those that differ in numbers only are compiled together.
    kinds = list(dict.fromkeys((one.method, one.dtype) for one in series))

    def task(kind):
        # jax's settings are those of one thread.
        with precision(kind[1]), jax.default_device(device):
            alike = [one for one in series if (one.method, one.dtype) == kind]
            return dict(zip(alike, _found(config, drawn, alike), strict=True))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = {k: v for part in pool.map(task, kinds) for k, v in part.items()}
    rate = config.eigenvalues[0]
    rows = [row for one in series for row in _rows(one, found[one])]
    slopes = [_slope(rate, one, found[one]) for one in series if len(one.eps) > 1]
    return Report(
        "escape",
        CLAIM,
        dataclasses.asdict(config),
        environment(config.dtype, device, TRAJECTORIES),
        rows,
        [_slope_note(slope) for slope in slopes if slope["decades"]]
        + _notes(series, found),
        {
            "title": "from the start of Remark 42",
            "slopes": slopes,
            "panels": [_sizes(rate, found), _escape_times(rate, found)],
        },
        {"runs": time.perf_counter() - began},
    )


def _found(config: Config, drawn: Drawn, alike: list[Series]) -> list[dict[str, Any]]:
    """What is seen of series of one method and dtype, beside theory, and what it says:
    when each run escaped (NaN: not) and whether it followed the exact flow."""
    theory = [predictions(one, config.eigenvalues, drawn) for one in alike]
    latest = max(np.max(times, where=times < math.inf, initial=0) for times in theory)
    times = np.linspace(0, min(PATIENCE * latest, config.horizon), TIMES)
    seen = measure(
        alike,
        config.eigenvalues,
        drawn,
        times,
        rtol=config.rtol or config.tolerance / TOLERANCE_RATIO,
        max_steps=config.max_steps,
    )
    exact = -(remark42(config.eigenvalues[0], times[-1]) ** 2)
    # The exact size may fall to where numbers end.
    close = STAYED * np.abs(exact) + float(np.finfo(alike[0].dtype).tiny) ** 0.8
    found = []
    for mine, known in zip(seen, theory, strict=True):
        finished, end = mine["finished"] == 1, mine["w"][..., -1]
        escapes = [[crossing(times, run) for run in runs] for runs in mine["w"]]
        escapes = np.where(finished & (end > 0.5), escapes, math.nan)
        stayed = finished & (np.abs(end - exact) <= close)
        outcome = {"escapes": escapes, "stayed": stayed, "theory": known}
        found.append(mine | outcome | {"times": times})
    return found


def _rows(series: Series, found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for i, size in enumerate(series.sizes):
        escapes, broken = found["escapes"][i], found["broken"][i]
        escaped, limited = np.isfinite(escapes), np.isfinite(broken)
        stayed = found["stayed"][i]
        middle, theory = _median(escapes[escaped]), float(np.median(found["theory"][i]))
        audited = series.method == "factors"
        rows.append(
            {
                "method": series.method,
                "basis": series.basis,
                "dtype": series.dtype,
                "perturbation": series.perturbation,
                "eps": float(size),
                "draws": escapes.size,
                "escaped": int(escaped.sum()),
                "stayed": int(stayed.sum()),
                "undecided": int((~escaped & ~stayed).sum()),
                "escape time": middle,
                "earliest": float(np.min(escapes)) if escaped.all() else math.nan,
                "latest": float(np.max(escapes)) if escaped.all() else math.nan,
                "in theory": theory,
                "ratio": middle / theory,
                "precision limited": int(limited.sum()) if audited else "no audit",
                "limited at": _median(broken[limited]),
            }
        )
    return rows


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if values.size else math.nan


def _slope(rate: float, series: Series, found: dict[str, Any]) -> dict[str, Any]:
    """Escape time against ln(1/eps), where all draws escaped and none by rounding."""
    sound = np.isfinite(found["escapes"]) & ~np.isfinite(found["broken"])
    used = np.flatnonzero(sound.all(axis=1))
    logs = np.log(1 / series.sizes[used])
    slopes = [math.nan]
    if len(used) > 1:
        slopes = np.polyfit(logs, found["escapes"][used], 1)[0]
    slope, theory = float(np.median(slopes)), series.order / rate
    return {
        "series": series.label,
        "slope": slope,
        "in theory": theory,
        "ratio": slope / theory,
        "decades": float(np.ptp(logs) / math.log(10)) if len(used) else 0.0,
    }


def _slope_note(slope: dict[str, Any]) -> str:
    return (
        f"{slope['series']}: escape time over ln(1/eps) has slope "
        f"{slope['slope']:.6g} over {slope['decades']:.3g} decades of eps, "
        f"{slope['in theory']:.6g} in theory, ratio {slope['ratio']:.5f}"
    )


def _notes(series: list[Series], found: dict[Series, dict[str, Any]]) -> list[str]:
    """Which draws neither escaped nor stayed (the first ten)."""
    lines = []
    for one in series:
        open_draws = np.isnan(found[one]["escapes"]) & ~found[one]["stayed"]
        for i, number in np.argwhere(open_draws):
            finished = found[one]["finished"][i, number]
            end = "under way at the horizon" if finished else "cut off by max_steps"
            lines.append(f"{one.label}, eps {one.eps[i]:g}, draw {number}: {end}")
    more = f"and {len(lines) - LISTED} more undecided draws"
    return lines[:LISTED] + [more] * (len(lines) > LISTED)


def _sizes(rate: float, found: dict[Series, dict[str, Any]]) -> dict[str, Any]:
    """Size against time of the runs that nothing but rounding can push."""
    alone = {k: v for k, v in found.items() if k.perturbation in ("rounding", "none")}
    escapes = np.concatenate([seen["escapes"].ravel() for seen in alone.values()])
    latest = min(float(seen["times"][-1]) for seen in alone.values())
    latest = 1.2 * np.max(escapes, initial=latest / 1.2, where=np.isfinite(escapes))
    sets = []
    for one, seen in alone.items():
        if (one.method, one.perturbation) == ("factors", "none"):
            continue  # it would cover the other one that stays
        shown = seen["times"] <= latest
        runs = seen["size"][0][:SHOWN, shown]
        sets.append({"label": one.label, "x": seen["times"][shown], "runs": runs})
    times = np.linspace(0, latest, TIMES)
    return {
        "title": "nothing planted",
        "xlabel": "time",
        "ylabel": "||W||",
        "xscale": "linear",
        "yscale": "log",
        "sets": sets,
        "lines": [{"x": times, "y": remark42(rate, times) ** 2}],
    }


def _escape_times(rate: float, found: dict[Series, dict[str, Any]]) -> dict[str, Any]:
    """Escape time against eps; rounding stands where its unit is."""
    sets = [
        {"label": one.label, "x": one.sizes, "runs": seen["escapes"].T}
        for one, seen in found.items()
        if one.perturbation != "none"
    ]
    sizes = np.concatenate([group["x"] for group in sets])
    ends = np.array([sizes.min() / 3, sizes.max()])
    lines = []
    for one, seen in found.items():
        if one.method == "separated":
            slope, known = one.order / rate, np.median(seen["theory"][0])
            logs = np.log(one.sizes[0] / ends)
            lines.append({"x": ends, "y": known + slope * logs})
    return {
        "title": "planted perturbations and rounding",
        "xlabel": "eps",
        "ylabel": "escape time",
        "xscale": "log",
        "yscale": "linear",
        "points": True,
        "sets": sets,
        "lines": lines,
    }
