"""What is brought is certified by identities, and what fails is said in words."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from gradflow import (
    check_descent,
    check_energy,
    check_initializer,
    check_manifold,
    GaussianInit,
    GradientFlow,
    Integrator,
    LowRankInit,
    RESULTS,
    Solution,
)
from gradflow.datasets import gaussian
from gradflow.manifolds import AbstractManifold, Euclidean, FixedRank, Stiefel
from gradflow.models import AbstractEnergy, SquaredLoss, TiedAutoencoder


KEY = jr.key(5)
ENERGY = SquaredLoss(gaussian(jr.key(7), 4, 20))
START = GaussianInit((4, 2, 4), 0.3)


class _Well(AbstractEnergy):
    """(|x|^2 - 1)^2, as a user may write it."""

    def __call__(self, point):
        return (jnp.sum(point**2) - 1) ** 2


@pytest.mark.slow
def test_what_the_package_has_is_sound():
    assert check_energy(ENERGY, START(KEY), KEY).sound
    assert check_energy(_Well(), jnp.array([0.3, 2.0]), KEY).sound
    assert check_initializer(START, KEY).sound
    frame = TiedAutoencoder(jnp.linalg.qr(jr.normal(KEY, (4, 2)))[0])
    rank = LowRankInit((4, 4), 2, jnp.asarray(1.0))(KEY)
    for manifold, point in (
        (Euclidean(), START(KEY)),
        (Stiefel(), frame),
        (FixedRank(2, 3), rank),
    ):
        certificate = check_manifold(manifold, ENERGY, point, KEY)
        assert certificate.sound, str(certificate)
        assert len(certificate.checks) == 6
    flow = GradientFlow(ENERGY)
    certificate = check_descent(
        Integrator(flow, method=diffrax.Tsit5()), START, KEY, ENERGY
    )
    assert certificate.sound and len(certificate.checks) == 5
    certificate.require()
    assert "Integrator: the energy did not rise: yes, to 0.0e+00" in str(certificate)


def _failing(certificate):
    """The identities that fail, and what is said of the first."""
    assert not certificate.sound
    with pytest.raises(ValueError) as error:
        certificate.require()
    text = str(error.value)
    assert "\n" not in text and text in str(certificate)
    return [c.identity for c in certificate.checks if not c.holds], text


class _Stopped(_Well):
    def __call__(self, point):
        return (jnp.sum(point**2) - jax.lax.stop_gradient(jnp.sum(point))) ** 2


class _Wrong(_Well):
    def differential(self, point):
        return 2.001 * (jnp.sum(point**2) - 1) * 2 * point


class _Vector(_Well):
    def __call__(self, point):
        return point**2


class _Infinite(_Well):
    def __call__(self, point):
        return jnp.log(jnp.sum(point) - 100)


class _Broken(_Well):
    def __call__(self, point):
        return point @ jnp.ones(17)


class _Random(_Well):
    def __call__(self, point):
        return jnp.sum(point**2) + np.random.default_rng().normal()


@pytest.mark.parametrize(
    "energy, identity, words",
    [
        (_Stopped, "differential is the derivative of E", "look for stop_gradient"),
        (_Wrong, "differential is the derivative of E", "it is off by 5.0e-04"),
        (_Vector, "E is one finite number", "of shape (2,), not one number"),
        (_Infinite, "E is one finite number", "it is off by nan"),
        (_Broken, "E is one finite number", "it raised TypeError: "),
        (_Random, "E is a function of the point only", "must not draw random numbers"),
    ],
)
def test_energies_that_are_none(energy, identity, words):
    found, text = _failing(check_energy(energy(), jnp.array([0.3, 2.0]), KEY))
    assert found[0] == identity
    assert text.startswith(f"{energy.__name__}: {identity}: no") and words in text


class _Sphere(AbstractManifold):
    """The unit sphere."""

    def gradient(self, point, differential):
        return differential - point * (point @ differential)

    def inner(self, point, u, v):
        return jnp.sum(u * v)

    def chart(self, point):
        across = jnp.linalg.svd(point[None], full_matrices=True)[2][1:]
        move = lambda x: (point + x @ across) / jnp.linalg.norm(point + x @ across)
        return move, point.size - 1

    def defect(self, point):
        return jnp.abs(jnp.linalg.norm(point) - 1)


class _Flat(_Sphere):
    def chart(self, point):
        across = jnp.linalg.svd(point[None], full_matrices=True)[2][1:]
        return (lambda x: point + x @ across), point.size - 1


class _OtherMetric(_Sphere):
    def inner(self, point, u, v):
        return 2 * jnp.sum(u * v)


class _NoMetric(_Sphere):
    def inner(self, point, u, v):
        return -jnp.sum(u * v)


class _Skewed(_Sphere):
    def inner(self, point, u, v):
        return jnp.sum(u * v) + 0.1 * (u[0] * v[1] - u[1] * v[0])


class _Elsewhere(_Sphere):
    def chart(self, point):
        return (lambda x: jnp.zeros_like(point).at[0].set(1.0)), point.size - 1


UNIT = jnp.array([0.6, 0.0, 0.8])
QUARTIC: Any = type("Quartic", (_Well,), {"__call__": lambda _, p: jnp.sum(p**4)})


@pytest.mark.parametrize(
    "manifold, identity",
    [
        (_Flat, "chart stays on the manifold"),
        (_OtherMetric, "g(gradient, v) is dE(v) for tangents v"),
        (_NoMetric, "the metric is positive"),
        (_Skewed, "the metric is symmetric"),
        (_Elsewhere, "chart takes 0 to the point"),
    ],
)
def test_manifolds_that_are_none(manifold, identity):
    assert check_manifold(_Sphere(), QUARTIC(), UNIT, KEY).sound
    found, text = _failing(check_manifold(manifold(), QUARTIC(), UNIT, KEY))
    assert found[0] == identity and text.startswith(f"{manifold.__name__}: ")


def test_a_point_beside_the_manifold():
    found, _ = _failing(check_manifold(_Sphere(), QUARTIC(), 1.01 * UNIT, KEY))
    assert found[0] == "the point is on the manifold"


def _whole(key):
    return jr.randint(key, (3,), 0, 5)


def _always(key):
    return jnp.ones(3)


def _forgetful(key):
    return jnp.asarray(np.random.default_rng().normal(size=3))


def _branching(key):
    point = jr.normal(key, (3,))
    return point if point[0] > 0 else -point


@pytest.mark.parametrize(
    "start, identity, words",
    [
        (_whole, "a point is finite floating arrays", "an array of int"),
        (lambda key: jnp.full(3, jnp.nan), "a point is finite", "not finite"),
        (lambda key: None, "a point is finite floating arrays", "has no arrays"),
        (_always, "another key gives another point", "use the key"),
        (_forgetful, "one key gives one point", "take all randomness from the key"),
        (_branching, "a batch has the points of its keys", "it raised Tracer"),
    ],
)
def test_starts_that_are_none(start, identity, words):
    found, text = _failing(check_initializer(start, KEY))
    assert found[0].startswith(identity) and words in text


WELL = _Well()


def _loop(point, rate=0.002, steps=50, energy=WELL, says=0.0):
    """A user's optax loop."""
    method = optax.sgd(rate)

    def step(carry, _):
        point, memory = carry
        change, memory = method.update(energy.differential(point), memory, point)
        return (optax.apply_updates(point, change), memory), None

    (end, _), _ = jax.lax.scan(step, (point, method.init(point)), length=steps)
    zero: Any = jnp.zeros(())
    return Solution(
        point=end,
        energy=energy(end) + says,
        speed=jnp.linalg.norm(energy.differential(end)),
        time=zero + rate * steps,
        distance=jnp.linalg.norm(end - point),
        times=None,
        history=None,
        result=RESULTS.successful,  # pyright: ignore[reportArgumentType]
        stats={"steps": zero + steps, "rejected": zero},
    )


def _python_if(point):
    return _loop(point if point[0] > 0 else -point)


@pytest.mark.parametrize(
    "descend, identity, words",
    [
        (eqx.Partial(_loop, rate=-0.0002), "the energy did not rise", "smaller steps"),
        (eqx.Partial(_loop, says=1e-3), "Solution.energy is the energy", "at the end"),
        (lambda point: point, "it returns a Solution", "not a Solution"),
        (_python_if, "a batch has the ends of its starts", "it raised Tracer"),
    ],
)
def test_descents_that_are_none(descend, identity, words):
    start = lambda key: jr.normal(key, (3,))
    assert check_descent(_loop, start, KEY, _Well()).sound
    found, text = _failing(check_descent(descend, start, KEY, _Well()))
    assert found[0].startswith(identity) and words in text
