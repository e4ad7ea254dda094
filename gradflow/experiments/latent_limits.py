r"""Where runs of Gaussian latent-variable models go, also those that stop on the way.

EM and the flow are slow where the noise of some variables goes to 0 (a Heywood case),
and EM where its rate is near 1. Such a run is carried on: without noise in those
variables the rest is a smaller problem (`theory/heywood.py`), and Squarem is the faster
EM. What it then ends at is its limit.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ..em import ExpectationMaximization, Squarem
from ..iterate import iterate
from ..models.factor import LatentGaussian, NegativeLogLikelihood
from ..noise import Diagonal
from ..solution import RESULTS, Solution
from ..theory.heywood import HeywoodCase
from ..types import names_of
from .linear_rates import em_rate, FLAT


# Average log-likelihoods closer than this are the same.
SAME = 1e-8
# Noise below this share of its variable's variance, with a slope of the energy (by that
# share) above this, may go to 0: inside, the slope at an end is about 0.
SMALL = 1e-2
FALLING = 1e-3
# Steps of Squarem that carry a run on.
CARRIED = 20_000
# No Hessian of more coordinates is formed, nor Jacobian of EM.
LARGEST = 1200
LARGEST_JACOBIAN = 200


@dataclasses.dataclass
class Limit:
    """The energy that a run goes to, and by which kind of point.

    `variables` lose their noise; `point` is of the others, where `problem` is their
    energy. `late`: the run stopped more than `SAME` above.
    """

    energy: float
    kind: str = "undecided"
    variables: tuple[int, ...] = ()
    late: bool = False
    problem: NegativeLogLikelihood | None = None
    point: LatentGaussian | None = None


def limits(
    energy: NegativeLogLikelihood, solution: Solution, step: float, least: float | None
) -> list[Limit]:
    """The limit of each run of a method, of kinds known only so far that one is
    "undecided", or "found". Runs that met a rule are certain of the closed form
    `least`; those of iterations and flows that came to rest inside are at their limit.
    """
    falling = np.asarray(_falling(energy, solution.point))
    found = []
    for i, name in enumerate(names_of(RESULTS, solution.result)):
        value = float(solution.energy[i])
        point = jax.tree.map(lambda leaf: jnp.asarray(leaf[i]), solution.point)  # noqa: B023
        if name == "rule_met" and least is not None:
            found.append(Limit(least, "found"))
        elif name == "successful" and not falling[i].any():
            found.append(Limit(value, "found", (), False, energy, point))
        elif np.isfinite(value):
            variables = _first(falling[i], point)
            found.append(_carried(energy, point, variables, value, step))
        else:
            found.append(Limit(value))
    return found


def judge(found: list[Limit], lowest: float) -> None:
    """Says of which kind each limit is; of limits above the `lowest` by the Hessian,
    once for those of one value."""
    seen: dict[tuple[Any, ...], str] = {}
    for limit in found:
        if limit.kind == "undecided":
            continue
        if limit.energy - lowest <= SAME:
            limit.kind = "optimum"
            continue
        alike = (limit.variables, round(limit.energy / SAME))
        if alike not in seen:
            kind = "other Heywood" if limit.variables else "other minimum"
            if limit.point is None or _coordinates(limit.point) > LARGEST:
                kind = "undecided"
            elif not _curves_up(limit):
                kind = "saddle"
            seen[alike] = kind
        limit.kind = seen[alike]


def told_of(
    found: list[Limit], solution: Solution, lowest: float, method: str
) -> list[str]:
    """A line for each kind of limit of a method's runs, but that all came to rest at
    the optimum inside."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, limit in enumerate(found):
        if limit.kind == "optimum" and not (limit.variables or limit.late):
            continue
        value = 0 if limit.kind == "optimum" else round(limit.energy / SAME)
        groups.setdefault((limit.kind, limit.variables, value), []).append(i)
    names, lines = names_of(RESULTS, solution.result), []
    for (kind, variables, _), runs in groups.items():
        line = f"{len(runs)} of {len(found)} runs: {kind}"
        if variables:
            listed = ", ".join(f"x[{j}]" for j in variables)
            line += f", the noise of {listed} goes to 0 (a Heywood case)"
        if kind != "optimum":
            line += f", {found[runs[0]].energy - lowest:.4g} above the least"
        late = [i for i in runs if found[i].late]
        if late:
            gaps = [float(solution.energy[i]) - found[i].energy for i in late]
            ends = sorted({str(names[i]) for i in late})
            line += (
                f"; {len(late)} stopped {np.median(gaps):.3g} above that (median; "
                f"{', '.join(ends)})"
            )
            line += _forecast(found[late[0]], gaps, solution, late, method)
        lines.append(line)
    return lines


def _forecast(limit, gaps, solution, late, method) -> str:
    """What theory has for the gap, and when it will be closed."""
    count = len(limit.variables)
    if count and method in ("em", "flow"):
        share = count / 2 if method == "em" else count
        expected = np.median([share / float(solution.time[i]) for i in late])
        unit = "steps" if method == "em" else "of flow time"
        return (
            f", as theory has it ({expected:.3g}): {SAME:g} above after "
            f"{share / SAME:.2g} {unit}"
        )
    if method == "em" and limit.point is not None:
        if _coordinates(limit.point) > LARGEST_JACOBIAN:
            return ""
        rate = em_rate(ExpectationMaximization(limit.problem), limit.point)
        left = np.log(np.median(gaps) / SAME) / (-2 * np.log(rate))
        return f": at EM's rate there, {rate:.6f}, {left:.3g} more steps"
    return ""


def _carried(energy, point, variables, value, step) -> Limit:
    """Where a run goes on to, by Squarem, without noise in `variables`."""
    latents = point.loadings.shape[1]
    refused: set[int] = set()
    while True:
        case, problem, start = None, energy, point
        if variables:
            case = HeywoodCase(energy, latents, variables)
            problem, start = case.rest, case.reduced(point)
        scheme = Squarem(ExpectationMaximization(problem))
        end = iterate(scheme, start, tolerance=step, max_steps=CARRIED, throw=False)
        names = np.arange(energy.size)
        if case is not None:
            names = case.kept
            up = np.asarray(case.slopes(end.point)) > 0
            if not up.all():
                # With some noise the energy would be less: the run does not go there.
                refused.update(np.asarray(variables)[~up].tolist())
                variables = tuple(np.asarray(variables)[up].tolist())
                continue
        falling = np.array(_falling_of(problem, end.point))
        falling &= ~np.isin(names, list(refused))
        if falling.any() and len(variables) < latents:
            more = int(names[_first(falling, end.point)[0]])
            variables = tuple(sorted((*variables, more)))
            continue
        limit = float(end.energy if case is None else case.energy(end.point))
        rests = bool(end.result == RESULTS.successful) and limit <= value + SAME
        kind = "found" if rests else "undecided"
        return Limit(limit, kind, variables, value - limit > SAME, problem, end.point)


def _first(falling, point) -> tuple[int, ...]:
    """Those of falling noise with the least, as many as there are latents."""
    if not falling.any():
        return ()
    logs = np.where(falling, np.asarray(point.noise.log_variances), np.inf)
    count = min(int(falling.sum()), point.loadings.shape[1])
    return tuple(sorted(np.argsort(logs)[:count].tolist()))


def _falling_of(energy, point):
    """Whose noise is small and goes on falling."""
    if not isinstance(point.noise, Diagonal):
        return jnp.zeros(point.noise.size, bool)
    shares = jnp.exp(point.noise.log_variances) / jnp.diagonal(energy.covariance)
    slopes = jax.grad(energy)(point).noise.log_variances / shares
    return (shares < SMALL) & (slopes > FALLING)


@eqx.filter_jit
def _falling(energy, points):
    return jax.vmap(lambda point: _falling_of(energy, point))(points)


def _coordinates(point) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(point))


def _curves_up(limit: Limit) -> bool:
    values = np.asarray(_eigenvalues(limit.problem, limit.point))
    return bool(values[0] >= -FLAT * max(values[-1], 1))


@eqx.filter_jit
def _eigenvalues(energy, point):
    flat, restore = ravel_pytree(point)
    return jnp.linalg.eigvalsh(jax.hessian(lambda x: energy(restore(x)))(flat))
