"""Named data: MNIST, whose exact moments come with the package, and generators."""

import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from .arguments import checked_arguments
from .moments import Moments
from .spectrum import cutoff
from .types import Key


# Of the published files, unpacked.
CHECKSUMS = {
    "train-images-idx3-ubyte": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "train-labels-idx1-ubyte": (
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
    ),
    "t10k-images-idx3-ubyte": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
    ),
    "t10k-labels-idx1-ubyte": (
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
    ),
}
# Of gradflow/data/mnist_moments.npz; `gradflow.data.build_mnist` prints it.
MNIST_SHA256 = "025bdccc49b4773b2ce88cd373c557e29e7a69275ce844d14e1caf9a05d7a261"


def mnist(
    digit: int | None = None, *, task: Literal["autoencode", "quadrant"] = "autoencode"
) -> Moments:
    """The exact second moments of the 60 000 MNIST training images, uncentred, pixels
    from 0 to 1.

    Some pixels are zero in every image, so `xx` is singular: all digits together have
    rank 712 of 784, and 179 of 196 for the quadrant.

    **Arguments:**

    - `digit`: only the images of this digit; `None` for all.
    - `task`: `"autoencode"` has the whole image as input and target; `"quadrant"`
        predicts the other three quadrants (588 pixels) from the bottom left one (196).

    *Reference*: LeCun, Bottou, Bengio and Haffner 1998, Gradient-based learning applied
    to document recognition. The quadrant task: Sohn, Lee and Yan 2015, Learning
    structured output representation using deep conditional generative models.
    """
    digits = range(10)
    if digit is not None:
        integer = isinstance(digit, int | np.integer) and not isinstance(digit, bool)
        if not integer or digit not in digits:
            raise ValueError(f"digit must be 0, 1, ..., 9 or None, got {digit!r}")
        digits = [digit]
    if task not in ("autoencode", "quadrant"):
        raise ValueError(f"task must be 'autoencode' or 'quadrant', got {task!r}")
    sums, count = _mnist_sums(digits)
    moments = sums / (255.0**2 * count)
    if task == "autoencode":
        xx = jnp.asarray(moments)
        return Moments(xx, xx, xx, count, autoencoding=True)
    inside = np.zeros((28, 28), bool)
    inside[14:, :14] = True
    x, y = np.flatnonzero(inside), np.flatnonzero(~inside)
    return Moments(
        jnp.asarray(moments[np.ix_(x, x)]),
        jnp.asarray(moments[np.ix_(x, y)]),
        jnp.asarray(moments[np.ix_(y, y)]),
        count,
    )


def _mnist_sums(digits: Sequence[int]) -> tuple[np.ndarray, int]:
    file = resources.files("gradflow.data").joinpath("mnist_moments.npz").read_bytes()
    digest = hashlib.sha256(file).hexdigest()
    if digest != MNIST_SHA256:
        raise ValueError(
            "the installed gradflow/data/mnist_moments.npz is damaged (sha256 "
            f"{digest}, not {MNIST_SHA256}): install gradflow again"
        )
    sums = np.zeros((784, 784), np.int64)
    with np.load(io.BytesIO(file), allow_pickle=False) as members:
        count = int(members["count"][list(digits)].sum())
        for digit in digits:
            support = np.flatnonzero(np.unpackbits(members["support"][digit]))
            planes = lzma.decompress(members[f"sums{digit}"].tobytes())
            planes = np.frombuffer(planes, np.uint8).reshape(4, -1)
            triangle = np.ascontiguousarray(planes.T).view("<u4")[:, 0]
            rows, columns = np.tril_indices(len(support))
            sums[support[rows], support[columns]] += triangle
    return sums + np.tril(sums, -1).T, count


@checked_arguments
def mnist_images(
    path: str | Path, *, split: Literal["train", "test"] = "train"
) -> tuple[np.ndarray, np.ndarray]:
    """MNIST images, `uint8` of shape `(samples, 784)`, and their labels, `uint8`.

    Nothing is downloaded: the published IDX files, packed with gzip or not, are read
    from a folder and their contents checked.

    **Raises:** a `ValueError` if a file is missing or isn't the published one.
    """
    prefixes = {"train": "train", "test": "t10k"}
    if split not in prefixes:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    images = _idx(Path(path), f"{prefixes[split]}-images-idx3-ubyte")
    labels = _idx(Path(path), f"{prefixes[split]}-labels-idx1-ubyte")
    return images.reshape(len(images), -1), labels


def _idx(folder: Path, name: str) -> np.ndarray:
    packed = folder / f"{name}.gz"
    file = packed if packed.exists() else folder / name
    if not file.is_file():
        raise ValueError(
            f"{folder} has no file {name} or {name}.gz: put the published MNIST files "
            "there"
        )
    try:
        data = file.read_bytes()
        data = gzip.decompress(data) if file == packed else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} can't be read ({error}): fetch it again") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != CHECKSUMS[name]:
        raise ValueError(
            f"{file} isn't the published file (sha256 {digest}, not "
            f"{CHECKSUMS[name]}): fetch it again"
        )
    # Two zero bytes, the type, the number of axes, the length of each, the entries.
    axes = data[3]
    shape = np.frombuffer(data, ">u4", axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


@checked_arguments
def gaussian(key: Key, dimension: int, samples: int) -> Moments:
    r"""An autoencoding problem with inputs $x \sim N(0, I / d)$ in $d$ dimensions.

    Traceable: `vmap` over keys for many problems.

    *Reference*: Bah, Rauhut, Terstiege and Westdickenberg 2020, Section 7.
    """
    _check_positive(dimension=dimension, samples=samples)
    x = jr.normal(key, (samples, dimension)) / dimension**0.5
    xx = x.T @ x / samples
    return Moments(xx, xx, xx, int(samples), autoencoding=True)


@checked_arguments
def teacher(
    key: Key, x_dim: int, y_dim: int, rank: int, samples: int, *, noise: float = 0.0
) -> Moments:
    r"""Targets of a linear teacher: $y = T x + \sigma \epsilon$, with $x \sim N(0, I)$,
    $\epsilon \sim N(0, I)$ and $T$ a product of two Gaussian matrices of inner
    dimension `rank`, scaled so that the entries of $T x$ have variance 1 on average.

    Traceable: `vmap` over keys for many problems.

    **Arguments:**

    - `noise`: the standard deviation $\sigma$.
    """
    _check_positive(x_dim=x_dim, y_dim=y_dim, rank=rank, samples=samples)
    if rank > min(x_dim, y_dim):
        raise ValueError(
            f"rank={rank} is larger than min(x_dim, y_dim)={min(x_dim, y_dim)}"
        )
    if not 0 <= _number("noise", noise) < np.inf:
        raise ValueError(f"noise must be a standard deviation >= 0, got {noise}")
    left, right, inputs, errors = jr.split(key, 4)
    teacher = jr.normal(left, (y_dim, rank)) @ jr.normal(right, (rank, x_dim))
    teacher = teacher / (rank * x_dim) ** 0.5
    x = jr.normal(inputs, (samples, x_dim))
    y = x @ teacher.T + float(noise) * jr.normal(errors, (samples, y_dim))
    xx, xy, yy = x.T @ x / samples, x.T @ y / samples, y.T @ y / samples
    return Moments(xx, xy, yy, int(samples))


@checked_arguments
def prescribed(
    singular_values: Sequence[float | int] | np.ndarray | Float[Array, " modes"],
    *,
    x_dim: int,
    y_dim: int,
    condition_number: float = 1.0,
    key: Key,
) -> Moments:
    r"""Moments with given singular values of $Q = \Sigma_{yx} \Sigma_{xx}^{-1/2}$, the
    numbers that decide the critical points of a linear network.

    The bases are random; $\Sigma_{yy} = Q Q^\top$, so the best linear map leaves
    nothing of the targets.

    **Arguments:**

    - `singular_values`: any order, repeated and zero ones allowed; those missing to
        `min(x_dim, y_dim)` are zero.
    - `condition_number`: of `xx`, whose eigenvalues are spaced evenly in logarithm, the
        largest being 1.
    """
    _check_positive(x_dim=x_dim, y_dim=y_dim)
    modes = min(x_dim, y_dim)
    values = _singular_values(singular_values)
    if len(values) > modes:
        raise ValueError(
            f"singular_values has {len(values)} entries, more than min(x_dim, y_dim)="
            f"{modes}"
        )
    left, right, inputs = jr.split(key, 3)
    vectors = jr.orthogonal(inputs, x_dim)
    limit = 1 / cutoff(x_dim, np.dtype(vectors.dtype))
    if not 1 <= _number("condition_number", condition_number) < limit:
        raise ValueError(
            f"condition_number must be at least 1 and below {limit:.3g}, where xx is "
            f"singular in {vectors.dtype}, got {condition_number}"
        )
    if x_dim == 1 and condition_number != 1:
        raise ValueError(
            f"condition_number must be 1 with x_dim=1, got {condition_number}"
        )
    scales = jnp.asarray(
        np.geomspace(1.0, 1 / condition_number, x_dim), dtype=vectors.dtype
    )
    singular = jnp.asarray(values, dtype=vectors.dtype)
    u = jr.orthogonal(left, y_dim)[:, : len(values)]
    v = jr.orthogonal(right, x_dim)[:, : len(values)]
    root = (vectors * jnp.sqrt(scales)[None, :]) @ vectors.T
    xx = (vectors * scales[None, :]) @ vectors.T
    yy = (u * (singular**2)[None, :]) @ u.T
    xy = root @ (v * singular[None, :]) @ u.T
    return Moments(xx, xy, yy, 1)


def _singular_values(given: Any) -> np.ndarray:
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.asarray(np.nan)
    if values.ndim != 1 or not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(
            f"singular_values must be a sequence of finite numbers >= 0, got {given!r}"
        )
    return values


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None


def _check_positive(**sizes: Any) -> None:
    for name, size in sizes.items():
        integer = isinstance(size, int | np.integer) and not isinstance(size, bool)
        if not integer or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
