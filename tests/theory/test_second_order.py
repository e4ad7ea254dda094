"""The second-order criterion against the Hessian's own sign, on planted points."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import distort, network, planted, theory

from gradflow.flow import GradientFlow


WIDTHS = [(5, 3, 4), (5, 4, 3, 4), (5, 3, 4, 3, 4)]


@eqx.filter_jit
def hessian_eigenvalues(energy, point):
    chart, size = GradientFlow(energy).manifold.chart(point)
    return jnp.linalg.eigvalsh(jax.hessian(lambda s: energy(chart(s)))(jnp.zeros(size)))


@eqx.filter_jit
def match_of(known, point):
    return known.match(point)


@eqx.filter_jit
def remaining_of(known, point):
    return known.remaining(point)


def speed_of(known, point):
    gradient = known.energy.differential(point)
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("values", [(3.0, 2.0, 1.2, 0.7), (2.0, 2.0, 1.0, 0.5)])
def test_kind_agrees_with_hessian_sign(widths, values):
    rng = np.random.default_rng(sum(widths))
    known = theory(rng, values, widths)
    undecided, decided = 0, 0
    for modes in known.index_sets():
        for pattern in ("lift", "zeros", "aligned"):
            if pattern == "aligned" and (len(modes) > 2 or len(widths) == 3):
                continue
            point = planted(rng, known, modes, widths, pattern)
            assert speed_of(known, point) < 1e-12
            eigenvalues = hessian_eigenvalues(known.energy, point)
            scale = max(1.0, float(jnp.max(jnp.abs(eigenvalues))))
            negative = bool(eigenvalues[0] < -1e-8 * scale)
            match = match_of(known, point)
            optimal = bool(
                known.energy(point) - known.optimal_energy() < 1e-12 * sum(values)
            )
            undecided += not bool(match.optimal | match.strict | match.nonstrict)
            decided += bool(match.optimal | match.strict | match.nonstrict)
            # Never wrong, whatever is left open:
            assert not (match.optimal and not optimal)
            assert not (match.strict and not negative)
            assert not (match.nonstrict and (negative or optimal))
    # A residual block can have singular values too close to call.
    assert undecided <= 0.02 * (decided + undecided), (undecided, decided)


def test_naive_rank_test_is_not_used():
    # All of A_4, M_41, B_1 have rank above k = 0 for the pivot (4, 1), yet the Hessian
    # vanishes: u_3 is no left singular vector that v_2 belongs to.
    rng = np.random.default_rng(0)
    widths = (4, 3, 3, 3, 3)
    known = theory(rng, (3.0, 2.0, 1.0), widths)
    first = np.outer([1, 0, 0], np.asarray(known.right)[1]) @ known.inverse_root
    last = np.outer(np.asarray(known.left)[:, 2], [1, 0, 0])
    point = network([first, np.zeros((3, 3)), np.zeros((3, 3)), last])
    eigenvalues = hessian_eigenvalues(known.energy, point)
    assert float(jnp.max(jnp.abs(eigenvalues))) < 1e-12
    assert bool(match_of(known, point).nonstrict)
    # With the matching vector u_2 it is strict.
    last = np.outer(np.asarray(known.left)[:, 1], [1, 0, 0])
    point = network([first, np.zeros((3, 3)), np.zeros((3, 3)), last])
    assert float(hessian_eigenvalues(known.energy, point)[0]) < -0.1
    assert bool(match_of(known, point).strict)


@pytest.mark.parametrize("widths", WIDTHS)
def test_points_beside_a_saddle_are_not_the_saddle(widths):
    """From 1e-2 to 1e-10 away, in random directions and along residuals only."""
    rng = np.random.default_rng(7)
    known = theory(rng, (3.0, 2.0, 1.2, 0.7), widths)
    best = tuple(range(known.rank))
    for modes, exponent in itertools.product(known.index_sets(), range(2, 11)):
        if modes == best:
            continue
        point = planted(rng, known, modes, widths, "lift")
        assert bool(match_of(known, point).critical)
        moves = [rng.normal(size=weight.shape) for weight in point.weights]
        moved = network(
            [
                weight + 10.0**-exponent * move / np.linalg.norm(move)
                for weight, move in zip(point.weights, moves, strict=True)
            ]
        )
        match = match_of(known, moved)
        assert not bool(match.critical), (modes, exponent)


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("exponent", [1, 2, 4, 6])
def test_escape_time_of_the_balanced_origin(depth, exponent):
    """Exact: the scalar chain w' = m w^(N-1), until the product is m / 2."""
    size = 10.0**-exponent
    rng = np.random.default_rng(0)
    known = theory(rng, (2.0,), (1,) * (depth + 1), condition=1.0)
    sign = float(np.sign(known.q[0, 0]))
    weights = [np.full((1, 1), size) for _ in range(depth)]
    weights[0] = sign * weights[0]
    predicted = float(remaining_of(known, network(weights)))
    if depth == 2:
        exact = np.log(1 / size) / 2.0
    else:
        power = depth - 2
        exact = (size**-power - 1) / (power * 2.0)
    # Steps of a quarter of the fastest time: the last one overshoots.
    assert exact * 0.99 < predicted < exact * 1.01 + 0.25 / 2.0


def test_escape_time_is_finite_beside_and_infinite_at_a_saddle():
    rng = np.random.default_rng(1)
    widths = (4, 3, 3, 4)
    known = theory(rng, (3.0, 2.0, 1.0, 0.5), widths)
    point = planted(rng, known, (0,), widths, "lift", spread=0.0)
    distances = [1e-3, 1e-6, 1e-9]
    times = []
    for distance in distances:
        moved = [
            np.asarray(w) + distance * rng.normal(size=w.shape) for w in point.weights
        ]
        times.append(float(remaining_of(known, network(moved))))
    assert all(np.isfinite(times)) and times == sorted(times)
    # Depth 3: the time is inverse in the distance.
    assert 100 < times[2] / times[1] < 10000


def test_change_of_basis_changes_no_verdict():
    rng = np.random.default_rng(3)
    widths = (4, 3, 3, 4)
    known = theory(rng, (3.0, 2.0, 1.0, 0.5), widths)
    for modes in [(), (0,), (1,), (0, 1), (0, 2)]:
        point = planted(rng, known, modes, widths, "zeros", spread=0.0)
        other = network(distort(rng, [np.asarray(w) for w in point.weights], 0.5))
        one, two = match_of(known, point), match_of(known, other)
        assert bool(one.strict) == bool(two.strict)
        assert bool(one.nonstrict) == bool(two.nonstrict)
