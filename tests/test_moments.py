import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import ml_dtypes
import numpy as np
import pytest

import gradflow.moments
from gradflow.moments import Moments


def _data(getkey, samples=30, x=5, y=3):
    return (
        np.array(jr.normal(getkey(), (samples, x))),
        np.array(jr.normal(getkey(), (samples, y))),
    )


def _expected(x, y, center=False):
    if center:
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return x.T @ x / len(x), x.T @ y / len(x), y.T @ y / len(x)


def _check(moments, expected, rtol=1e-12, atol=1e-13):
    for name, value in zip(("xx", "xy", "yy"), expected, strict=True):
        np.testing.assert_allclose(getattr(moments, name), value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("block", [1, 8, 56, 10_000])
def test_from_data(getkey, monkeypatch, center, block):
    monkeypatch.setattr(gradflow.moments, "_BLOCK", block)
    x, y = _data(getkey)
    before = x.copy()
    moments = Moments.from_data(x, y, center=center)
    _check(moments, _expected(x, y, center))
    assert moments.count == 30 and not moments.autoencoding
    assert (x == before).all()
    moments = Moments.from_data(x, center=center)
    _check(moments, _expected(x, x, center))
    assert moments.autoencoding
    assert moments.xx is moments.xy and moments.xx is moments.yy


@pytest.mark.parametrize("center", [False, True])
def test_from_batches(getkey, center):
    x, y = _data(getkey)
    cuts = [0, 1, 4, 20, 30]
    pieces = [slice(*cut) for cut in zip(cuts[:-1], cuts[1:], strict=True)]
    moments = Moments.from_batches(
        ((x[piece], y[piece]) for piece in pieces), center=center
    )
    _check(moments, _expected(x, y, center))
    assert moments.count == 30 and not moments.autoencoding
    moments = Moments.from_batches([x[piece] for piece in pieces], center=center)
    _check(moments, _expected(x, x, center))
    assert moments.autoencoding


def test_integers_are_exact(getkey):
    x = np.asarray(jr.randint(getkey(), (100, 6), 0, 256)).astype(np.uint8)
    wide = x.astype(np.int64)
    moments = Moments.from_data(x)
    assert (np.asarray(moments.xx) == wide.T @ wide / 100).all()


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, ml_dtypes.bfloat16, np.int8, np.uint64]
)
def test_real_types_are_cast(dtype):
    x = np.array([[1, 2], [3, 4]], dtype)
    _check(Moments.from_data(x), (np.array([[5.0, 7.0], [7.0, 10.0]]),) * 3)


def test_kinds_of_arrays(getkey, tmp_path):
    x, y = _data(getkey)
    mapped = np.memmap(tmp_path / "x", dtype=np.float64, mode="w+", shape=x.shape)
    mapped[:] = x
    for array in (mapped, jnp.asarray(x), x.tolist(), np.asfortranarray(x)):
        _check(Moments.from_data(array, y), _expected(x, y))


def test_centering_does_not_cancel(getkey):
    # Mean 1e8 and standard deviation 1: the plain formula keeps no digit.
    x, y = _data(getkey, samples=200)
    drift = np.linspace(0, 10, 200)[:, None]
    expected = _expected(x + drift, y, center=True)
    pairs = [(x[i : i + 9] + drift[i : i + 9] + 1e8, y[i : i + 9]) for i in range(200)]
    moments = Moments.from_batches(pairs[::9], center=True)
    _check(moments, expected, rtol=1e-6, atol=1e-6)


def test_centering_makes_a_constant_column_exactly_zero(getkey):
    x, _ = _data(getkey)
    x[:, 2] = 0.1
    moments = Moments.from_batches([x[:7], x[7:]], center=True)
    assert not moments.xx[2].any() and moments.rank() == 4


def test_float32_is_taken_without_a_warning(getkey):
    x, y = _data(getkey)
    with jax.enable_x64(False):
        moments = Moments.from_data(x, y, center=True)
        assert moments.xx.dtype == moments.xy.dtype == moments.yy.dtype == jnp.float32
        _check(moments, _expected(x, y, True), rtol=1e-6, atol=1e-6)
        assert moments.conditional().dtype == jnp.float32
        assert moments.rank() == 5


def test_linear_regression(getkey):
    x, y = _data(getkey)
    moments = Moments.from_data(x, y)
    fit, *_ = np.linalg.lstsq(x, y)
    np.testing.assert_allclose(moments.regression(), fit.T, rtol=1e-9, atol=1e-11)
    residual = y - x @ fit
    np.testing.assert_allclose(
        moments.conditional(), residual.T @ residual / 30, rtol=1e-9, atol=1e-11
    )
    whitening = moments.whitening()
    np.testing.assert_allclose(
        whitening @ moments.xx @ whitening, np.eye(5), atol=1e-11
    )


def test_singular_inputs_have_the_least_norm_regression(getkey):
    x, y = _data(getkey)
    x = np.concatenate([x, x[:, :2], np.zeros((30, 1))], axis=1)
    moments = Moments.from_data(x, y)
    assert moments.rank() == 5 and moments.condition_number() == float("inf")
    fit, *_ = np.linalg.lstsq(x, y)
    np.testing.assert_allclose(moments.regression(), fit.T, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(
        moments.conditional(),
        Moments.from_data(x[:, :5], y).conditional(),
        rtol=1e-8,
        atol=1e-10,
    )


def test_rank_and_condition_number():
    moments = Moments.from_data(np.diag([1.0, 2.0, 1e-3]))
    assert moments.rank() == 3 and moments.rank(rtol=1e-5) == 2
    np.testing.assert_allclose(moments.condition_number(), 4e6, rtol=1e-9)
    assert Moments.from_data(np.ones((2, 3))).rank() == 1


def test_principal_directions(getkey):
    x, _ = _data(getkey)
    values, vectors = Moments.from_data(x).principal()
    _, singular, directions = np.linalg.svd(x)
    np.testing.assert_allclose(values, singular**2 / 30, rtol=1e-12)
    np.testing.assert_allclose(np.abs(directions @ vectors), np.eye(5), atol=1e-12)


def test_restrict(getkey):
    x, y = _data(getkey)
    x = np.concatenate([x, x[:, :2]], axis=1)
    moments = Moments.from_data(x, y)
    directions = np.asarray(moments.principal()[1])
    for dimension in (1, 3, 5):
        restricted = moments.restrict(dimension)
        assert restricted.count == 30 and not restricted.autoencoding
        _check(restricted, _expected(x @ directions[:, :dimension], y))
    # On the whole support nothing is lost.
    np.testing.assert_allclose(
        restricted.conditional(), moments.conditional(), atol=1e-12
    )
    assert restricted.condition_number() < float("inf")


def test_restrict_keeps_autoencoding(getkey):
    x, _ = _data(getkey)
    moments = Moments.from_data(x)
    restricted = moments.restrict(3)
    coordinates = x @ np.asarray(moments.principal()[1])[:, :3]
    assert restricted.autoencoding and restricted.xx is restricted.yy
    _check(restricted, _expected(coordinates, coordinates))


def test_restrict_refuses(getkey):
    x, y = _data(getkey)
    moments = Moments.from_data(np.concatenate([x, x], axis=1), y)
    with pytest.raises(ValueError, match="dimension=0 must be at least 1"):
        moments.restrict(0)
    with pytest.raises(ValueError, match="dimension=6 is larger than the rank 5 of xx"):
        moments.restrict(6)
    with pytest.raises(
        ValueError, match="dimension=11 is larger than the 10 columns of x"
    ):
        moments.restrict(11)


def test_transformations(getkey):
    x, y = _data(getkey)
    moments = Moments.from_data(x, y)

    @eqx.filter_jit
    def scaled(moments, scale):
        whole = Moments(
            scale * moments.xx, scale * moments.xy, scale * moments.yy, moments.count
        )
        return whole.restrict(2), whole.conditional()

    together, conditional = eqx.filter_vmap(scaled, in_axes=(None, 0))(
        moments, jnp.array([1.0, 2.0])
    )
    assert together.xx.shape == (2, 2, 2) and together.count == 30
    np.testing.assert_allclose(conditional[1], 2 * moments.conditional(), atol=1e-12)
    np.testing.assert_allclose(
        together.xy[0], moments.restrict(2).xy, rtol=1e-9, atol=1e-12
    )
    one = jax.tree.map(lambda leaf: leaf[1], together)
    np.testing.assert_allclose(one.xx, 2 * moments.restrict(2).xx, atol=1e-12)
    assert jax.tree.map(lambda leaf: None, moments).xx is None
    shapes = eqx.filter_eval_shape(scaled, moments, jnp.array(1.0))
    assert shapes[0].xx.shape == (2, 2)
    gradient = eqx.filter_grad(lambda moments: jnp.trace(moments.conditional()))(
        moments
    )
    np.testing.assert_allclose(gradient.yy, np.eye(3), atol=1e-12)
    jax.vmap(lambda x: Moments(x.T @ x, x.T @ x, x.T @ x, 3))(jnp.ones((2, 3, 4)))


BAD = [
    (np.ones(4), None, r"x is 1-dimensional, of shape \(4,\): .* x.reshape\(-1, 1\)"),
    (np.ones((4, 2)), np.ones(4), r"y is 1-dim.*, for example y.reshape\(-1, 1\)"),
    (np.ones((4, 2, 2)), None, r"x is 3-dim.*, for example x.reshape\(len\(x\), -1\)"),
    (3.0, None, "x is 0-dimensional"),
    (
        np.ones((100, 8)),
        np.ones((90, 3)),
        r"x is \(100, 8\) and y is \(90, 3\): both need the same number of rows \(sa",
    ),
    (np.ones((0, 3)), None, r"x has shape \(0, 3\): it needs at least one row"),
    (np.ones((3, 2)), np.ones((3, 0)), r"y has shape \(3, 0\): it needs at least"),
    (np.ones((2, 2), complex), None, "x has dtype complex128: give real numbers"),
    (np.ones((2, 2), object), None, "x has dtype object"),
    (np.full((2, 2), "a"), None, "x has dtype <U1"),
    (np.ones((2, 2), bool), None, "x has dtype bool"),
    (np.ones((2, 2)), np.ones((2, 2), "M8[s]"), "y has dtype datetime64"),
    ([[1.0], [1.0, 2.0]], None, "x is a list that isn't an array of numbers"),
    (np.ma.masked_less(np.eye(2), 1), None, "x is a masked array"),
    (np.zeros((3, 2)), None, "^x is all zero: every point is critical$"),
    (np.ones((3, 2)), np.zeros((3, 2)), "y is all zero: the zero map is optimal"),
    (np.full((3, 2), 1e200), None, r"x is as large as 1e\+200: its squares overflow"),
    (np.ones((2, 2)), np.full((2, 2), 1e160), r"y is as large as 1e\+160"),
    (np.full((3, 2), 1e-200), None, "x is at most 1e-200: its squares vanish in float"),
]


@pytest.mark.parametrize("x, y, match", BAD)
def test_bad_data(x, y, match):
    with pytest.raises(ValueError, match=match) as error:
        Moments.from_data(x, y)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("center", [False, True])
def test_non_finite_values(getkey, monkeypatch, value, center):
    monkeypatch.setattr(gradflow.moments, "_BLOCK", 32)
    x, y = _data(getkey, x=20)
    x[2, 17] = x[2, 18] = x[25, 0] = value
    match = r"x has 3 non-finite values, first at \[2, 17\]: drop those rows"
    with pytest.raises(ValueError, match=match):
        Moments.from_data(x, y, center=center)
    match = r"y has 3 non-finite values, first at \[2, 17\]"
    with pytest.raises(ValueError, match=match):
        Moments.from_data(y, x, center=center)
    x[2, 17] = x[2, 18] = 0.0
    match = r"x in batch 1 has 1 non-finite value, first at \[25, 0\]"
    with pytest.raises(ValueError, match=match):
        Moments.from_batches([x[:20], x[20:]], center=center)


def test_constant_data_centered(getkey):
    x, _ = _data(getkey)
    constant = np.full((30, 2), 0.1)
    with pytest.raises(ValueError, match="x is constant and center=True leaves"):
        Moments.from_data(constant, center=True)
    with pytest.raises(ValueError, match="y is constant and center=True leaves"):
        Moments.from_data(x, constant, center=True)
    with pytest.raises(ValueError, match="x is constant and center=True leaves"):
        Moments.from_batches([constant[:7], constant[7:]], center=True)
    with pytest.raises(ValueError, match=r"x is as large as 1e\+308: its squares over"):
        Moments.from_data(1e308 * np.array([[1.0], [-1.0]]), center=True)


def test_too_large_or_small_for_float32():
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match=r"1e\+25: its squares overflow float32"):
            Moments.from_data(np.full((3, 2), 1e25))
        with pytest.raises(ValueError, match="1e-25: its squares vanish in float32"):
            Moments.from_data(np.full((3, 2), 1e-25))


def test_traced_data():
    with pytest.raises(ValueError, match="x is traced by a jax transformation"):
        jax.jit(Moments.from_data)(jnp.ones((3, 2)))


X = np.ones((4, 2))


@pytest.mark.parametrize(
    "batches, match",
    [
        ([], "batches is empty"),
        (iter(()), "batches is empty"),
        ([X, X[:, :1]], "of columns of x in batch 1 is 1 and was 2 before"),
        ([(X, X), (X, X[:, :1])], "of columns of y in batch 1 is 1 and was 2"),
        ([X, (X, X)], "batch 1 has a y and the batches before it have none"),
        ([(X, X), X], "batch 1 has no y and the batches before it have one"),
        ([(X, X), (X, X, X)], "batch 1 is a tuple of length 3"),
        ([(X, X), (X, X[:3])], r"x in batch 1 is \(4, 2\) and y is \(3, 2\)"),
        ([X, X[0]], "x in batch 1 is 1-dimensional"),
        ([(X, X), (X, X.astype(complex))], "y in batch 1 has dtype complex128"),
        ([0 * X, 0 * X], "x is all zero"),
    ],
)
def test_bad_batches(batches, match):
    with pytest.raises(ValueError, match=match):
        Moments.from_batches(batches)


def _broken(**leaves):
    # Past the checks of the constructor (and past those of the types).
    eye = jnp.eye(2)
    moments = Moments(eye, eye, eye, 3, autoencoding="autoencoding" in leaves)
    leaves.pop("autoencoding", None)
    for name, leaf in leaves.items():
        object.__setattr__(moments, name, leaf)
    return moments


@pytest.mark.parametrize(
    "leaves, match",
    [
        (dict(count=0), "count must be >= 1, got 0"),
        (dict(count=1.5), "count must be a whole number, got 1.5"),
        (dict(xx=jnp.ones(2)), r"xx has shape \(2,\): give a matrix"),
        (dict(xx=jnp.ones((2, 3))), r"xx has shape \(2, 3\): it must be square"),
        (dict(yy=jnp.ones((2, 3))), r"yy has shape \(2, 3\): it must be square"),
        (dict(xy=jnp.ones((2, 3))), r"xy has shape .* must have shape \(2, 2\)"),
        (dict(yy=jnp.ones((2, 2), int)), "yy has dtype int64: give real numbers"),
        (
            dict(xy=jnp.array([[1.0, jnp.nan], [0.0, 0.0]])),
            r"xy has 1 non-finite .*1\]",
        ),
        (
            dict(xx=jnp.array([[1.0, 2.0], [3.0, 1.0]])),
            r"xx isn't symmetric: \[0, 1\] is 2.0 and \[1, 0\] is 3.0",
        ),
        (
            dict(autoencoding=True, yy=jnp.eye(3), xy=jnp.ones((2, 3))),
            r"autoencoding=True with xx \(2, 2\) and yy \(3, 3\)",
        ),
        (dict(autoencoding=True, yy=2 * jnp.eye(2)), "but xx, xy and yy differ"),
    ],
)
def test_bad_moments(leaves, match):
    with pytest.raises(ValueError, match=match):
        _broken(**leaves).__check_init__()


def test_moments_of_numpy_matrices():
    moments = Moments(np.eye(2), np.ones((2, 1)), np.eye(1), 7)
    assert isinstance(moments.xy, jax.Array)
    # Equal but separate arrays may autoencode too.
    Moments(np.eye(2), np.eye(2), np.eye(2), 7, autoencoding=True)
