import gzip
import hashlib
import inspect
import os
import sys
from importlib import resources

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from gradflow import datasets
from gradflow.data.build_mnist import build, main
from gradflow.datasets import gaussian, mnist, mnist_images, prescribed, teacher


PLACES = np.array([1, 2, 4, 8, 16, 32, 64]) - 1
# Images of each digit among the 60 000, published with the data.
COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def _descending(matrix):
    return np.linalg.eigvalsh(np.asarray(matrix))[::-1]


# ---- MNIST's moments


def test_mnist_sums_are_those_of_integers():
    total, count = np.zeros((784, 784), np.int64), 0
    for digit in range(10):
        moments = mnist(digit)
        assert moments.count == COUNTS[digit]
        assert moments.autoencoding and moments.xx is moments.yy
        sums = np.asarray(moments.xx) * (255.0**2 * moments.count)
        assert np.abs(sums - np.rint(sums)).max() < 1e-6
        sums = np.rint(sums).astype(np.int64)
        # Cauchy-Schwarz, and at most 255^2 an image.
        squares = np.diag(sums)
        assert (sums.astype(float) ** 2 <= np.outer(squares, 1.0 * squares)).all()
        assert sums.max() <= 255**2 * moments.count
        total, count = total + sums, count + moments.count
    moments = mnist()
    assert moments.count == count == 60_000
    np.testing.assert_allclose(moments.xx, total / (255.0**2 * count), rtol=1e-14)


def test_mnist_spectrum():
    # Recomputed from the images by `test_mnist_from_the_images` below.
    roots = [6.1718, 2.0953, 1.7960, 1.2394, 0.88623, 0.58468, 0.34181]
    moments = mnist()
    values = _descending(moments.xx)
    np.testing.assert_allclose(np.sqrt(values[PLACES]), roots, rtol=2e-5)
    # The rank is the same for every cutoff in a gap of six decades.
    assert [moments.rank(rtol=rtol) for rtol in (2e-13, 1e-12, 1e-11)] == [712] * 3
    assert moments.condition_number() == float("inf")


def test_mnist_quadrant():
    moments = mnist(task="quadrant")
    # Recomputed from the images by `test_mnist_from_the_images` below.
    expected = [3.3311, 2.0862, 1.5860, 0.84417, 0.43507, 0.19450, 0.061919]
    values = _descending(moments.conditional())
    np.testing.assert_allclose(values[PLACES], expected, rtol=2e-5)
    assert [moments.rank(rtol=rtol) for rtol in (1e-13, 1e-12, 1e-9)] == [179] * 3
    assert not moments.autoencoding and moments.count == 60_000
    # The blocks, cut from the whole by where the pixels are.
    whole = np.asarray(mnist().xx).reshape(28, 28, 28, 28)
    inside = whole[14:, :14, 14:, :14].reshape(196, 196)
    np.testing.assert_array_equal(moments.xx, inside)
    top = whole[14:, :14, :14, :].reshape(196, 392)
    np.testing.assert_array_equal(moments.xy[:, :392], top)
    np.testing.assert_array_equal(
        moments.yy[392:, 392:], whole[14:, 14:, 14:, 14:].reshape(196, 196)
    )


@pytest.mark.parametrize(
    "digit, expected", [(1, 6.413), (9, 13.425), (6, 14.159), (7, 18.644)]
)
def test_mnist_quadrant_of_one_digit(digit, expected):
    # Recomputed from the images by `test_mnist_from_the_images` below.
    values = _descending(mnist(digit, task="quadrant").conditional())
    np.testing.assert_allclose(values[:16].sum(), expected, atol=6e-4)


def test_mnist_in_float32():
    with jax.enable_x64(False):
        assert mnist(3).xx.dtype == jnp.float32


@pytest.mark.parametrize("digit", [-1, 10, True])
def test_mnist_refuses_digits(digit):
    with pytest.raises(ValueError, match="digit must be 0, 1, ..., 9 or None, got"):
        mnist(digit)


def test_damaged_installation(monkeypatch):
    monkeypatch.setattr(datasets, "MNIST_SHA256", "0")
    with pytest.raises(ValueError, match="mnist_moments.npz is damaged .* again"):
        mnist(0)


# ---- MNIST's files


def _write(folder, monkeypatch, images, labels, *, packed, split="train"):
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        name = f"{split}-{name}-ubyte"
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        data = header + array.tobytes()
        monkeypatch.setitem(datasets.CHECKSUMS, name, hashlib.sha256(data).hexdigest())
        file = folder / (f"{name}.gz" if packed else name)
        file.write_bytes(gzip.compress(data) if packed else data)


def _images(getkey, samples=30):
    images = np.array(jr.randint(getkey(), (samples, 28, 28), 0, 256), np.uint8)
    images[:, :5] = 0
    return images, np.arange(samples).astype(np.uint8) % 10


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("split, prefix", [("train", "train"), ("test", "t10k")])
def test_mnist_images(getkey, tmp_path, monkeypatch, packed, split, prefix):
    images, labels = _images(getkey)
    _write(tmp_path, monkeypatch, images, labels, packed=packed, split=prefix)
    for folder in (tmp_path, str(tmp_path)):
        read, classes = mnist_images(folder, split=split)
        assert read.dtype == classes.dtype == np.uint8
        np.testing.assert_array_equal(read, images.reshape(30, 784))
        np.testing.assert_array_equal(classes, labels)


def test_mnist_images_refuses(getkey, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has no file train-images-idx3-ubyte or"):
        mnist_images(tmp_path)
    _write(tmp_path, monkeypatch, *_images(getkey), packed=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for damaged in (whole[:100], b"", b"not gzip", whole[:50] + b"?" * 20 + whole[70:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="can't be read|isn't the published"):
            mnist_images(tmp_path)
    file.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match="isn't the published file .*: fetch it again"):
        mnist_images(tmp_path)


def test_bad_types_without_a_type_checker(getkey):
    # The tests run with the annotations checked; a user need not.
    with pytest.raises(ValueError, match="task must be 'autoencode' or 'quadrant'"):
        inspect.unwrap(mnist)(task="half")
    with pytest.raises(ValueError, match="digit must be 0, 1, ..., 9 or None, got '3'"):
        inspect.unwrap(mnist)("3")
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'all'"):
        inspect.unwrap(mnist_images)("folder", split="all")
    with pytest.raises(ValueError, match="dimension must be a positive integer, got 2"):
        inspect.unwrap(gaussian)(getkey(), 2.0, 3)
    with pytest.raises(ValueError, match="noise must be a number, got 'x'"):
        inspect.unwrap(teacher)(getkey(), 3, 3, 2, 10, noise="x")
    with pytest.raises(ValueError, match="condition_number must be a number, got None"):
        inspect.unwrap(prescribed)(
            [1.0], x_dim=3, y_dim=3, condition_number=None, key=getkey()
        )
    with pytest.raises(ValueError, match="singular_values must be a sequence of fin"):
        inspect.unwrap(prescribed)(["x"], x_dim=3, y_dim=3, key=getkey())


@pytest.mark.slow
def test_build_is_read_back(getkey, tmp_path, monkeypatch, capsys):
    images, labels = _images(getkey)
    _write(tmp_path, monkeypatch, images, labels, packed=True)
    out = tmp_path / "mnist_moments.npz"
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "--out", str(out)])
    main()
    data = out.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert f"{len(data)} bytes, sha256 {digest}, not" in capsys.readouterr().out
    assert data == build(images.reshape(30, 784), labels)

    monkeypatch.setattr(datasets, "MNIST_SHA256", digest)
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    pixels = images.reshape(30, 784).astype(np.int64)
    moments = mnist()
    assert moments.count == 30
    expected = pixels.T @ pixels / (255.0**2 * 30)
    np.testing.assert_array_equal(moments.xx, expected)
    pixels = pixels[labels == 4]
    expected = pixels.T @ pixels / (255.0**2 * 3)
    np.testing.assert_array_equal(mnist(4).xx, expected)


needs_images = pytest.mark.skipif(
    "GRADFLOW_MNIST" not in os.environ,
    reason="set GRADFLOW_MNIST to a folder with the MNIST files",
)


@needs_images
def test_build_equals_what_is_shipped():
    data = build(*mnist_images(os.environ["GRADFLOW_MNIST"]))
    shipped = resources.files("gradflow.data").joinpath("mnist_moments.npz")
    assert data == shipped.read_bytes()


@needs_images
def test_mnist_from_the_images():
    images, labels = mnist_images(os.environ["GRADFLOW_MNIST"])
    images = images.reshape(-1, 28, 28) / 255.0
    singular = np.linalg.svd(images.reshape(-1, 784), compute_uv=False)
    np.testing.assert_allclose(
        singular[PLACES] / 60_000**0.5, np.sqrt(_descending(mnist().xx)[PLACES])
    )
    for digit in (None, 1):
        part = images if digit is None else images[labels == digit]
        x = part[:, 14:, :14].reshape(-1, 196)
        top, right = part[:, :14].reshape(-1, 392), part[:, 14:, 14:].reshape(-1, 196)
        y = np.concatenate([top, right], axis=1)
        residual = y - x @ np.linalg.lstsq(x, y)[0]
        conditional = mnist(digit, task="quadrant").conditional()
        np.testing.assert_allclose(
            residual.T @ residual / len(x), conditional, atol=1e-11
        )


# ---- generators


def test_gaussian(getkey):
    dimension, samples = 4, 20_000
    key = getkey()
    moments = gaussian(key, dimension, samples)
    assert moments.count == samples and moments.autoencoding
    # Entries have standard deviation at most sqrt(2 / samples) / dimension.
    error = np.abs(np.asarray(moments.xx) - np.eye(4) / 4).max()
    assert error < 5 * np.sqrt(2 / samples) / 4
    assert (moments.xx == gaussian(key, dimension, samples).xx).all()
    keys = jr.split(key, 3)
    together = jax.jit(jax.vmap(lambda key: gaussian(key, 4, 10)))(keys)
    np.testing.assert_allclose(
        together.xx[1], gaussian(keys[1], 4, 10).xx, rtol=1e-12, atol=1e-14
    )


def test_teacher(getkey):
    moments = teacher(getkey(), 6, 5, 2, 50)
    singular = np.linalg.svd(np.asarray(moments.regression()))[1]
    assert singular[1] > 1e-3 and singular[2] < 1e-12
    np.testing.assert_allclose(moments.conditional(), np.zeros((5, 5)), atol=1e-12)
    assert moments.xx.shape == (6, 6) and moments.count == 50


def test_teacher_noise(getkey):
    samples, noise = 20_000, 0.3
    moments = teacher(getkey(), 6, 5, 2, samples, noise=noise)
    # The standard deviation of an entry is at most noise^2 sqrt(2 / samples); the six
    # fitted directions take 6 / samples of it.
    error = np.abs(np.asarray(moments.conditional()) - noise**2 * np.eye(5)).max()
    assert error < noise**2 * (5 * np.sqrt(2 / samples) + 6 / samples)


def test_teacher_targets_have_variance_one(getkey):
    keys = jr.split(getkey(), 2000)
    together = jax.vmap(lambda key: teacher(key, 3, 4, 2, 5))(keys)
    power = np.trace(np.asarray(together.yy), axis1=1, axis2=2) / 4
    assert abs(power.mean() - 1) < 5 * power.std() / 2000**0.5


@pytest.mark.parametrize("x_dim, y_dim", [(5, 6), (6, 5), (4, 4), (4, 1)])
@pytest.mark.parametrize("condition_number", [1.0, 100.0])
@pytest.mark.parametrize("values", [[3.0, 1.0, 1.0, 0.0], [0.2], [], [0.0], (2, 5)])
def test_prescribed(getkey, x_dim, y_dim, condition_number, values):
    values = values[: min(x_dim, y_dim)]
    moments = prescribed(
        values,
        x_dim=x_dim,
        y_dim=y_dim,
        condition_number=condition_number,
        key=getkey(),
    )
    eigenvalues, vectors = np.linalg.eigh(np.asarray(moments.xx))
    np.testing.assert_allclose(eigenvalues[-1], 1.0, rtol=1e-12)
    np.testing.assert_allclose(moments.condition_number(), condition_number)
    steps = np.diff(np.log(eigenvalues))
    np.testing.assert_allclose(steps, steps[0], atol=1e-11)
    q = np.asarray(moments.xy).T @ vectors / np.sqrt(eigenvalues)
    expected = np.zeros(min(x_dim, y_dim))
    expected[: len(values)] = sorted(values, reverse=True)
    np.testing.assert_allclose(np.linalg.svd(q)[1], expected, atol=1e-12)
    np.testing.assert_allclose(moments.conditional(), 0 * moments.yy, atol=1e-11)
    assert moments.count == 1


@pytest.mark.slow
def test_prescribed_takes_arrays(getkey):
    key = getkey()
    one = prescribed(np.array([1.0, 2.0]), x_dim=3, y_dim=2, key=key)
    other = prescribed(jnp.array([1.0, 2.0]), x_dim=3, y_dim=2, key=key)
    assert (one.xy == other.xy).all()
    with jax.enable_x64(False):
        small = prescribed([1.0], x_dim=3, y_dim=2, key=jr.key(0))
        assert small.xy.dtype == jnp.float32


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("bad", [0, -1, True])
@pytest.mark.parametrize("name", ["x_dim", "y_dim", "rank", "samples", "dimension"])
def test_sizes_are_positive(getkey, name, bad):
    match = f"{name} must be a (positive integer|whole number), got {bad}"
    sizes = dict(x_dim=3, y_dim=3, rank=2, samples=4)
    with pytest.raises(ValueError, match=match):
        if name in sizes:
            teacher(getkey(), **(sizes | {name: bad}))
        else:
            gaussian(getkey(), bad, 3)
    if name in ("x_dim", "y_dim"):
        with pytest.raises(ValueError, match=match):
            prescribed([], **(dict(x_dim=3, y_dim=3) | {name: bad}), key=getkey())
    if name == "samples":
        with pytest.raises(ValueError, match=match):
            gaussian(getkey(), 3, bad)


def test_teacher_refuses(getkey):
    with pytest.raises(
        ValueError, match=r"rank=4 is larger than min\(x_dim, y_dim\)=3"
    ):
        teacher(getkey(), 3, 5, 4, 10)
    for noise in (-1.0, NAN, INF):
        with pytest.raises(ValueError, match="noise must be a standard deviation >= 0"):
            teacher(getkey(), 3, 5, 2, 10, noise=noise)


@pytest.mark.parametrize(
    "values", [[-1.0], [1.0, NAN], [INF], np.ones((2, 2)), np.array(["x"])]
)
def test_prescribed_refuses_values(getkey, values):
    with pytest.raises(ValueError, match="singular_values must be a sequence of finit"):
        prescribed(values, x_dim=3, y_dim=3, key=getkey())


def test_prescribed_refuses(getkey):
    with pytest.raises(ValueError, match="has 3 entries, more than .*=2"):
        prescribed([1.0, 1.0, 1.0], x_dim=2, y_dim=4, key=getkey())
    for bad in (0.0, -1.0, 0.5, NAN, INF, 1e13):
        match = r"condition_number must be at least 1 and below 1e\+12, where xx"
        with pytest.raises(ValueError, match=match):
            prescribed([1.0], x_dim=2, y_dim=4, condition_number=bad, key=getkey())
    with pytest.raises(ValueError, match="condition_number must be 1 with x_dim=1"):
        prescribed([1.0], x_dim=1, y_dim=4, condition_number=2.0, key=getkey())
