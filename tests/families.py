"""Problems with a declared property, and critical points planted in them.

Data by property: singular values of Q = yx xx^{-1/2} are given, repeated, tiny or
zero; xx has a given condition number; bases are random.
"""

import jax.numpy as jnp
import numpy as np

from gradflow.models.linear import DeepLinear, SquaredLoss
from gradflow.moments import Moments
from gradflow.theory.linear import LinearTheory


def moments(rng, singular_values, x_dim, y_dim, *, condition=10.0, noise=0.0):
    """Moments with exactly these singular values of Q."""
    values = np.asarray(singular_values, dtype=float)
    eigenvalues = np.geomspace(1.0, 1.0 / condition, x_dim)
    basis = orthogonal(rng, x_dim)
    xx = (basis * eigenvalues) @ basis.T
    root = (basis * np.sqrt(eigenvalues)) @ basis.T
    left = orthogonal(rng, y_dim)[:, : len(values)]
    right = orthogonal(rng, x_dim)[:, : len(values)]
    yy = (left * values**2) @ left.T + noise * np.eye(y_dim)
    xy = root @ right @ (left * values).T
    half = lambda matrix: jnp.asarray((matrix + matrix.T) / 2)
    return Moments(half(xx), jnp.asarray(xy), half(yy), count=1)


def theory(rng, singular_values, widths, **data):
    problem = moments(rng, singular_values, widths[0], widths[-1], **data)
    return LinearTheory(SquaredLoss(problem), rank=min(widths))


def orthogonal(rng, size):
    q, r = np.linalg.qr(rng.normal(size=(size, size)))
    return q * np.sign(np.diagonal(r))


def network(weights):
    return DeepLinear(tuple(jnp.asarray(weight) for weight in weights))


def distort(rng, weights, spread):
    """The same product and another factorization: a random change of basis, not
    orthogonal, at each hidden layer. Critical points stay critical points."""
    hidden = [weight.shape[0] for weight in weights[:-1]]
    changes = [np.eye(weights[0].shape[1])]
    for size in hidden:
        stretch = np.exp(spread * rng.normal(size=size))
        changes.append(orthogonal(rng, size) * stretch @ orthogonal(rng, size))
    changes.append(np.eye(weights[-1].shape[0]))
    return [
        changes[j + 1] @ weight @ np.linalg.inv(changes[j])
        for j, weight in enumerate(weights)
    ]


def planted(rng, known: LinearTheory, modes, widths, pattern, spread=0.3):
    """A random critical point whose product is `known.critical_point(modes)`.

    It is the canonical lift with residual blocks added beside it, chosen so that all
    gradients vanish, and then a random change of basis:

    - `lift`: none;
    - `zeros`: random blocks except in two or more random layers;
    - `aligned`: the last block points along one unlearned mode of y, the first along
      another of x, and all between vanish (depth 3 or more).
    """
    modes = list(modes)
    size, depth = len(modes), len(widths) - 1
    left, right = np.asarray(known.left), np.asarray(known.right).T
    values = np.asarray(known.singular_values)
    x_rest = _complement(rng, right[:, modes])
    y_rest = _complement(rng, left[:, modes])
    dims = [widths[0] - size, *(w - size for w in widths[1:-1]), widths[-1] - size]
    blocks = [rng.normal(size=(dims[j + 1], dims[j])) for j in range(depth)]
    if pattern == "lift":
        blocks = [0 * block for block in blocks]
    elif pattern == "zeros":
        for layer in rng.permutation(depth)[: rng.integers(2, depth + 1)]:
            blocks[layer] *= 0
    elif pattern == "aligned":
        rest = y_rest.T @ np.asarray(known.q) @ x_rest
        u, _, vt = np.linalg.svd(rest)
        blocks = [
            np.outer(rng.normal(size=dims[1]), vt[1]),
            *(0 * block for block in blocks[1:-1]),
            np.outer(u[:, 0], rng.normal(size=dims[-2])),
        ]
    weights = []
    for j in range(depth):
        weight = np.zeros((widths[j + 1], widths[j]))
        if j == 0:
            weight[:size] = right[:, modes].T
            weight[size:] = blocks[j] @ x_rest.T
        elif j == depth - 1:
            weight[:, :size] = left[:, modes] * values[modes]
            weight[:, size:] = y_rest @ blocks[j]
        else:
            weight[:size, :size] = np.eye(size)
            weight[size:, size:] = blocks[j]
        weights.append(weight)
    weights[0] = weights[0] @ np.asarray(known.inverse_root)
    return network(distort(rng, weights, spread))


def _complement(rng, columns):
    """An orthonormal basis of what is orthogonal to the columns."""
    rows, size = columns.shape
    q, _ = np.linalg.qr(np.concatenate([columns, rng.normal(size=(rows, rows))], 1))
    return q[:, size:rows]
