"""What the draws of one row of a table came to, counted honestly."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..critical import CriticalPoint, describe, KIND, RULE
from ..solution import RESULTS, Solution
from ..statistics import fraction
from ..store.arrays import outcome_from
from ..store.cell import Cell
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


def counts_only(solution: Solution, finding: CriticalPoint) -> tuple[Any, Any]:
    """What `tally` and `notes` count, and when and after how many steps runs ended: 28
    bytes a draw, whatever the problem. The rest can be read with `of_draw`."""
    nothing = jax.tree.map(
        lambda _: None, (solution, finding), is_leaf=eqx.is_array_like
    )
    return eqx.tree_at(
        _counted, nothing, _counted((solution, finding)), is_leaf=lambda x: x is None
    )


def _counted(outcome: tuple[Any, Any]) -> tuple[Any, ...]:
    solution, finding = outcome
    ended = (solution.result, solution.time, solution.stats["steps"])
    return (*ended, finding.kind, finding.rule)


def of_draw(cell: Cell) -> Callable[[int], CriticalPoint]:
    """A function that reads the verdict on one draw."""
    kind: Any = KIND.unresolved
    rule: Any = RULE.none
    # Only the structure counts.
    number, whole, truth = jnp.ones(()), jnp.ones((), int), jnp.ones((), bool)
    like = CriticalPoint(
        kind=kind,
        rule=rule,
        active=truth[None],
        rank=whole,
        rank_gap=number,
        speed=number,
        gap=number,
        value_gap=number,
        curvature=number,
        index=whole,
        remaining=number,
        precision_limited=truth,
        limited_at=number,
    )

    def found(draw: int) -> CriticalPoint:
        index, row = divmod(draw, cell.chunk)
        _, finding = outcome_from((None, like), cell.read(index)[0])
        return jax.tree.map(lambda leaf: leaf[row], finding)

    return found


def notes(
    where: str, outcome: Outcome, found: Callable[[int], CriticalPoint] | None = None
) -> list[str]:
    """Why each undecided draw is undecided, and which draws are not finite (the first
    ten of a row). `found`: the verdict on a draw, where `outcome` has counts only."""
    if found is None:
        found = lambda draw: jax.tree.map(lambda leaf: leaf[draw], outcome.finding)
    kinds = names_of(KIND, outcome.finding.kind)
    results = names_of(RESULTS, outcome.solution.result)
    undecided = np.flatnonzero((kinds == "unresolved") | (kinds == "not_critical"))
    lines = [
        f"{where}, draw {i}: {results[i]} at t={outcome.solution.time[i]:.4g}; "
        + describe(found(int(i)))
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
