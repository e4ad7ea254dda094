r"""How fast is the gradient-flow velocity of a deep linear network, and a run of it?

For a batch of networks ("lanes") and one data set of $m = 3d$ samples
$x \sim N(0, I/d)$, autoencoded:

- the velocity by `GradientFlow.velocity` (moments, through the narrowest layer), by
  automatic differentiation of the textbook loss on the data (the baseline), and by
  automatic differentiation of the moment form with the full y-by-x product;
- one piece of trajectory by a loop of `scipy.integrate.solve_ivp` (RK45, the baseline)
  over the first few lanes and by `gradflow.integrate` on all lanes, at the same horizon
  and rtol, with the error of each against scipy's DOP853 at rtol 1e-11.

Exits with 1 if the velocities differ by more than rounding.

    python benchmarks/bench_velocity.py --out FOLDER
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
import torch_peers
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow.ensemble import descend
from gradflow.models.base import EnergyBelow


TITLE = "Velocity of a deep linear network, and a run of it, against baselines."
# How far two velocities of one point may be apart, relative to their size.
AGREE = {"float64": 1e-12, "float32": 1e-5}
# Tolerance of the timed runs, and of what their errors are measured against.
RTOL = {"float64": 1e-6, "float32": 1e-4}
REFERENCE_RTOL = 1e-11
# Lanes at once in the second way of running many: `gradflow.Study`'s default.
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Workload:
    """`widths` of the network; `lanes` networks at once, the first `scipy_lanes` of
    them by scipy; `horizon` of the trajectory, in units of the number of samples."""

    widths: tuple[int, ...]
    lanes: int
    scipy_lanes: int
    horizon: float

    @property
    def name(self) -> str:
        return "-".join(map(str, self.widths))


FULL = (
    Workload((20, 2, 11, 20), 1024, 16, 1.0),
    Workload((5, 2, 5), 4096, 32, 1.0),
    Workload((200, 20, 65, 110, 155, 200), 16, 2, 0.1),
)
SMOKE = (Workload((5, 2, 5), 8, 2, 1.0), Workload((6, 2, 4, 6), 8, 2, 1.0))


class Start(eqx.Module):
    """Entries of $W_j$ are $N(0, 1/d_j)$."""

    widths: tuple[int, ...] = eqx.field(static=True)
    dtype: str = eqx.field(static=True)

    def __call__(self, key):
        keys = jr.split(key, len(self.widths) - 1)
        shapes = zip(keys, self.widths[:-1], self.widths[1:], strict=True)
        return gf.models.DeepLinear(
            tuple(
                jr.normal(key, (out, into), self.dtype) / out**0.5
                for key, into, out in shapes
            )
        )


@dataclasses.dataclass(frozen=True)
class Problem:
    """A workload with its numbers drawn. `data` has samples as rows; every array of
    `starts` has a leading axis of lanes."""

    workload: Workload
    data: jax.Array
    moments: gf.Moments
    flow: gf.GradientFlow
    start: "Start"
    key: jax.Array
    starts: gf.models.DeepLinear
    horizon: float


def draw(workload: Workload, dtype: str) -> Problem:
    """The same data and starts for every candidate: entries of $W_j$ are
    $N(0, 1/d_j)$."""
    width = workload.widths[0]
    samples = 3 * width
    data_key, key = jr.split(jr.key(0))
    data = jr.normal(data_key, (samples, width), dtype) / width**0.5
    moments = gf.Moments.from_data(data)
    flow = gf.GradientFlow(gf.models.SquaredLoss(moments))
    start = Start(workload.widths, dtype)
    each = lambda draw: start(jr.fold_in(key, draw))
    starts = jax.vmap(each)(jnp.arange(workload.lanes))
    until = workload.horizon * samples
    return Problem(workload, data, moments, flow, start, key, starts, until)


# Velocities: functions of all that they need, so that nothing is folded into the
# compiled program.


def moment_velocity(problem: Problem) -> timing.Candidate:
    def velocities(flow, starts):
        return jax.vmap(flow.velocity)(starts).weights

    return _candidate(velocities, problem.flow, problem.starts)


def data_velocity(problem: Problem) -> timing.Candidate:
    def loss(weights, x):
        output = x.T
        for weight in weights:
            output = weight @ output
        return 0.5 * jnp.sum((x.T - output) ** 2) / len(x)

    return _descent(loss, problem, problem.data)


def product_velocity(problem: Problem) -> timing.Candidate:
    def loss(weights, moments):
        product, *rest = weights
        for weight in rest:
            product = weight @ product
        return (
            0.5 * jnp.sum((product @ moments.xx) * product)
            - jnp.sum(product * moments.xy.T)
            + 0.5 * jnp.trace(moments.yy)
        )

    return _descent(loss, problem, problem.moments)


def _descent(loss, problem: Problem, known: Any) -> timing.Candidate:
    def velocity(weights, known):
        return jax.tree.map(jnp.negative, jax.grad(loss)(weights, known))

    batched = jax.vmap(velocity, in_axes=(0, None))
    return _candidate(batched, problem.starts.weights, known)


def _candidate(function, *arguments: Any) -> timing.Candidate:
    program, seconds = timing.compiled(function, *arguments)
    return timing.Candidate(lambda: program(*arguments), seconds)


VELOCITIES = {
    "autodiff of the loss on the data": data_velocity,  # the baseline
    "autodiff of the moments, full product": product_velocity,
    "gradflow velocity": moment_velocity,
}

# Trajectories: the flattened end points of lanes, one per row.


def gradflow_run(problem: Problem, rtol: float, batch: int) -> timing.Candidate:
    """All lanes, `batch` of them at once (a divisor of their number)."""

    def run(flow, start):
        solution = gf.integrate(
            flow,
            start,
            # Observed runs end at the last time, whatever their speed.
            times=jnp.asarray([problem.horizon], problem.data.dtype),
            observe={},
            rtol=rtol,
            tolerance=1000 * rtol,
            max_steps=10**6,
            throw=False,
        )
        return solution.point.weights, solution.result == gf.RESULTS.horizon_reached

    part = lambda start: jax.tree.map(
        lambda leaf: leaf[start : start + batch], problem.starts
    )
    parts = [part(start) for start in range(0, problem.workload.lanes, batch)]
    batched = jax.vmap(run, in_axes=(None, 0))
    program, seconds = timing.compiled(batched, problem.flow, parts[0])
    return timing.Candidate(
        lambda: [program(problem.flow, starts) for starts in parts], seconds
    )


def ensemble_run(problem: Problem, rtol: float, method) -> timing.Candidate:
    """All lanes, `BATCH` of them at once, refilled."""
    integrator = gf.Integrator(
        problem.flow,
        horizon=problem.horizon,
        rtol=rtol,
        tolerance=1000 * rtol,
        # Until the horizon, whatever the speed.
        stop=EnergyBelow(
            problem.flow.energy, jnp.asarray(-jnp.inf), jnp.zeros(()), jnp.zeros(())
        ),
        method=method,
        max_steps=10**6,
    )
    lanes = problem.workload.lanes

    def call():
        ends = [
            solution
            for solution, _ in descend(
                integrator,
                problem.start,
                problem.key,
                [range(lanes)],
                min(lanes, BATCH),
            )
        ]
        arrived = [end.result == gf.RESULTS.horizon_reached for end in ends]
        weights = [end.point.weights for end in ends]
        return list(zip(weights, arrived, strict=True))

    return timing.warmed(call)


def peers(problem: Problem, rtol: float) -> dict[str, timing.Candidate]:
    """The loops and solvers of others; scipy's RK45 is the baseline."""
    few = problem.workload.scipy_lanes
    made = {
        f"scipy {method} loop": timing.Candidate(
            lambda method=method: scipy_run(problem, rtol, method)
        )
        for method in ("RK45", "LSODA")
    }
    if torch_peers.INSTALLED:
        arguments = (
            np.array(problem.moments.xx),
            np.array(problem.moments.xy).T,
            [weight.shape[1:] for weight in problem.starts.weights],
            flatten(problem.starts.weights)[:few],
            problem.horizon,
            rtol,
        )
        for name, run in (
            ("torchdiffeq dopri5 loop", torch_peers.torchdiffeq_run),
            ("torchode Tsit5", torch_peers.torchode_run),
        ):
            made[name] = timing.Candidate(lambda run=run: run(*arguments))
    return made


def scipy_run(problem: Problem, rtol: float, method: str = "RK45") -> np.ndarray:
    """The loop over lanes, with the velocity by backpropagation in NumPy."""
    xx, yx = np.asarray(problem.moments.xx), np.asarray(problem.moments.xy).T
    shapes = [weight.shape[1:] for weight in problem.starts.weights]
    cuts = np.cumsum([rows * columns for rows, columns in shapes])[:-1]

    def velocity(time, flat):
        del time
        weights = [
            part.reshape(shape)
            for part, shape in zip(np.split(flat, cuts), shapes, strict=True)
        ]
        below = [np.eye(len(xx), dtype=flat.dtype)]
        for weight in weights:
            below.append(weight @ below[-1])
        back = yx - below[-1] @ xx
        moves = []
        for weight, lower in zip(reversed(weights), reversed(below[:-1]), strict=True):
            moves.append((back @ lower.T).ravel())
            back = weight.T @ back
        return np.concatenate(moves[::-1])

    starts = flatten(problem.starts.weights)[: problem.workload.scipy_lanes]
    ends = []
    for start in starts:
        # gradflow's tolerance is relative to the whole point, so that entries near 0
        # need no more accuracy than others: the same is asked of scipy.
        atol = rtol * float(np.sqrt(np.mean(start**2)))
        span = (0.0, problem.horizon)
        ends.append(solve_ivp(velocity, span, start, method, rtol=rtol, atol=atol))
    return np.stack([end.y[:, -1] for end in ends])


def flatten(weights: Any) -> np.ndarray:
    """One row of all entries per lane, in float64."""
    rows = [np.asarray(weight, np.float64) for weight in weights]
    return np.concatenate([row.reshape(len(row), -1) for row in rows], axis=1)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest over lanes of the error relative to the size of the lane."""
    errors = np.linalg.norm(found - expected, axis=1)
    return float(np.max(errors / np.linalg.norm(expected, axis=1)))


def bench_velocities(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    candidates = {name: make(problem) for name, make in VELOCITIES.items()}
    timings = timing.interleave(candidates, repeats=repeats)
    flat = {name: flatten(timings[name].result) for name in candidates}
    expected = flat["autodiff of the loss on the data"]
    lanes = dict.fromkeys(candidates, problem.workload.lanes)
    errors = {name: difference(flat[name], expected) for name in candidates}
    return _rows(problem, candidates, timings, lanes, errors)


def bench_runs(problem: Problem, repeats: int, rtol: float) -> list[dict[str, Any]]:
    lanes, few = problem.workload.lanes, problem.workload.scipy_lanes
    others = peers(problem, rtol)
    candidates = dict(others)
    for batch in (lanes, BATCH):
        if batch == lanes or (lanes > batch and lanes % batch == 0):
            name = f"gradflow integrate, {batch} at once"
            candidates[name] = gradflow_run(problem, rtol, batch)
    for name, method in (("Tsit5", diffrax.Tsit5()), ("auto", "auto")):
        candidates[f"gradflow ensemble, {name}"] = ensemble_run(problem, rtol, method)
    timings = timing.interleave(candidates, repeats=repeats)
    exact = scipy_run(problem, REFERENCE_RTOL, "DOP853")
    errors, counts = {}, {}
    for name in candidates:
        result = timings[name].result
        if name in others:
            errors[name], counts[name] = difference(result, exact), few
            continue
        if not all(bool(jnp.all(arrived)) for _, arrived in result):
            raise RuntimeError(f"{name}: a run did not reach the horizon")
        ends = np.concatenate([flatten(weights) for weights, _ in result])
        errors[name], counts[name] = difference(ends[:few], exact), lanes
    return _rows(problem, candidates, timings, counts, errors)


def _rows(problem, candidates, timings, lanes, errors) -> list[dict[str, Any]]:
    """A row per candidate; the first one is the baseline."""
    per_lane = {name: timings[name].median / lanes[name] for name in candidates}
    slowest = per_lane[next(iter(candidates))]
    return [
        {
            "widths": problem.workload.name,
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


def main(arguments: list[str] | None = None) -> int:
    parser = timing.flags(TITLE)
    parser.add_argument(
        "--lanes", type=timing.count, help="instead of each workload's own"
    )
    parser.add_argument("--dtype", choices=list(AGREE), default="float64")
    given = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", given.dtype == "float64")
    repeats = given.repeats or (2 if given.smoke else 5)
    rows, failures = [], []
    for workload in SMOKE if given.smoke else FULL:
        if given.lanes is not None:
            few = min(workload.scipy_lanes, given.lanes)
            workload = dataclasses.replace(workload, lanes=given.lanes, scipy_lanes=few)
        problem = draw(workload, given.dtype)
        velocities = bench_velocities(problem, repeats)
        runs = bench_runs(problem, repeats, RTOL[given.dtype])
        for row in velocities + runs:
            print(timing.table([row]).splitlines()[-1], flush=True)
        rows += velocities + runs
        failures += [
            f"{row['what']} on {row['widths']} differs by {row['relative error']:.2g}"
            for row in velocities
            if not row["relative error"] <= AGREE[given.dtype]
        ]
    setting = {**timing.machine(given.dtype), "repeats": repeats}
    return timing.finish("velocity", rows, setting, given.out, failures)


if __name__ == "__main__":
    sys.exit(main())
