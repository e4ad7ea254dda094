"""Critical points of probabilistic CCA: values, kinds and indices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from latents import covariance_of, largest, moments_of, point_of

from gradflow.critical import classify, KIND
from gradflow.em import ExpectationMaximization, Squarem
from gradflow.flow import GradientFlow
from gradflow.iterate import Iterator
from gradflow.models import Block, Full, LatentGaussian, NegativeLogLikelihood
from gradflow.moments import Moments
from gradflow.theory import PCCATheory
from gradflow.types import names_of


EXAMPLE = [
    [2.0, 0.3, 0.2, 0.8, 0.1],
    [0.3, 1.5, 0.1, 0.2, 0.4],
    [0.2, 0.1, 1.0, 0.3, 0.1],
    [0.8, 0.2, 0.3, 1.6, 0.2],
    [0.1, 0.4, 0.1, 0.2, 1.2],
]


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def _theory(rng, latents=2, sizes=(3, 4)):
    data = rng.normal(size=(30, sum(sizes))) @ rng.normal(size=(sum(sizes),) * 2)
    covariance = data.T @ data / 30 + np.eye(sum(sizes))
    energy = NegativeLogLikelihood(moments_of(covariance))
    return PCCATheory(energy, latents, sizes)


def test_worked_numbers():
    energy = NegativeLogLikelihood(moments_of(EXAMPLE))
    theory = PCCATheory(energy, 1, (3, 2))
    np.testing.assert_allclose(
        theory.spectrum(), [0.4856921271740683, 0.284128751957664], rtol=1e-13
    )
    np.testing.assert_allclose(theory.optimal_energy(), 7.798056331335606, rtol=1e-14)
    found = theory.optimum().covariance()
    np.testing.assert_allclose(
        found[0], [2, 0.3, 0.2, 0.78325332091, 0.196053073966], rtol=1e-10
    )
    np.testing.assert_allclose(energy(theory.optimum()), 7.798056331335606, rtol=1e-13)


@pytest.mark.slow
def test_every_index_set_has_its_kind_and_index(rng):
    """In another basis of the latent variables: W_1 A and W_2 A^-T."""
    theory = _theory(rng)
    flow = GradientFlow(theory.energy)
    judge = eqx.filter_jit(
        lambda point: (
            classify(flow, theory, point),
            theory.energy(point),
            theory.energy.differential(point),
        )
    )
    for modes in theory.index_sets():
        point = theory.critical_point(modes)
        change = np.eye(2) + 0.02 * rng.normal(size=(2, 2))
        first = point.loadings[:3] @ change
        second = point.loadings[3:] @ np.linalg.inv(change).T
        noise = [
            Full.of(root @ root - own @ own.T)
            for root, own in zip(theory.roots, (first, second), strict=True)
        ]
        for other in (
            point,
            LatentGaussian(jnp.concatenate([first, second]), Block(tuple(noise))),
        ):
            finding, energy, slope = judge(other)
            assert largest(slope) < 1e-12
            value = theory.critical_energy(modes)
            np.testing.assert_allclose(energy, value, rtol=1e-12)
            best = modes == (0, 1)
            kind = "global_minimum" if best else "strict_saddle"
            assert names_of(KIND, finding.kind) == kind
            np.testing.assert_array_equal(np.flatnonzero(finding.active), modes)
            assert finding.index == (-1 if best else theory.index(modes))


def test_the_certificates_level_is_the_second_critical_value(rng):
    for latents in (1, 2, 3):
        theory = _theory(rng, latents)
        values = sorted(float(theory.critical_energy(m)) for m in theory.index_sets())
        gap = theory.certificate.level - theory.optimal_energy()
        np.testing.assert_allclose(gap, (values[1] - values[0]) * (1 - 1e-6), rtol=1e-9)


@pytest.mark.slow
def test_em_reaches_the_closed_form():
    """From random starts, 1e-8 in average log-likelihood."""

    def one(key):
        data, start = jr.split(key)
        energy = NegativeLogLikelihood(moments_of(covariance_of(data, 6, 40)))
        theory = PCCATheory(energy, 2, (3, 3))
        end = Iterator(Squarem(ExpectationMaximization(energy)), max_steps=50_000)(
            point_of("pcca", start)
        )
        return end, end.energy - theory.optimal_energy()

    ends, gaps = eqx.filter_jit(jax.vmap(one))(jr.split(jr.key(0), 20))
    assert np.max(np.abs(gaps)) < 1e-8
    assert np.max(ends.stats["increase"]) < 1e-11


@pytest.mark.slow
def test_closeness_is_not_criticality(rng):
    theory = _theory(rng)
    flow = GradientFlow(theory.energy)
    point = theory.critical_point((0, 2))
    near = eqx.tree_at(lambda p: p.loadings, point, point.loadings + 1e-8)
    finding = classify(flow, theory, near)
    assert finding.kind == KIND.unresolved and 0 < finding.remaining < jnp.inf


def test_more_latents_than_pairs(rng):
    theory = _theory(rng, latents=5)
    point = theory.optimum()
    assert point.loadings.shape == (7, 5)
    np.testing.assert_allclose(
        theory.energy(point), theory.optimal_energy(), rtol=1e-13
    )


def test_views_come_from_moments(rng):
    x, y = rng.normal(size=(40, 2)), rng.normal(size=(40, 3))
    theory = PCCATheory(
        NegativeLogLikelihood(Moments.from_data(x, y, center=True)), latents=1
    )
    assert theory.sizes == (2, 3)


def test_refuses(rng):
    energy = NegativeLogLikelihood(moments_of(EXAMPLE))
    with pytest.raises(ValueError, match="of one view: give the sizes of the two"):
        PCCATheory(energy, 1)
    for bad in ((3, 3), (5,), (2, 2, 1), (5, 0)):
        with pytest.raises(ValueError, match="must be two numbers >= 1 whose sum is"):
            PCCATheory(energy, 1, bad)
    few = NegativeLogLikelihood(moments_of(covariance_of(jr.key(0), 6, 2)))
    with pytest.raises(ValueError, match="covariance of the first view is singular"):
        PCCATheory(few, 1, (3, 3))
    some = NegativeLogLikelihood(moments_of(covariance_of(jr.key(0), 6, 4)))
    with pytest.raises(ValueError, match="canonical correlation 1"):
        PCCATheory(some, 1, (3, 3))
    theory = PCCATheory(energy, 1, (3, 2))
    with pytest.raises(ValueError, match="about a Block of two Full noises of sizes"):
        theory.active(LatentGaussian(jnp.ones((5, 1)), Full.of(np.eye(5))))
    with pytest.raises(ValueError, match="the energy has a pattern"):
        PCCATheory(
            NegativeLogLikelihood(energy.moments, np.ones((5, 1), bool)), 1, (3, 2)
        )
