import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from gradflow.initial import (
    BalancedInit,
    GaussianInit,
    GaussianLike,
    NearPoint,
    OrthogonalInit,
    OrthonormalBalancedInit,
    section7_widths,
)
from gradflow.models import LinearVAE
from gradflow.models.linear import DeepLinear


def _draws(init, key, count):
    return jax.jit(jax.vmap(init))(jr.split(key, count))


def test_gaussian_entries_have_the_moments_of_a_gaussian(getkey):
    scale, draws = 0.7, 500
    network = _draws(GaussianInit((5, 2, 4, 3), scale), getkey(), draws)
    assert [w.shape[1:] for w in network.weights] == [(2, 5), (4, 2), (3, 4)]
    for weight in network.weights:
        entries = np.asarray(weight).ravel() / scale
        # Standard deviations of the mean of x, x^2 and x^4: 1, sqrt 2, sqrt 96, over
        # sqrt(count). Five of them leave a chance of 1e-6.
        five = 5 / math.sqrt(entries.size)
        assert abs(np.mean(entries)) < five
        assert abs(np.mean(entries**2) - 1) < five * math.sqrt(2)
        assert abs(np.mean(entries**4) - 3) < five * math.sqrt(96)
    # Entries of different layers, and different entries of one, are independent.
    flat = np.concatenate(
        [np.asarray(w).reshape(draws, -1) for w in network.weights], axis=1
    )
    correlation = flat.T @ flat / draws / scale**2 - np.eye(flat.shape[1])
    assert np.max(np.abs(correlation)) < 6.5 * math.sqrt(2 / draws)


def test_gaussian_entries_in_the_shape_of_a_point(getkey):
    """Maps are drawn anew, variances stay, or move by the spread."""
    like = LinearVAE.zeros(30, 20, learn_decoder=True, hidden=((40,), ()))
    point = GaussianLike(like, 0.3)(getkey())
    for network in (point.encoder, point.decoder):
        for factor in network.factors():
            assert abs(np.std(factor) - 0.3) < 0.05
    np.testing.assert_array_equal(point.covariance.matrix(), np.eye(20))
    assert float(point.log_decoder_variance) == 0
    moved = GaussianLike(like, 0.3, spread=0.2)(getkey())
    assert abs(np.std(moved.covariance.below) - 0.2) < 0.05
    for bad in (-1.0, 0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be a finite number"):
            GaussianLike(like, bad)
    with pytest.raises(ValueError, match="spread must be a finite number"):
        GaussianLike(like, 0.3, spread=-1.0)


def test_gaussian_scale_may_be_swept(getkey):
    key = getkey()
    sweep = lambda scale: GaussianInit((2, 2), scale)(key).weights[0]
    found = jax.vmap(sweep)(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(found[1], 3 * found[0])
    np.testing.assert_allclose(found[0], GaussianInit((2, 2), 1.0)(key).weights[0])


def test_orthogonal_factors_are_uniform(getkey):
    scale, draws = 1.5, 500
    network = _draws(OrthogonalInit((3, 5, 2, 2), scale), getkey(), draws)
    for weight in network.weights:
        out, into = weight.shape[1:]
        frame = np.asarray(weight) / scale
        frame = frame if out >= into else frame.swapaxes(1, 2)
        gram = frame.swapaxes(1, 2) @ frame
        np.testing.assert_allclose(
            gram, np.eye(min(out, into))[None].repeat(draws, 0), atol=1e-14
        )
        # A uniform unit vector in dimension n has entries of mean 0 and variance 1/n.
        # (A QR factorization with the signs left as they come fails the first.)
        size = max(out, into)
        assert np.max(np.abs(frame.mean(axis=0))) < 5 / math.sqrt(draws * size)
        squares = np.mean(frame**2, axis=0)
        # Var(x^2) = 2 (n - 1) / (n^2 (n + 2)).
        spread = math.sqrt(2 * (size - 1) / (size**2 * (size + 2)) / draws)
        assert np.max(np.abs(squares - 1 / size)) < 5 * spread


@pytest.mark.parametrize(
    "widths, rank",
    [((4, 3), 3), ((4, 3, 5), 2), ((3, 4, 3, 3), 3), ((3, 3, 2, 3, 3, 4), 1)],
)
def test_balanced_start_has_the_given_product(getkey, widths, rank):
    left = jr.normal(getkey(), (widths[-1], rank))
    product = left @ jr.normal(getkey(), (rank, widths[0]))
    network = eqx.filter_jit(BalancedInit(widths, product))(getkey())
    assert network.widths == widths
    np.testing.assert_allclose(network.matrix(), product, atol=1e-13)
    assert network.imbalance() < 1e-13
    # No factor has more rank than the product, not even by the root of rounding.
    for weight in network.weights:
        values = np.linalg.svd(np.asarray(weight), compute_uv=False)
        assert np.sum(values > 1e-12) == rank


def test_balanced_start_draws_the_hidden_frames(getkey):
    product = jr.normal(getkey(), (3, 3))
    init = BalancedInit((3, 3, 3), product)
    one, other = init(jr.key(0)), init(jr.key(1))
    assert np.max(np.abs(one.weights[0] - other.weights[0])) > 0.1
    zero = BalancedInit((3, 2, 3), jnp.zeros((3, 3)))(jr.key(0))
    assert not any(weight.any() for weight in zero.weights)


@pytest.mark.parametrize("widths", [(5, 2, 4, 5), (5, 2, 3), (3, 3), (4, 1, 4)])
def test_start_of_section_7(getkey, widths):
    rank = widths[1]
    network = eqx.filter_jit(OrthonormalBalancedInit(widths))(getkey())
    assert network.widths == widths and network.imbalance() < 1e-13
    for matrix in (*network.weights, network.matrix()):
        values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        np.testing.assert_allclose(values[:rank], 1.0, rtol=1e-13)
        np.testing.assert_allclose(values[rank:], 0.0, atol=1e-13)
    if widths[0] == widths[-1]:
        # W(0) is a projection, so that u^T W(0) u >= 0 for every u.
        matrix = np.asarray(network.matrix())
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-14)
        np.testing.assert_allclose(matrix @ matrix, matrix, atol=1e-14)
        assert np.min(np.linalg.eigvalsh(matrix)) > -1e-14


def test_erratum_independent_frames_break_the_condition_of_section_7(getkey):
    # Erratum: the source claims u^T W(0) u > 0 although V_0 is independent of V_N.
    # With the last width one larger, ours are: then half of the signs are wrong.
    network = _draws(OrthonormalBalancedInit((4, 1, 5)), getkey(), 200)
    entries = np.asarray(network.weights[1][:, 0, 0] * network.weights[0][:, 0, 0])
    wrong = np.mean(entries < 0)
    assert abs(wrong - 0.5) < 5 * 0.5 / math.sqrt(200)


def test_widths_of_section_7():
    # d = 20 as in the source's figures; d_0 is not on the grid, halves go up.
    assert section7_widths(20, 5) == (20, 10, 13, 15, 18, 20)
    assert section7_widths(20, 10) == (20, 10, 11, 12, 13, 14, 16, 17, 18, 19, 20)
    assert section7_widths(20, 5, 1) == (20, 1, 6, 11, 15, 20)
    assert section7_widths(20, 2) == (20, 10, 20)
    assert section7_widths(5, 2) == (5, 3, 5)
    assert section7_widths(7, 1) == (7, 7)
    assert section7_widths(1, 3) == (1, 1, 1, 1)
    for depth in range(2, 12):
        widths = section7_widths(20, depth, 7)
        OrthonormalBalancedInit(widths)  # its narrowest layer is the first hidden one
        assert widths[-1] == 20 and list(widths[1:]) == sorted(widths[1:])


def test_near_point_moves_by_exactly_the_distance(getkey):
    point = DeepLinear((jr.normal(getkey(), (2, 3)), jr.normal(getkey(), (3, 2))))
    separation = lambda a, b: math.sqrt(
        sum(
            float(jnp.sum((x - y) ** 2))
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
    )
    for distance in (1e-3, 0.5, 2.0):
        moved = NearPoint(point, distance)(getkey())
        assert isinstance(moved, DeepLinear)
        np.testing.assert_allclose(separation(moved, point), distance, rtol=1e-10)
    unmoved = NearPoint(point, 0.0)(getkey())
    assert separation(unmoved, point) == 0
    # Random directions differ; a given one is followed, whatever its length.
    one, other = (NearPoint(point, 1.0)(key) for key in jr.split(getkey()))
    assert separation(one, other) > 0.1
    along = DeepLinear((3 * jnp.ones((2, 3)), jnp.zeros((3, 2))))
    moved = NearPoint(point, 0.6, along)(getkey())
    np.testing.assert_allclose(
        moved.weights[0] - point.weights[0], 0.6 / math.sqrt(6), rtol=1e-12
    )
    np.testing.assert_array_equal(moved.weights[1], point.weights[1])


def test_random_directions_are_uniform(getkey):
    point = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    moved = _draws(NearPoint(point, 1.0), getkey(), 500)
    flat = np.concatenate([moved["a"], moved["b"].reshape(500, 4)], axis=1)
    assert np.max(np.abs(flat.mean(axis=0))) < 5 / math.sqrt(500 * 7)
    covariance = flat.T @ flat / 500
    # Var(x^2) = 2 (n - 1) / (n^2 (n + 2)) in dimension n = 7; products vary less.
    spread = math.sqrt(2 * 6 / (49 * 9) / 500)
    np.testing.assert_allclose(covariance, np.eye(7) / 7, atol=5 * spread)


@pytest.mark.parametrize("init", [GaussianInit, OrthogonalInit])
def test_scaled_starts_refuse(init):
    with pytest.raises(ValueError, match="needs at least two numbers"):
        init((), 1.0)
    with pytest.raises(ValueError, match="needs at least two numbers"):
        init((3,), 1.0)
    with pytest.raises(ValueError, match="must all be >= 1, got 0"):
        init((3, 0, 2), 1.0)
    for scale in (0.0, -1.0, math.nan, math.inf, jnp.array(-1.0)):
        with pytest.raises(ValueError, match="scale must be a finite number > 0"):
            init((3, 2), scale)


def test_starts_refuse_what_is_not_a_number():
    # The type checker of the tests refuses these before the starts themselves do.
    from gradflow.initial import _check_scale, _check_widths

    for widths in ((3, 2.0), (3, True), (3, "2")):
        with pytest.raises(ValueError, match="must be whole numbers"):
            _check_widths(widths)
    for scale in ("1", True, None):
        with pytest.raises(ValueError, match="scale must be a number > 0"):
            _check_scale(scale)


def test_balanced_starts_refuse(getkey):
    product = jr.normal(getkey(), (4, 4))
    with pytest.raises(ValueError, match="rank=4, which is larger than min.widths.=3"):
        BalancedInit((4, 3, 4), product)
    with pytest.raises(ValueError, match=r"product has shape \(4, 4\) but widths="):
        BalancedInit((4, 3, 5), product)
    with pytest.raises(ValueError, match="needs at least two numbers"):
        BalancedInit((4,), product)
    with pytest.raises(ValueError, match="needs widths.1. to be the smallest"):
        OrthonormalBalancedInit((4, 3, 2, 4))
    with pytest.raises(ValueError, match="needs at least two numbers"):
        OrthonormalBalancedInit((4,))
    # Under jit the rank is not known.
    build = lambda product: BalancedInit((4, 3, 4), product)(jr.key(0))
    assert eqx.filter_jit(build)(product).widths == (4, 3, 4)


def test_near_point_refuses():
    point = {"a": jnp.zeros(3)}
    for distance in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="distance must be a finite number >= 0"):
            NearPoint(point, distance)
    with pytest.raises(ValueError, match="direction is 0"):
        NearPoint(point, 1.0, {"a": jnp.zeros(3)})


def test_section_7_widths_refuse():
    for depth in (0, -1):
        with pytest.raises(ValueError, match=f"depth must be >= 1, got {depth}"):
            section7_widths(5, depth)
    with pytest.raises(ValueError, match="dimension must be >= 1, got 0"):
        section7_widths(0, 3)
    for rank in (0, 6):
        with pytest.raises(
            ValueError, match=f"rank={rank} must be from 1 to dimension"
        ):
            section7_widths(5, 3, rank)
