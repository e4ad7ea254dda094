"""What the draws of one row of a table came to, counted honestly."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from ..critical import describe, KIND
from ..solution import RESULTS
from ..statistics import fraction
from ..study import Outcome
from ..types import names_of


def tally(kinds: np.ndarray) -> dict[str, Any]:
    """Counts of verdicts with the exact interval of the global fraction; undecided
    draws stay in the denominator."""
    best = kinds == "global_minimum"
    saddle = (kinds == "strict_saddle") | (kinds == "nonstrict_saddle")
    failed = kinds == "diverged"
    share = fraction(best, ~(best | saddle | failed))
    return {
        "draws": share.draws,
        "global minimum": share.count,
        "95 % low": share.low,
        "95 % high": share.high,
        "saddle": int(saddle.sum()),
        "undecided": share.undecided,
        "outer low": share.outer_low,
        "outer high": share.outer_high,
        "diverged": int(failed.sum()),
    }


def seconds_of(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """The seconds of several studies, by stage."""
    seconds: dict[str, float] = {}
    for outcome in outcomes:
        for stage, duration in outcome.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + duration
    return seconds


def notes(where: str, outcome: Outcome) -> list[str]:
    """Why each undecided draw is undecided, and which draws are not finite (the first
    ten of a row)."""
    kinds = names_of(KIND, outcome.finding.kind)
    results = names_of(RESULTS, outcome.solution.result)
    undecided = np.flatnonzero((kinds == "unresolved") | (kinds == "not_critical"))
    lines = [
        f"{where}, draw {i}: {results[i]} at t={outcome.solution.time[i]:.4g}; "
        + describe(jax.tree.map(lambda leaf: leaf[i], outcome.finding))  # noqa: B023
        for i in undecided[:10]
    ]
    if undecided.size > 10:
        lines.append(f"{where}: and {undecided.size - 10} more undecided draws")
    diverged = np.flatnonzero(kinds == "diverged")
    if diverged.size:
        listed = ", ".join(map(str, diverged[:10])) + ", ..." * (diverged.size > 10)
        lines.append(
            f"{where}: {diverged.size} of {kinds.size} draws are not finite (draws "
            f"{listed}); others are unaffected"
        )
    return lines
