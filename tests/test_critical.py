"""Verdicts: right at planted points, never wrong beside them, honest on plateaus."""

import itertools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from families import moments, network, planted, theory
from jax.flatten_util import ravel_pytree

from gradflow.critical import classify, describe, KIND, RULE
from gradflow.flow import GradientFlow
from gradflow.initial import GaussianInit
from gradflow.models.linear import DeepLinear, SquaredLoss
from gradflow.moments import Moments
from gradflow.solution import RESULTS
from gradflow.solve import integrate
from gradflow.solvers.stiff import stiff
from gradflow.theory.linear import LinearTheory
from gradflow.types import names_of


SADDLES = ("strict_saddle", "nonstrict_saddle")
VALUES = (3.0, 2.0, 1.2, 0.7)
WIDTHS = {2: (5, 3, 4), 3: (5, 4, 3, 4), 4: (5, 4, 3, 4, 4)}


@eqx.filter_jit
def verdict(known, at):
    return classify(GradientFlow(known.energy), known, at)


@eqx.filter_jit
def verdicts(known, solutions):
    flow = GradientFlow(known.energy)
    return jax.lax.map(lambda solution: classify(flow, known, solution), solutions)


@eqx.filter_jit
def run_all(known, points, horizon, max_steps=4096):
    def one(point):
        return integrate(
            GradientFlow(known.energy),
            point,
            stop=known.certificate,
            horizon=horizon,
            tolerance=1e-3,
            method=(diffrax.Tsit5(), stiff()),
            max_steps=max_steps,
            throw=False,
        )

    return jax.vmap(one)(points)


def stack(points):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_every_planted_point(depth):
    """A 5 by 4 problem, every index set: kind and index are right at the point."""
    rng = np.random.default_rng(depth)
    widths = WIDTHS[depth]
    known = theory(rng, VALUES, widths)
    for modes in known.index_sets():
        best_of_rank = modes == tuple(range(len(modes)))
        if len(modes) == known.rank and best_of_rank:
            expected = "global_minimum"
        elif best_of_rank and depth > 2:
            expected = "nonstrict_saddle"
        else:
            expected = "strict_saddle"
        for spread in (0.0, 0.3):
            point = planted(rng, known, modes, widths, "lift", spread=spread)
            found = verdict(known, point)
            assert names_of(KIND, found.kind) == expected, (modes, describe(found))
            assert int(found.rank) == len(modes)
            assert np.flatnonzero(found.active).tolist() == list(modes)
            assert abs(float(found.value_gap)) < 1e-12
            if expected != "global_minimum":
                assert int(found.index) == known.index(modes, depth)
                assert names_of(RULE, found.rule) == "closed_form"
                assert float(found.remaining) == np.inf


@pytest.mark.parametrize(
    "depth,exponents,patience",
    [
        (2, (2, 6, 10), 1000),
        pytest.param(3, (2, 10), 400, marks=pytest.mark.slow),
        pytest.param(4, (2, 10), 200, marks=pytest.mark.slow),
        pytest.param(2, range(2, 11), 1000, marks=pytest.mark.slow),
        pytest.param(3, range(2, 11), 1000, marks=pytest.mark.slow),
        pytest.param(4, range(2, 11), 1000, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_runs_from_beside_a_saddle(depth, exponents, patience):
    """1e-2 .. 1e-10 away, in random directions and along the most negative curvature:
    the right minimum if the horizon allows, else open, with a predicted time; never a
    saddle."""
    rng = np.random.default_rng(10 + depth)
    widths = WIDTHS[depth]
    known = theory(rng, VALUES, widths)
    points, easy = [], []
    best = tuple(range(known.rank))
    for modes in known.index_sets():
        if modes == best:
            continue
        saddle = planted(rng, known, modes, widths, "lift", spread=0.0)
        flat, rebuild = ravel_pytree(saddle)
        hessian = jax.hessian(lambda v: known.energy(rebuild(v)))(flat)  # noqa: B023
        values, vectors = np.linalg.eigh(hessian)
        steps = [rng.normal(size=flat.size)]
        # (In the default tests at depth 2 only: runs at depth 3 and 4 are long.)
        if values[0] < -1e-6 and (depth == 2 or patience == 1000):
            steps.append(vectors[:, 0])
        for step, exponent in itertools.product(steps, exponents):
            move = 10.0**-exponent * step / np.linalg.norm(step)
            points.append(rebuild(flat + move))
            # Curvature can point along matrices of the same rank: the exact flow then
            # ends at the next saddle, and only rounding leads on, after ages. And from
            # 1e-10 a chain of depth 4 needs time 1e20.
            easy.append(
                depth == 2 or (depth == 3 and step is steps[0] and exponent == 2)
            )
    points, easy = stack(points), np.array(easy)
    counts = {}
    for name, horizon in [("short", 2.0), ("long", np.inf)]:
        solution = run_all(known, points, horizon, patience)
        found = verdicts(known, solution)
        kinds = names_of(KIND, found.kind)
        assert not np.isin(kinds, SADDLES).any()
        assert not (kinds == "diverged").any()
        certified = kinds == "global_minimum"
        gaps = np.asarray(found.gap)[certified]
        assert (gaps < float(known.threshold() - known.optimal_energy())).all()
        open_times = np.asarray(found.remaining)[~certified]
        assert np.isfinite(open_times).all() and (open_times > 0).all()
        counts[name] = f"{certified.sum()} of {kinds.size} certified"
        if name == "long":
            assert certified[easy].all()
    print(f"\ndepth {depth}: {counts}")


def test_predicted_time_is_about_right():
    """Beside a saddle, the time that a run then really takes to half the next mode."""
    rng = np.random.default_rng(5)
    ratios = []
    for depth, modes, size in [(2, (0,), 1e-8), (3, (0,), 1e-2), (4, (), 1e-1)]:
        widths = WIDTHS[depth]
        known = theory(rng, VALUES, widths, condition=1.5)
        point = planted(rng, known, modes, widths, "lift", spread=0.0)
        moves = [rng.normal(size=weight.shape) for weight in point.weights]
        point = network(
            [w + size * move for w, move in zip(point.weights, moves, strict=True)]
        )
        predicted = float(verdict(known, point).remaining)
        level = known.critical_energy(modes) - 0.375 * known.spectrum()[len(modes)] ** 2
        away = lambda p, known=known, level=level: known.energy(p) < level
        solution = integrate(
            GradientFlow(known.energy),
            point,
            stop=away,
            tolerance=1e-3,
            max_steps=10**5,
        )
        assert names_of(RESULTS, solution.result) == "rule_met"
        ratios.append(predicted / float(solution.time))
    print("\npredicted over actual time:", np.round(ratios, 2))
    assert all(0.9 < ratio < 1.1 for ratio in ratios)


def steady_state_says_done(known, points, tolerance):
    """Where diffrax's own event stops the lanes: at its documented default, the
    solver's tolerances (`None`), or loosened so that it fires more often."""
    flow = GradientFlow(known.energy)

    @eqx.filter_jit
    @eqx.filter_vmap
    def one(point):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: flow.velocity(y)),
            diffrax.Tsit5(),
            0.0,
            1e6,
            0.01,
            point,
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
            event=diffrax.Event(
                diffrax.steady_state_event(rtol=tolerance, atol=tolerance)
            ),
            max_steps=4096,
            throw=False,
        )
        end = jax.tree.map(lambda leaf: leaf[-1], solution.ys)
        return end, solution.result == diffrax.RESULTS.event_occurred

    return one(points)


@pytest.mark.parametrize(
    "scale,depth",
    [
        pytest.param(0.1, 2, marks=pytest.mark.slow),
        pytest.param(0.1, 3, marks=pytest.mark.slow),
        pytest.param(0.1, 4, marks=pytest.mark.slow),
        pytest.param(0.01, 2, marks=pytest.mark.slow),
        (0.001, 2),
        pytest.param(0.001, 3, marks=pytest.mark.slow),
        pytest.param(0.01, 3, marks=pytest.mark.slow),
        pytest.param(0.01, 4, marks=pytest.mark.slow),
        pytest.param(0.001, 4, marks=pytest.mark.slow),
    ],
)
def test_plateaus_fool_a_small_gradient_but_not_a_verdict(depth, scale):
    """Target diag(3, 1, 0.3) from tiny starts: a verdict is a certified minimum or
    none at all, at short and long horizons."""
    target = jnp.diag(jnp.array([3.0, 1.0, 0.3]))
    data = Moments(jnp.eye(3), target.T, target @ target.T, count=1)
    known = LinearTheory(SquaredLoss(data), 3)
    start = GaussianInit((3,) * (depth + 1), scale)
    points = jax.vmap(start)(jr.split(jr.key(depth), 32))
    optimal, threshold = float(known.optimal_energy()), float(known.threshold())
    lines = []
    for horizon in (3.0, 30.0, 1e12):
        solution = run_all(known, points, horizon)
        found = verdicts(known, solution)
        kinds = names_of(KIND, found.kind)
        energies = np.asarray(solution.energy)
        assert not np.isin(kinds, SADDLES).any()
        wrong = (kinds == "global_minimum") & (energies >= threshold)
        assert not wrong.any()
        lines.append(f"t={horizon:g}: {(kinds == 'global_minimum').sum()} certified")
    # With time enough every lane is certified.
    assert (kinds == "global_minimum").all()
    for tolerance, name in [(None, "1e-6, its default"), (1e-3, "1e-3")]:
        ends, fired = steady_state_says_done(known, points, tolerance)
        energies = np.asarray(jax.vmap(known.energy)(ends))
        fooled = np.asarray(fired) & (energies > optimal + 1e-3)
        lines.append(
            f"steady_state_event at {name}: stopped {int(np.sum(fired))} of 32, "
            f"{int(fooled.sum())} of them wrongly"
        )
    print(f"\ndepth {depth}, scale {scale:g}: {'; '.join(lines)}")


def test_certificate_needs_no_hessian_and_an_open_case_has_all_the_evidence():
    rng = np.random.default_rng(2)
    known = theory(rng, VALUES, WIDTHS[3])
    best = known.lift((0, 1, 2), WIDTHS[3])
    found = verdict(known, best)
    assert names_of(RULE, found.rule) == "loss_certificate"
    assert np.isnan(float(found.curvature)) and int(found.index) == -1
    moves = [1e-4 * rng.normal(size=w.shape) for w in best.weights]
    start = network([0.01 * w + m for w, m in zip(best.weights, moves, strict=True)])
    found = verdict(known, start)
    assert names_of(KIND, found.kind) in ("unresolved", "not_critical")
    text = describe(found)
    for word in ("gap", "rank 0", "Hessian", "more time"):
        assert word in text


@pytest.mark.slow
def test_axis_aligned_starts_stay_and_others_are_left_open():
    """With exact zeros the exact flow stays on a saddle's stable manifold and so do the
    numbers; turned by a rotation, what keeps a run there is rounding."""
    root = jnp.diag(jnp.sqrt(jnp.array([3.0, 2.0, 1.0])))
    data = Moments(root @ root, root @ root, root @ root, count=1, autoencoding=True)
    known = LinearTheory(SquaredLoss(data), 2)
    first, last = np.zeros((2, 3)), np.zeros((3, 2))
    first[0, 0], last[0, 0] = 0.3, 0.5
    first[1, 2], last[2, 1] = 0.4, 0.2
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    turned = known.energy.moments
    turned = Moments(*[jnp.asarray(turn @ np.asarray(m) @ turn.T) for m in
                       (turned.xx, turned.xy, turned.yy)], count=1)  # fmt: skip
    turned = LinearTheory(SquaredLoss(turned), 2)
    for theory_of, start, expected in [
        (known, network([first, last]), "strict_saddle"),
        (turned, network([first @ turn.T, turn @ last]), "unresolved"),
    ]:
        flow = GradientFlow(theory_of.energy)
        # Tight, as the noise of a loose solver would keep both off the saddle.
        solution = integrate(
            flow,
            start,
            horizon=20.0,
            stop=lambda point: jnp.array(False),
            tolerance=1e-10,
        )
        found = verdict(theory_of, solution)
        assert names_of(KIND, found.kind) == expected, describe(found)
        assert np.flatnonzero(found.active).tolist() == [0, 2]
    # At the point itself, with no run behind it, both are the saddle to rounding.
    assert names_of(KIND, verdict(known, known.lift((0, 2), (3, 2, 3))).kind) == (
        "strict_saddle"
    )


def test_not_finite_is_diverged():
    rng = np.random.default_rng(3)
    known = theory(rng, VALUES, WIDTHS[2])
    for bad in (np.nan, np.inf, 1e300):
        weights = [rng.normal(size=(3, 5)), rng.normal(size=(4, 3))]
        weights[0][1, 2] = bad
        assert names_of(KIND, verdict(known, network(weights)).kind) == "diverged"


def test_small_speed_alone_decides_nothing():
    """Depth 4 from 1e-3: speed 1e-9 at once, and still no saddle."""
    rng = np.random.default_rng(4)
    known = theory(rng, VALUES, WIDTHS[4])
    start = GaussianInit(WIDTHS[4], 1e-3)(jr.key(0))
    found = verdict(known, start)
    assert float(found.speed) < 1e-6
    assert names_of(KIND, found.kind) == "unresolved"
    assert 1e3 < float(found.remaining) < 1e9


def test_verdict_is_invariant_under_rotation_in_a_tied_eigenspace():
    rng = np.random.default_rng(6)
    data = moments(rng, (2.0, 1.0, 1.0, 0.5), 4, 4, condition=1.0)
    known = LinearTheory(SquaredLoss(data), 3)
    left, right = np.asarray(known.left), np.asarray(known.right).T
    for angle in (0.0, 0.3, 1.1):
        turn = np.array(
            [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        )
        u = np.stack([left[:, 0], (left[:, 1:3] @ turn)[:, 0]], 1) * [2.0, 1.0]
        v = np.stack([right[:, 0], (right[:, 1:3] @ turn)[:, 0]], 1)
        first, middle, last = np.zeros((3, 4)), np.zeros((3, 3)), np.zeros((4, 3))
        first[:2], middle[:2, :2], last[:, :2] = v.T, np.eye(2), u
        found = verdict(known, network([first, middle, last]))
        assert names_of(KIND, found.kind) == "nonstrict_saddle"
        assert int(np.sum(found.active)) == 2


@pytest.mark.slow
def test_classify_in_float32_never_names_a_saddle():
    """Its rounding is far above what separates a saddle from beside one."""
    rng = np.random.default_rng(8)
    known = theory(rng, VALUES, WIDTHS[3])
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), known)
    for modes in known.index_sets():
        point = known.lift(modes, WIDTHS[3])
        point = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), point)
        kind = names_of(KIND, verdict(low, point).kind)
        if modes == (0, 1, 2):
            assert kind == "global_minimum"
        elif modes:
            assert kind in ("unresolved", "not_critical")


def test_deep_linear_of_another_shape_is_refused():
    rng = np.random.default_rng(9)
    known = theory(rng, VALUES, WIDTHS[2])
    point = DeepLinear((jnp.ones((3, 6)), jnp.ones((4, 3))))
    with pytest.raises(ValueError, match="maps 6 inputs to 4 outputs"):
        verdict(known, point)
