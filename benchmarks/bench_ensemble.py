r"""What does it cost to learn where many gradient flows go?

For each workload (a network, its data, many random starts) the same lanes by:

- diffrax's `diffeqsolve`, vmapped: Tsit5, an event at a small gradient; with gradflow's
  velocity (the baseline) or with automatic differentiation, and with gradflow's loss
  certificate as the event;
- an ensemble of gradflow with the same method, tolerance and stopping gradient;
- the same with method="auto": Tsit5, then RKC2 in lanes that are stiff;
- an ensemble of gradflow that stops at the certificate (verdicts), also in float32 with
  the verdict in float64 (mixed).

D2 is too stiff for Tsit5: its baseline is diffrax's Kvaerno5.

Beside each time: velocities per lane, the share of lane steps that were idle, how many
lanes ended below the certificate's level, and for ensembles the error of W at a fixed
time against diffrax's Dopri8 at rtol 1e-11. Exits with 1 if a verdict run leaves a lane
uncertified, or if an error is too large.

    python benchmarks/bench_ensemble.py --out FOLDER
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import timing

import gradflow as gf
from gradflow.ensemble import descend
from gradflow.models.base import EnergyBelow


TITLE = "Many gradient flows of deep linear networks: gradflow against vmapped diffrax."
# The stopping gradient, relative to that at 0, and the tolerance of its runs.
GRADIENT, RTOL = 1e-4, 1e-6
# Verdicts need no accurate trajectory.
VERDICT_RTOL = 1e-4
REFERENCE_RTOL = 1e-11
# Error of W allowed at a fixed time, at RTOL.
ALLOWED = 1e-4
FOREVER = 1e8
MOST_STEPS = 2**17


@dataclasses.dataclass(frozen=True)
class Workload:
    """`scale` times N(0, 1/d_j) starts. `lanes` runs, `resident` of them at once in an
    ensemble. All but verdicts run `few` lanes where more would take too long."""

    name: str
    widths: tuple[int, ...]
    lanes: int
    resident: int
    scale: float = 1.0
    few: int | None = None
    # Data: of a teacher of rank 5, with this condition number of xx.
    condition: float | None = None
    gradient: float = GRADIENT


FULL = (
    Workload("A", (20, 2, 11, 20), 1024, 64, few=48),
    Workload("B", (5, 2, 5), 4096, 128),
    # Caches hold no more than two of these networks.
    Workload("C", (200, 20, 65, 110, 155, 200), 16, 2, few=2),
    Workload("D2", (20, 5, 20), 256, 64, few=4, condition=1e4, gradient=1e-6),
    Workload("E", (10, 2, 6, 10), 1024, 64, scale=0.02),
)
SMOKE = (
    Workload("A", (6, 2, 4, 6), 8, 4),
    Workload("B", (5, 2, 5), 8, 4),
)


class Start(eqx.Module):
    """Entries of $W_j$ are `scale` times $N(0, 1/d_j)$."""

    widths: tuple[int, ...] = eqx.field(static=True)
    scale: float

    def __call__(self, key):
        keys = jr.split(key, len(self.widths) - 1)
        shapes = zip(keys, self.widths[:-1], self.widths[1:], strict=True)
        return gf.models.DeepLinear(
            tuple(
                self.scale / out**0.5 * jr.normal(key, (out, into))
                for key, into, out in shapes
            )
        )


@dataclasses.dataclass(frozen=True)
class Problem:
    """A workload with its numbers drawn; data are scaled so that the gradient by the
    product at 0 has norm 1."""

    workload: Workload
    flow: gf.GradientFlow
    theory: gf.theory.LinearTheory
    start: Start
    key: jax.Array

    def starts(self, lanes: int):
        keys = jax.vmap(lambda draw: jr.fold_in(self.key, draw))(jnp.arange(lanes))
        return jax.vmap(self.start)(keys)


def draw(workload: Workload) -> Problem:
    width = workload.widths[0]
    key, data_key, *_ = jr.split(jr.key(0), 5)
    x = jr.normal(data_key, (3 * width, width))
    if workload.condition is None:
        size = jnp.linalg.norm(gf.Moments.from_data(x).xy) ** 0.5
        moments = gf.Moments.from_data(x / size)
    else:
        moments = taught(x, data_key, workload.condition)
    energy = gf.models.SquaredLoss(moments)
    return Problem(
        workload,
        gf.GradientFlow(energy),
        gf.theory.LinearTheory(energy, min(workload.widths)),
        Start(workload.widths, workload.scale),
        key,
    )


def taught(x, key, condition: float) -> gf.Moments:
    """Moments of inputs with this condition number and a linear teacher of rank 5."""
    left, _, right = jnp.linalg.svd(x, full_matrices=False)
    x = left * jnp.geomspace(1, condition**-0.5, x.shape[1]) @ right
    one, two = jr.normal(jr.fold_in(key, 1), (2, x.shape[1], 5))
    y = x @ one @ two.T / x.shape[1]
    size = jnp.linalg.norm(gf.Moments.from_data(x, y).xy) ** 0.5
    return gf.Moments.from_data(x / size, y / size)


@dataclasses.dataclass(frozen=True)
class Ends:
    """Where the lanes ended, and what it took."""

    certified: np.ndarray
    energies: np.ndarray
    velocities: float
    idle: float | None


def by_diffrax(
    problem: Problem, lanes: int, velocity, event, solver=None, rtol: float = RTOL
) -> timing.Candidate:
    """All lanes in one vmapped solve that runs until the last one is done."""
    solver = diffrax.Tsit5() if solver is None else solver
    gradient = problem.workload.gradient
    flow, theory = problem.flow, problem.theory
    terms = diffrax.ODETerm(lambda t, y, args: velocity(args, y))
    control = diffrax.PIDController(rtol=rtol, atol=1e-3 * rtol)

    def one(flow, theory, start):
        solution = diffrax.diffeqsolve(
            terms,
            solver,
            0.0,
            FOREVER,
            None,
            start,
            flow,
            stepsize_controller=control,
            event=diffrax.Event(
                lambda t, y, args, **_: event(flow, theory, y, gradient)
            ),
            max_steps=MOST_STEPS,
            throw=False,
        )
        end = jax.tree.map(lambda leaf: leaf[0], solution.ys)
        return theory.certificate(end), flow.energy(end), solution.stats["num_steps"]

    batched = jax.vmap(one, in_axes=(None, None, 0))
    arguments = flow, theory, problem.starts(lanes)
    program, seconds = timing.compiled(batched, *arguments)
    return timing.Candidate(lambda: program(*arguments), seconds)


def diffrax_ends(result) -> Ends:
    certified, energies, steps = (np.asarray(part) for part in result)
    # Six velocities a step and one for the event.
    idle = 1 - steps.mean() / steps.max()
    return Ends(certified, energies, 7 * steps.mean(), float(idle))


def small(flow, theory, point, gradient):
    return flow.speed(point) <= gradient


def certain(flow, theory, point, gradient):
    return theory.certificate(point)


def fast(flow, point):
    return flow.velocity(point)


def naive(flow, point):
    moments = flow.energy.moments

    def loss(point):
        product = point.matrix()
        return (
            0.5 * jnp.sum((product @ moments.xx) * product)
            - jnp.sum(product * moments.xy.T)
            + 0.5 * jnp.trace(moments.yy)
        )

    return jax.tree.map(jnp.negative, jax.grad(loss)(point))


def by_gradflow(problem: Problem, lanes: int, **settings: Any) -> timing.Candidate:
    """An ensemble with refill."""
    integrator = gf.Integrator(problem.flow, max_steps=MOST_STEPS, **settings)
    resident = min(problem.workload.resident, lanes)

    def call():
        draws = [range(lanes)]
        return list(descend(integrator, problem.start, problem.key, draws, resident))

    return timing.warmed(call)


def by_study(problem: Problem, lanes: int, dtype: str, **settings) -> timing.Candidate:
    """A whole study: an ensemble, and the verdict of each end."""
    study = gf.Study(
        problem.start,
        gf.Integrator(problem.flow, max_steps=MOST_STEPS, **settings),
        eqx.Partial(certified, problem.theory),
        draws=lanes,
        batch=min(problem.workload.resident, lanes),
    )
    return timing.warmed(
        lambda: gf.run_study(study, problem.key, dtype=dtype, progress=False)
    )


def judged(problem: Problem, draws: int, batch: int) -> gf.Study:
    """A study as `gradflow run` makes them: verdicts, each judged by `classify`."""
    integrator = gf.Integrator(
        problem.flow,
        stop=problem.theory.certificate,
        rtol=VERDICT_RTOL,
        tolerance=1e-1,
        max_steps=MOST_STEPS,
    )
    verdict = eqx.Partial(gf.classify, problem.flow, problem.theory)
    return gf.Study(problem.start, integrator, verdict, draws=draws, batch=batch)


def certified(theory, solution):
    return theory.certificate(solution.point)


def study_ends(outcome) -> Ends:
    solution = outcome.solution
    mean = float(solution.stats["velocities"].mean())
    return Ends(outcome.finding, solution.energy, mean, None)


def gradflow_ends(problem: Problem, result) -> Ends:
    solutions = [solution for solution, _ in result]
    energies = np.concatenate([solution.energy for solution in solutions])
    used = sum(steps["used"] for _, steps in result)
    every = sum(steps["all"] for _, steps in result)
    certified = np.asarray(problem.theory.certificate.holds(jnp.asarray(energies)))
    counted = [solution.stats["velocities"] for solution in solutions]
    velocities = float(np.concatenate(counted).mean())
    return Ends(certified, energies, velocities, 1 - used / every)


def error_at(problem: Problem, rtol: float, method, lanes: int = 4) -> float:
    """Of the product at time 20, the largest over lanes, relative to its size."""
    horizon = 20.0
    never = EnergyBelow(
        problem.flow.energy, jnp.asarray(-jnp.inf), jnp.zeros(()), jnp.zeros(())
    )
    integrator = gf.Integrator(
        problem.flow,
        horizon=horizon,
        rtol=rtol,
        tolerance=1e3 * rtol,
        stop=never,
        method=method,
        max_steps=MOST_STEPS,
    )
    draws = [range(lanes)]
    ((solution, _),) = descend(integrator, problem.start, problem.key, draws, lanes)
    found = jax.vmap(lambda point: point.matrix())(solution.point)

    def exact(start):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: problem.flow.velocity(y)),
            diffrax.Dopri8(),
            0.0,
            horizon,
            None,
            start,
            stepsize_controller=diffrax.PIDController(
                rtol=REFERENCE_RTOL, atol=1e-3 * REFERENCE_RTOL
            ),
            max_steps=MOST_STEPS,
        )
        return jax.tree.map(lambda leaf: leaf[0], solution.ys).matrix()

    expected = jax.jit(jax.vmap(exact))(problem.starts(lanes))
    errors = jnp.linalg.norm(found - expected, axis=(1, 2))
    return float(jnp.max(errors / jnp.linalg.norm(expected, axis=(1, 2))))


TSIT5, AUTO = diffrax.Tsit5(), "auto"


@dataclasses.dataclass(frozen=True)
class Row:
    """Something to time on `lanes` lanes, and how to read its result. Of ensembles:
    their tolerance and method, with which the error of W is measured."""

    lanes: int
    make: Callable[[], timing.Candidate]
    read: Callable[[Any], Ends]
    accuracy: tuple[float, Any] | None = None


def candidates(problem: Problem, naively: bool) -> dict[str, Row]:
    """What is compared; the first one is the baseline."""
    workload = problem.workload
    lanes, few = workload.lanes, workload.few or workload.lanes
    ours = lambda result: gradflow_ends(problem, result)
    stop = problem.theory.certificate
    verdict = {"rtol": VERDICT_RTOL, "tolerance": 1e-1, "stop": stop}
    made = {}
    if workload.condition is None:
        made |= by_tsit5(problem, few, naively)
    else:
        for rtol in (RTOL, VERDICT_RTOL):
            made[f"diffrax Kvaerno5, our velocity, gradient, rtol {rtol:g}"] = Row(
                few,
                lambda rtol=rtol: by_diffrax(
                    problem, few, fast, small, diffrax.Kvaerno5(), rtol
                ),
                diffrax_ends,
            )
    # Stiff runs to a small gradient: where they end needs no accurate trajectory.
    for rtol in (RTOL,) if workload.condition is None else (RTOL, VERDICT_RTOL):
        gradient = {"rtol": rtol, "tolerance": workload.gradient}
        at = "" if workload.condition is None else f", rtol {rtol:g}"
        made[f"gradflow auto, gradient{at}"] = Row(
            lanes,
            lambda gradient=gradient: by_gradflow(
                problem, lanes, method=AUTO, **gradient
            ),
            ours,
            (rtol, AUTO),
        )
    for name, method in (("auto", AUTO), ("Tsit5", TSIT5)):
        if method is AUTO or workload.condition is None and not workload.few:
            made[f"gradflow {name}, verdicts"] = Row(
                lanes,
                lambda method=method: by_gradflow(
                    problem, lanes, method=method, **verdict
                ),
                ours,
                (VERDICT_RTOL, method),
            )
    for dtype in ("float64", "mixed"):
        made[f"gradflow study, verdicts, {dtype}"] = Row(
            lanes,
            lambda dtype=dtype: by_study(problem, lanes, dtype, **verdict),
            study_ends,
        )
    return made


def by_tsit5(problem: Problem, few: int, naively: bool) -> dict[str, Row]:
    """diffrax, and gradflow with the same method, tolerance and stopping gradient."""
    made = {
        "diffrax, our velocity, gradient": Row(
            few, lambda: by_diffrax(problem, few, fast, small), diffrax_ends
        ),
        "diffrax, autodiff, gradient": Row(
            few, lambda: by_diffrax(problem, few, naive, small), diffrax_ends
        ),
        "diffrax, our velocity, certificate": Row(
            few, lambda: by_diffrax(problem, few, fast, certain), diffrax_ends
        ),
        "gradflow Tsit5, gradient": Row(
            few,
            lambda: by_gradflow(
                problem, few, method=TSIT5, rtol=RTOL, tolerance=GRADIENT
            ),
            lambda result: gradflow_ends(problem, result),
            (RTOL, TSIT5),
        ),
    }
    if not naively:
        del made["diffrax, autodiff, gradient"]
    return made


def bench(workload: Workload, repeats: int, naively: bool) -> list[dict[str, Any]]:
    problem = draw(workload)
    made = candidates(problem, naively)
    ready = {name: row.make() for name, row in made.items()}
    timings = timing.interleave(ready, repeats=repeats)
    rows = []
    flops = flops_of(problem)
    for name, row in made.items():
        ends = row.read(timings[name].result)
        per_lane = timings[name].median / row.lanes
        base = next(iter(rows), None)
        per_base = per_lane if base is None else base["us per lane"] / 1e6
        error = None if row.accuracy is None else error_at(problem, *row.accuracy)
        rows.append(
            {
                "workload": f"{workload.name} {'-'.join(map(str, workload.widths))}",
                "what": name,
                "lanes": row.lanes,
                "us per lane": 1e6 * per_lane,
                "spread": timings[name].spread,
                "speed over baseline": per_base / per_lane,
                "velocities": ends.velocities,
                "idle": ends.idle,
                "Gflop/s": 1e-9 * flops * ends.velocities / per_lane,
                "certified": int(ends.certified.sum()),
                "error of W": error,
                "compile s": ready[name].compile,
                "samples s": timings[name].samples,
            }
        )
    return rows


def flops_of(problem: Problem) -> float:
    """Of one velocity, as XLA counts them."""
    start = problem.start(problem.key)
    program = jax.jit(lambda flow, point: flow.velocity(point))
    costs = program.lower(problem.flow, start).compile().cost_analysis()
    return float(costs["flops"]) if costs else 0.0


def matmul_rate(size: int = 1024) -> float:
    """Gflop/s of a large product of matrices, the most this machine gives."""
    left = jr.normal(jr.key(0), (size, size))
    program, _ = timing.compiled(lambda a: a @ a, left)
    found = timing.interleave({"product": timing.Candidate(lambda: program(left))})
    return 2e-9 * size**3 / found["product"].median


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence for each thing that is wrong."""
    found = []
    for row in rows:
        error = row["error of W"]
        loose = "verdict" in row["what"] or f"rtol {VERDICT_RTOL:g}" in row["what"]
        allowed = 100 * ALLOWED if loose else ALLOWED
        if error is not None and not error <= allowed:
            found.append(
                f"{row['what']} on {row['workload']}: error of W {error:.2g} is above "
                f"{allowed:.2g}"
            )
        verdicts = row["what"].startswith("gradflow") and "verdicts" in row["what"]
        if verdicts and row["certified"] < row["lanes"]:
            found.append(
                f"{row['what']} on {row['workload']}: {row['certified']} of "
                f"{row['lanes']} lanes certified"
            )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = timing.flags(TITLE)
    parser.add_argument("--only", nargs="+", help="names of workloads, such as A B")
    parser.add_argument(
        "--lanes", type=timing.count, help="instead of each workload's own"
    )
    parser.add_argument(
        "--resident", type=timing.count, help="lanes at once in an ensemble"
    )
    parser.add_argument("--fast", action="store_true", help="without autodiff")
    given = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    repeats = given.repeats or (2 if given.smoke else 5)
    rows = []
    for workload in SMOKE if given.smoke else FULL:
        if given.only is not None and workload.name not in given.only:
            continue
        for name in ("lanes", "resident"):
            if getattr(given, name) is not None:
                workload = dataclasses.replace(workload, **{name: getattr(given, name)})
        more = bench(workload, repeats, not given.fast)
        for row in more:
            print(timing.table([row]).splitlines()[-1], flush=True)
        rows += more
    setting = {
        **timing.machine("float64"),
        "repeats": repeats,
        "Gflop/s of matrix products": f"{matmul_rate():.0f}",
    }
    return timing.finish("ensemble", rows, setting, given.out, failures(rows))


if __name__ == "__main__":
    sys.exit(main())
