"""Critical points of probabilistic PCA: values, kinds and indices."""

import itertools
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from latents import covariance_of, largest, moments_of, naive
from scipy.optimize import least_squares

from gradflow.critical import classify, KIND, RULE
from gradflow.em import ExpectationMaximization, Squarem
from gradflow.flow import GradientFlow
from gradflow.iterate import Iterator
from gradflow.models import Diagonal, Isotropic, LatentGaussian, NegativeLogLikelihood
from gradflow.solve import integrate
from gradflow.theory import PPCATheory
from gradflow.theory.modes import check_latents
from gradflow.types import names_of


# The second has many critical points, the third few.
SPECTRA = [(5.0, 4.0, 3.0, 2.0, 0.5), (3.0, 2.6, 2.2, 1.8, 0.4), (5, 4, 1, 0.5, 0.2)]


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def _theory(rng, spectrum, latents=2):
    basis, _ = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))
    covariance = basis * spectrum @ basis.T
    covariance = (covariance + covariance.T) / 2
    return PPCATheory(NegativeLogLikelihood(moments_of(covariance)), latents)


def _turned(rng, point):
    """Another point of the same orbit."""
    size = point.loadings.shape[1]
    rotation, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return LatentGaussian(point.loadings @ rotation, point.noise)


def test_worked_numbers():
    example = [[2, 0.6, 0.4, 0.1], [0.6, 1.5, 0.3, 0.2], [0.4, 0.3, 1, 0.1]]
    example.append([0.1, 0.2, 0.1, 0.7])
    theory = PPCATheory(NegativeLogLikelihood(moments_of(example)), 1)
    np.testing.assert_allclose(theory.optimal_energy(), 5.944703288945224, rtol=1e-14)
    np.testing.assert_allclose(theory.variance([0]), 0.8717619706360812, rtol=1e-14)
    point = theory.optimum()
    np.testing.assert_allclose(theory.energy(point), 5.944703288945224, rtol=1e-13)
    outer = (point.loadings @ point.loadings.T)[0]
    expected = [1.03843224596, 0.71513132074, 0.407121343448, 0.152586339173]
    np.testing.assert_allclose(outer, expected, rtol=1e-11)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_every_index_set_has_its_kind_and_index(rng, spectrum):
    """Planted in a random basis with a random rotation; 0 saddles are called global."""
    theory = _theory(rng, spectrum)
    flow = GradientFlow(theory.energy)
    judge = eqx.filter_jit(
        lambda point: (
            classify(flow, theory, point),
            theory.energy(point),
            theory.energy.differential(point),
        )
    )
    valid = theory.index_sets()
    for modes in itertools.chain.from_iterable(
        itertools.combinations(range(5), size) for size in range(3)
    ):
        if modes not in valid:
            with pytest.raises(ValueError, match="this is no critical point"):
                theory.critical_point(modes)
            continue
        point = _turned(rng, theory.critical_point(modes))
        finding, energy, slope = judge(point)
        assert largest(slope) < 1e-13
        value = theory.critical_energy(modes)
        np.testing.assert_allclose(energy, value, rtol=1e-13)
        best = modes == (0, 1)
        kind = "global_minimum" if best else "strict_saddle"
        assert names_of(KIND, finding.kind) == kind
        np.testing.assert_array_equal(np.flatnonzero(finding.active), modes)
        assert finding.rank == len(modes)
        # A certified minimum needs no Hessian.
        assert finding.index == (-1 if best else theory.index(modes))
        assert (theory.index(modes) == 0) == best
        assert abs(finding.value_gap) < 1e-12


@pytest.mark.slow
def test_there_are_no_other_critical_points(rng):
    """Newton's method on the gradient from random starts finds members of the list."""
    theory = _theory(rng, SPECTRA[1], latents=1)
    flat, restore = ravel_pytree(theory.optimum())
    gradient = jax.grad(lambda x: theory.energy(restore(x)))
    slope, hessian = jax.jit(gradient), jax.jit(jax.jacobian(gradient))
    values = np.array([float(theory.critical_energy(m)) for m in theory.index_sets()])
    found = 0
    for _ in range(30):
        start = rng.normal(size=flat.shape)
        end = least_squares(
            lambda x: np.asarray(slope(x)),
            start,
            cast(Any, lambda x: np.asarray(hessian(x))),
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
        )
        if end.cost < 1e-18 and np.abs(end.x).max() < 20:
            energy = float(theory.energy(restore(jnp.asarray(end.x))))
            assert np.min(np.abs(values - energy)) < 1e-7
            found += 1
    assert found >= 4


@pytest.mark.slow
def test_closeness_is_not_criticality(rng):
    """A point 1e-9 away from a saddle may leave it: no verdict."""
    theory = _theory(rng, SPECTRA[0])
    flow = GradientFlow(theory.energy)
    point = theory.critical_point((0, 2))
    near = eqx.tree_at(lambda p: p.loadings, point, point.loadings + 1e-9)
    finding = classify(flow, theory, near)
    assert finding.kind == KIND.unresolved
    assert 0 < finding.remaining < jnp.inf
    # And it does leave.
    end = integrate(flow, near, stop=theory.certificate, max_steps=10**5)
    assert end.time < 20 * finding.remaining
    assert classify(flow, theory, end).rule == RULE.loss_certificate


@pytest.mark.slow
def test_zero_stays(rng):
    """From loadings 0 the flow goes to the saddle of no modes, and is judged so."""
    theory = _theory(rng, SPECTRA[0])
    flow = GradientFlow(theory.energy)
    start = LatentGaussian(jnp.zeros((5, 2)), Isotropic.of(1.0, 5))
    end = integrate(flow, start, tolerance=1e-9)
    assert jnp.all(end.point.loadings == 0)
    noise: Any = end.point.noise
    np.testing.assert_allclose(jnp.exp(noise.log_variance), 2.9, rtol=1e-8)
    saddle = theory.critical_point(())
    assert classify(flow, theory, saddle).kind == KIND.strict_saddle


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_certificates_level_is_the_second_critical_value(rng, spectrum):
    theory = _theory(rng, spectrum)
    values = sorted(float(theory.critical_energy(m)) for m in theory.index_sets())
    gap = theory.certificate.level - theory.optimal_energy()
    np.testing.assert_allclose(gap, (values[1] - values[0]) * (1 - 1e-6), rtol=1e-9)


@pytest.mark.slow
def test_the_second_critical_value_of_random_spectra(rng):
    """One exchange or omission away, against all sets."""
    for trial in range(30):
        spectrum = np.sort(rng.gamma(1 + trial % 3, size=6))[::-1]
        latents = 1 + trial % 4
        theory = _theory(rng, tuple(spectrum), latents)
        values = sorted(float(theory.critical_energy(m)) for m in theory.index_sets())
        gap = theory.certificate.level - theory.optimal_energy()
        np.testing.assert_allclose(gap, (values[1] - values[0]) * (1 - 1e-6), rtol=1e-7)


@pytest.mark.parametrize("samples", [40, pytest.param(5, marks=pytest.mark.slow)])
def test_em_reaches_the_closed_form(samples):
    """From random starts, 1e-8 in average log-likelihood; with fewer samples than
    variables too."""

    def one(key):
        data, start = jr.split(key)
        energy = NegativeLogLikelihood(moments_of(covariance_of(data, 7, samples)))
        theory = PPCATheory(energy, 2)
        point = LatentGaussian(jr.normal(start, (7, 2)), Isotropic(jnp.zeros(()), 7))
        end = Iterator(Squarem(ExpectationMaximization(energy)))(point)
        return end, end.energy - theory.optimal_energy()

    ends, gaps = eqx.filter_jit(jax.vmap(one))(jr.split(jr.key(0), 20))
    assert np.max(np.abs(gaps)) < 1e-8
    assert np.max(ends.stats["increase"]) < 1e-11


@pytest.mark.slow
def test_ties(rng):
    """Verdicts do not depend on the basis of an eigenspace."""
    theory = _theory(rng, (3.0, 2.0, 2.0, 2.0, 0.5))
    flow = GradientFlow(theory.energy)
    values, vectors = theory.eigenvalues, theory.vectors
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    other = vectors.at[:, 1:4].set(vectors[:, 1:4] @ rotation)
    variance = theory.variance((0, 1))
    chosen = other[:, :2] * jnp.sqrt(values[:2] - variance)[None, :]
    point = LatentGaussian(chosen, Isotropic(jnp.log(variance), 5))
    finding = classify(flow, theory, point)
    assert finding.kind == KIND.global_minimum
    np.testing.assert_array_equal(np.flatnonzero(finding.active), [0, 1])
    assert theory.index((0, 2)) == 0
    # All equal: no structure, and 0 is optimal.
    round_ = PPCATheory(NegativeLogLikelihood(moments_of(np.eye(4))), 2)
    point = round_.critical_point(())
    np.testing.assert_allclose(round_.energy(point), round_.optimal_energy())
    finding = classify(GradientFlow(round_.energy), round_, point)
    assert finding.kind == KIND.global_minimum


def test_refuses(rng):
    energy = _theory(rng, SPECTRA[0]).energy
    for bad, text in ((0, ">= 1, got 0"), (True, "whole number"), (2.0, "whole")):
        with pytest.raises(ValueError, match=f"latents must be .*{text}"):
            check_latents(bad)
    with pytest.raises(ValueError, match="latents=5 but the covariance has rank 5"):
        PPCATheory(energy, 5)
    few = NegativeLogLikelihood(moments_of(covariance_of(jr.key(0), 6, 3)))
    with pytest.raises(ValueError, match="latents=3 but the covariance has rank 3"):
        PPCATheory(few, 3)
    held = NegativeLogLikelihood(energy.moments, np.ones((5, 2), bool))
    with pytest.raises(ValueError, match="the energy has a pattern"):
        PPCATheory(held, 2)
    theory = PPCATheory(energy, 2)
    with pytest.raises(ValueError, match=r"modes=\(0, 1, 2\) are 3, more than latents"):
        theory.critical_point((0, 1, 2))
    with pytest.raises(ValueError, match=r"modes=\(7,\) must be different numbers"):
        theory.critical_energy((7,))
    other = LatentGaussian(jnp.ones((5, 2)), Diagonal(jnp.zeros(5)))
    with pytest.raises(ValueError, match="probabilistic PCA is about Isotropic noise"):
        theory.active(other)


def test_energies_are_those_of_the_definition(rng):
    theory = _theory(rng, SPECTRA[0])
    point = theory.optimum()
    np.testing.assert_allclose(
        naive(point, theory.energy.covariance), theory.optimal_energy(), rtol=1e-13
    )
