"""Training against the exact flow: orders in the step size, and stability."""

import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import plot
from gradflow.experiments.flow_versus_training import (
    Config,
    largest_curvature,
    METHODS,
    run,
)
from gradflow.models import LinearMap, SquaredLoss
from gradflow.moments import Moments


def found(report):
    """The rows of the methods, and those of the factors."""
    return (
        {row["what"]: row for row in report.rows if row["what"] in METHODS},
        [row for row in report.rows if row["what"] not in METHODS],
    )


@pytest.mark.slow
def test_orders_and_stability_in_short(tmp_path):
    report = run(
        Config(
            draws=3,
            horizon=1.0,
            halvings=2,
            factors=(0.9, 1.1),
            updates=200,
            tolerance=1e-5,
        ),
        progress=False,
    )
    methods, (inside, outside) = found(report)
    descent = methods["gradient descent"]
    assert 0.95 < descent["least order"] <= descent["largest order"] < 1.15
    assert descent["its median gap"] < methods["SGD"]["its median gap"]
    assert methods["SGD"]["its median gap"] < methods["Adam"]["its median gap"]
    assert inside["stays"] == 3 and outside["stays"] == 0
    assert all(path.stat().st_size > 10_000 for path in plot.save(report, tmp_path))


@pytest.mark.slow
def test_orders_and_stability():
    report = run(Config(), progress=False)
    print(report.table(), report.notes)
    methods, factors = found(report)
    descent, sgd, adam = (methods[name] for name in METHODS)
    # Towards finer steps, where terms of higher order have gone.
    assert abs(descent["last order"] - 1) < 0.01
    assert 0.9 < descent["least order"] <= descent["largest order"] < 1.1
    # Of a random quantity's median, in which Euler's error is still seen at first.
    assert 0.35 < sgd["last order"] < 0.65
    assert adam["its median gap"] > 0.5 * adam["median gap"]
    assert [row["stays"] for row in factors] == [32, 32, 0, 0]


def test_curvature_where_it_is_known():
    """Of a squared loss in one matrix: the largest eigenvalue of xx."""
    xx = np.diag([3.0, 1.0])
    energy = SquaredLoss(Moments(xx, xx, xx, 1, autoencoding=True))
    seen = largest_curvature(energy, LinearMap(jnp.zeros((2, 2))))
    # 1/2 E|Wx - y|^2 has the Hessian xx in each row of W.
    np.testing.assert_allclose(seen, 3.0, rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coarsest": 1.0}, "coarsest=1.0 must be below 1"),
        ({"horizon": float("inf")}, "horizon must be a finite number > 0, got inf"),
        ({"factors": (0.0,)}, "factors must be a finite number > 0, got 0.0"),
        ({"minibatch": 0}, "minibatch must be >= 1, got 0"),
        ({"variances": ()}, "variances is empty"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)
