"""Critical points, values, lifts and indices of deep linear networks."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import moments, network, theory
from scipy.optimize import minimize

from gradflow.flow import GradientFlow
from gradflow.models.linear import DeepLinear, LinearMap, SquaredLoss
from gradflow.moments import Moments
from gradflow.theory.linear import LinearTheory


VALUES = (3.0, 2.0, 1.2, 0.7)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def gradient_size(known, point):
    gradient = known.energy.differential(point)
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))


def test_singular_values_are_those_of_the_data(rng):
    known = theory(rng, VALUES, (5, 3, 4))
    np.testing.assert_allclose(known.spectrum(), VALUES, rtol=1e-12)


def test_every_critical_point_of_rank_k_matrices(rng):
    """The gradient vanishes along the tangent space of rank-k matrices, and the value
    is the formula's."""
    known = theory(rng, VALUES, (5, 3, 4))
    for modes in known.index_sets():
        point = known.critical_point(modes)
        np.testing.assert_allclose(
            known.energy(point), known.critical_energy(modes), rtol=1e-12
        )
        gradient = known.energy.differential(point).factors()[0]
        matrix = np.asarray(point.weight)
        assert np.abs(gradient @ matrix.T).max() < 1e-13
        assert np.abs(matrix.T @ gradient).max() < 1e-13


@pytest.mark.parametrize(
    "widths",
    [
        (5, 4, 3, 4),
        pytest.param((5, 3, 4), marks=pytest.mark.slow),
        pytest.param((5, 3, 4, 3, 4), marks=pytest.mark.slow),
    ],
)
def test_lifts_are_critical_and_have_the_index(rng, widths):
    known = theory(rng, VALUES, widths)
    flow = GradientFlow(known.energy)
    for modes in known.index_sets():
        point = known.lift(modes, widths)
        np.testing.assert_allclose(
            point.matrix(), known.critical_point(modes).weight, atol=1e-13
        )
        assert gradient_size(known, point) < 1e-13
        chart, size = flow.manifold.chart(point)
        hessian = jax.hessian(lambda s: known.energy(chart(s)))(jnp.zeros(size))  # noqa: B023
        values = np.linalg.eigvalsh(hessian)
        count = int(np.sum(values < -1e-8 * np.abs(values).max()))
        assert known.index(modes, len(widths) - 1) == count


def test_hessian_at_the_origin(rng):
    """Depth 2: eigenvalues plus and minus the singular values of yx, each as often as
    the hidden width; depth 3: zero."""
    known = theory(rng, VALUES, (5, 3, 4))
    yx = np.asarray(known.energy.moments.xy).T
    origin = network([np.zeros((3, 5)), np.zeros((4, 3))])
    chart, size = GradientFlow(known.energy).manifold.chart(origin)
    values = np.linalg.eigvalsh(
        jax.hessian(lambda s: known.energy(chart(s)))(jnp.zeros(size))
    )
    singular = np.linalg.svd(yx, compute_uv=False)
    np.testing.assert_allclose(values[0], -singular[0], rtol=1e-12)
    expected = np.sort(
        np.concatenate([np.repeat(singular, 3), -np.repeat(singular, 3)])
    )
    nonzero = values[np.abs(values) > 1e-12]
    np.testing.assert_allclose(nonzero, expected, rtol=1e-10)


def test_optimum_against_strong_minimization(rng):
    """No start of L-BFGS gets below the closed form, and the best gets there."""
    for values, widths in [
        (VALUES, (5, 3, 4)),
        ((2.0, 2.0, 1.0), (4, 2, 3)),
        ((1.0,), (3, 2, 3)),
    ]:
        known = theory(rng, values, widths, noise=0.1)
        shapes = list(itertools.pairwise(widths))
        ends = np.cumsum([0, *(a * b for a, b in shapes)])

        @jax.jit
        def value_and_gradient(flat, shapes=shapes, ends=ends, known=known):
            def energy(flat):
                weights = [
                    flat[i:j].reshape(b, a)
                    for (i, j), (a, b) in zip(
                        itertools.pairwise(ends.tolist()), shapes, strict=True
                    )
                ]
                return known.energy(DeepLinear(tuple(weights)))

            return jax.value_and_grad(energy)(flat)

        found = [
            minimize(
                lambda flat: [np.asarray(v) for v in value_and_gradient(flat)],  # noqa: B023
                rng.normal(size=ends[-1]),
                jac=True,
                method="L-BFGS-B",
                options={"ftol": 1e-16, "gtol": 1e-10, "maxiter": 5000},
            ).fun
            for _ in range(6)
        ]
        optimal = float(known.optimal_energy())
        np.testing.assert_allclose(min(found), optimal, rtol=1e-9)
        assert min(found) > optimal - 1e-10


def test_optimum_is_attained_and_excess_is_zero_there(rng):
    known = theory(rng, VALUES, (5, 3, 4), noise=0.3)
    optimum = known.optimum()
    np.testing.assert_allclose(
        known.energy(optimum), known.optimal_energy(), rtol=1e-13
    )
    assert abs(float(known.excess(optimum))) < 1e-14


@pytest.mark.parametrize(
    "values,rank,gap",
    [
        ((3.0, 2.0, 1.0, 0.5), 3, 0.5 * (1.0 - 0.25)),
        ((3.0, 2.0, 1.0, 1.0), 3, 0.5 * 1.0),  # a swap of ties is none; dropping one is
        ((3.0, 2.0, 1.0, 1.0, 0.2), 3, 0.5 * (1.0 - 0.04)),
        ((2.0, 2.0, 2.0, 2.0), 2, 0.5 * 4.0),  # all tied: only dropping one counts
        ((3.0, 1.0), 3, 0.5 * 1.0),  # fewer modes than rank
        ((3.0, 2.0, 1e-6), 3, 0.5 * 1e-12),  # below TIE: not a value of its own
    ],
)
def test_second_smallest_critical_value(rng, values, rank, gap):
    size = max(len(values), rank)
    data = moments(rng, values, size, size)
    known = LinearTheory(SquaredLoss(data), rank)
    listed = known.critical_values()
    expected = listed[1]
    if values[-1] > 1e-5:
        np.testing.assert_allclose(known.threshold() - known.optimal_energy(), gap)
    np.testing.assert_allclose(known.threshold(), expected, rtol=1e-12)


def test_certificate_is_about_the_threshold(rng):
    """Just below the second critical value it holds, just above it does not."""
    known = theory(rng, VALUES, (5, 3, 4))
    second = known.critical_point((0, 1, 3)).weight
    best = known.optimum().weight
    line = lambda s: LinearMap(second + s * (best - second))
    assert not bool(known.certificate(line(0.0)))
    assert not bool(known.certificate(line(-1e-3)))
    assert bool(known.certificate(line(0.6)))
    energies = [float(known.energy(line(s))) for s in np.linspace(0, 1, 51)]
    for s, energy in zip(np.linspace(0, 1, 51), energies, strict=True):
        if bool(known.certificate(line(s))):
            assert energy < float(known.threshold())


def test_certificate_without_anything_to_learn(rng):
    """yx = 0: the only critical value is the least."""
    eye = jnp.eye(3)
    known = LinearTheory(SquaredLoss(Moments(eye, 0 * eye, eye, count=1)), 2)
    point = network([rng.normal(size=(2, 3)), rng.normal(size=(3, 2))])
    assert bool(known.certificate(point))


def test_active_modes_with_ties(rng):
    """Rotating the critical point within a tied eigenspace changes nothing."""
    known = theory(rng, (2.0, 1.0, 1.0, 0.5), (4, 3, 4), condition=1.0)
    angle = 0.7
    left = np.asarray(known.left)
    right = np.asarray(known.right)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    u, v = left[:, 1:3] @ turn, right[1:3].T @ turn
    one = np.outer(u[:, 0], v[:, 0]) @ np.asarray(known.inverse_root)
    assert known.active(LinearMap(jnp.asarray(one))).tolist() == [
        False,
        True,
        False,
        False,
    ]
    match = known.match(network([v[:, :1].T @ known.inverse_root, u[:, :1]]))
    assert bool(match.critical)


def test_index_sets_counts_and_refusals(rng):
    known = theory(rng, VALUES, (5, 2, 4))
    assert len(known.index_sets()) == 1 + 4 + 6
    assert known.critical_values().shape == (11,)
    wide = theory(rng, np.linspace(2, 1, 40), (40, 20, 40))
    with pytest.raises(ValueError, match="too many to list"):
        wide.index_sets()


def test_theory_inside_jit_and_vmap(rng):
    data = [moments(rng, rng.uniform(0.5, 2, 3), 4, 3) for _ in range(5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *data)

    @eqx.filter_jit
    @eqx.filter_vmap
    def optimal(data):
        return LinearTheory(SquaredLoss(data), 2).optimal_energy()

    expected = [LinearTheory(SquaredLoss(d), 2).optimal_energy() for d in data]
    np.testing.assert_allclose(optimal(stacked), jnp.stack(expected), rtol=1e-12)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda k: LinearTheory(k.energy, 0), "rank must be >= 1"),
        (lambda k: LinearTheory(k.energy, 9), r"rank=9 is larger than min\(widths\)=4"),
        (lambda k: k.critical_point((0, 0)), "different numbers from 0 to 3"),
        (lambda k: k.critical_point((7,)), "different numbers from 0 to 3"),
        (lambda k: k.critical_energy((0, 1, 2, 3)), "more than rank=3"),
        (lambda k: k.lift((0, 1, 2), (5, 2, 4)), r"min\(widths\)=2"),
        (lambda k: k.lift((0,), (4, 2, 4)), "must begin with 5 and end with 4"),
    ],
)
def test_bad_arguments(rng, call, message):
    known = theory(rng, VALUES, (5, 3, 4))
    with pytest.raises(ValueError, match=message):
        call(known)


def test_singular_data_are_refused_with_their_rank(rng):
    x = rng.normal(size=(5, 8))
    energy = SquaredLoss(Moments.from_data(x))
    with pytest.raises(ValueError, match=r"xx has rank 5 of 8.*restrict\(5\)"):
        LinearTheory(energy, 2)
    # Within a traced computation it is the value, not the type, that fails.
    with pytest.raises(Exception, match="xx is singular"):
        eqx.filter_jit(lambda e: LinearTheory(e, 2).optimal_energy())(energy)
