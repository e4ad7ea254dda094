r"""What does the right-hand side of the balanced flow on rank-k matrices cost?

For a batch of points ("lanes") of rank $k$ and one data set of $m = 3d$ samples
$x \sim N(0, I/d)$, autoencoded, depth $N$:

- the velocity $-\mathcal{A}_W(\nabla L^1(W))$ by powers of $WW^\top$ and $W^\top W$, as
  it is defined (the baseline; the compiler makes the equal eigendecompositions once),
  by the singular value decomposition of $W$ (`FixedRank` at `LinearMap`), in factors
  (`FixedRank` at `LowRank`) and as that of $N$ balanced factors of width $k$
  (`DeepLinear`), also in the layout in which ensembles step them; all of the same
  points;
- a run of each but the first and the last, with the error against the balanced
  factors by Dopri8 at rtol 1e-12.

Exits with 1 if the velocities differ by more than rounding, or an end point by more
than is asked.

    python benchmarks/bench_fixed_rank.py --out FOLDER
"""

import dataclasses
import sys
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import timing

import gradflow as gf
from gradflow.layout import Columns, layout_of
from gradflow.spectrum import psd_power


TITLE = "The balanced flow on rank-k matrices: in factors against ambient."
# How far two velocities may be apart, relative to their size. The definition takes
# roots of eigenvalues, which knows small singular values to the root of rounding.
AGREE = {"definition": 1e-7, "others": 1e-11}
RTOL = 1e-6
REFERENCE_RTOL = 1e-12
# Error allowed at the end of a run at RTOL in factors.
ALLOWED = 1e-6


@dataclasses.dataclass(frozen=True)
class Workload:
    """Size d, rank k, depth N; `lanes` points at once, `few` of them where all would
    take too long; `horizon` in units of the number of samples."""

    size: int
    rank: int
    depth: int
    lanes: int
    few: int
    horizon: float

    @property
    def name(self) -> str:
        return f"d={self.size} k={self.rank} N={self.depth}"


FULL = (Workload(200, 2, 4, 16, 2, 1.0),)
SMOKE = (Workload(6, 2, 4, 4, 2, 1.0),)
FACTORED = "in factors (LowRank)"
BALANCED = "N balanced factors of width k"
STEPPED = "the same, lanes last, as ensembles step them"
AMBIENT = "all entries, by SVD (LinearMap)"
DEFINITION = "all entries, by matrix powers"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A workload with its numbers drawn; `points` of each form have a leading axis of
    lanes."""

    workload: Workload
    points: dict[str, Any]
    flows: dict[str, gf.GradientFlow]
    horizon: float


def draw(workload: Workload) -> Problem:
    """W(0) with singular values from 1 down to 0.1 and random singular vectors."""
    size, rank, depth = workload.size, workload.rank, workload.depth
    samples = 3 * size
    data = jr.normal(jr.key(0), (samples, size)) / size**0.5
    energy = gf.models.SquaredLoss(gf.Moments.from_data(data))
    values = jnp.geomspace(1.0, 0.1, rank)

    def point(key):
        left, right = (
            jnp.linalg.qr(jr.normal(k, (size, rank)))[0] for k in jr.split(key)
        )
        return gf.models.LowRank(left, jnp.log(values), right)

    low = jax.vmap(point)(jr.split(jr.key(1), workload.lanes))
    dense = jax.vmap(lambda p: gf.models.LinearMap(p.matrix()))(low)
    flow = gf.GradientFlow(energy, gf.manifolds.FixedRank(rank, depth))
    points = {
        DEFINITION: dense,
        AMBIENT: dense,
        FACTORED: low,
        BALANCED: jax.vmap(lambda p: p.balanced(depth))(low),
    }
    flows = {name: flow for name in points} | {BALANCED: gf.GradientFlow(energy)}
    return Problem(workload, points, flows, workload.horizon * samples)


def columns_of(problem: Problem) -> Columns:
    """The layout of an ensemble of the balanced factors."""
    like = jax.tree.map(lambda leaf: leaf[0], problem.points[BALANCED])
    descent, *_ = gf.Integrator(problem.flows[BALANCED]).descents(like)
    layout = layout_of(descent, like)
    assert isinstance(layout, Columns)
    return layout


def velocity(problem: Problem, name: str) -> timing.Candidate:
    """All lanes in one call, a function of all that it needs."""
    depth = problem.workload.depth

    def defined(flow, point):
        weight = point.weight
        slope = flow.energy.differential(point).weight
        above, below = (
            [psd_power(gram, j / depth) for j in range(1, depth)]
            for gram in (weight @ weight.T, weight.T @ weight)
        )
        total = slope @ below[-1] + above[-1] @ slope
        for j in range(2, depth):
            total = total + above[depth - j - 1] @ slope @ below[j - 2]
        return gf.models.LinearMap(-total)

    if name == STEPPED:
        layout = columns_of(problem)
        arrays, static = eqx.partition(layout, eqx.is_array)
        arguments = arrays, layout.inside(problem.points[BALANCED])
        function = lambda arrays, columns: eqx.combine(arrays, static).velocity(columns)
        program, seconds = timing.compiled(function, *arguments)
        return timing.Candidate(lambda: program(*arguments), seconds)
    ours = lambda flow, point: flow.velocity(point)
    one = defined if name == DEFINITION else ours
    batched = jax.vmap(one, in_axes=(None, 0))
    arguments = problem.flows[name], problem.points[name]
    program, seconds = timing.compiled(batched, *arguments)
    return timing.Candidate(lambda: program(*arguments), seconds)


def run(
    problem: Problem, name: str, lanes: int, rtol: float, method=None
) -> timing.Candidate:
    """The product at the horizon of the first `lanes` lanes, and whether it came."""
    method = diffrax.Tsit5() if method is None else method

    def one(flow, point):
        solution = gf.integrate(
            flow,
            point,
            # Observed runs end at the last time, whatever their speed.
            times=jnp.asarray([problem.horizon]),
            observe={},
            rtol=rtol,
            tolerance=1000 * rtol,
            method=method,
            max_steps=10**6,
            throw=False,
        )
        arrived = solution.result == gf.RESULTS.horizon_reached
        return solution.point.matrix(), arrived

    points = jax.tree.map(lambda leaf: leaf[:lanes], problem.points[name])
    arguments = problem.flows[name], points
    program, seconds = timing.compiled(jax.vmap(one, in_axes=(None, 0)), *arguments)
    return timing.Candidate(lambda: program(*arguments), seconds)


def difference(found: Any, expected: Any) -> float:
    """The largest over lanes of the error relative to the size of the lane."""
    found, expected = (np.asarray(a).reshape(len(a), -1) for a in (found, expected))
    errors = np.linalg.norm(found - expected, axis=1)
    return float(np.max(errors / np.linalg.norm(expected, axis=1)))


def bench_velocities(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    names = [*problem.points, STEPPED]
    candidates = {name: velocity(problem, name) for name in names}
    timings = timing.interleave(candidates, repeats=repeats)
    # As velocities of the product, whatever it is a product of.
    product = jax.vmap(
        lambda point, move: jax.jvp(lambda p: p.matrix(), (point,), (move,))[1]
    )
    moves = {n: product(problem.points[n], timings[n].result) for n in problem.points}
    stepped = columns_of(problem).outside(timings[STEPPED].result, 1)
    moves[STEPPED] = product(problem.points[BALANCED], stepped)
    errors = {name: difference(moves[name], moves[FACTORED]) for name in candidates}
    lanes = dict.fromkeys(candidates, problem.workload.lanes)
    return _rows(problem, "velocity", candidates, timings, lanes, errors)


def bench_runs(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    lanes = dict.fromkeys((AMBIENT, FACTORED, BALANCED), problem.workload.lanes)
    lanes[AMBIENT] = problem.workload.few
    candidates = {name: run(problem, name, lanes[name], RTOL) for name in lanes}
    timings = timing.interleave(candidates, repeats=repeats)
    exact, _ = run(
        problem, BALANCED, lanes[BALANCED], REFERENCE_RTOL, diffrax.Dopri8()
    ).call()
    errors = {}
    for name in candidates:
        ends, arrived = timings[name].result
        if not bool(jnp.all(arrived)):
            raise RuntimeError(f"{name}: a run did not reach the horizon")
        errors[name] = difference(ends, exact[: len(ends)])
    return _rows(problem, "run", candidates, timings, lanes, errors)


def _rows(problem, kind, candidates, timings, lanes, errors) -> list[dict[str, Any]]:
    """A row per candidate; the first one is the baseline."""
    per_lane = {name: timings[name].median / lanes[name] for name in candidates}
    slowest = per_lane[next(iter(candidates))]
    return [
        {
            "workload": problem.workload.name,
            "of": kind,
            "what": name,
            "lanes": lanes[name],
            "us per lane": 1e6 * per_lane[name],
            "spread": timings[name].spread,
            "speed over baseline": slowest / per_lane[name],
            "relative error": errors[name],
            "compile s": candidates[name].compile,
            "samples s": timings[name].samples,
        }
        for name in candidates
    ]


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence for each error that is too large."""
    found = []
    for row in rows:
        if row["of"] == "velocity":
            allowed = AGREE["definition" if row["what"] == DEFINITION else "others"]
        else:
            allowed = np.inf if row["what"] == AMBIENT else ALLOWED
        if not row["relative error"] <= allowed:
            found.append(
                f"{row['of']}, {row['what']}, {row['workload']}: relative error "
                f"{row['relative error']:.2g} is above {allowed:.2g}"
            )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = timing.flags(TITLE)
    given = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    repeats = given.repeats or (2 if given.smoke else 5)
    rows = []
    for workload in SMOKE if given.smoke else FULL:
        problem = draw(workload)
        rows += bench_velocities(problem, repeats) + bench_runs(problem, repeats)
    setting = {**timing.machine("float64"), "repeats": repeats}
    return timing.finish("fixed_rank", rows, setting, given.out, failures(rows))


if __name__ == "__main__":
    sys.exit(main())
