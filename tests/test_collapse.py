"""Measures of collapse, against samples and the closed forms at the minimum."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from elbo_problems import autoencoding, cvae, hvae, joint_moments, vae

from gradflow import collapse
from gradflow.initial import GaussianLike
from gradflow.models import ConditionalELBO, HierarchicalELBO, LinearCVAE, NegativeELBO
from gradflow.moments import Moments
from gradflow.theory import CVAETheory, HVAETheory, VAETheory


@pytest.fixture
def rng():
    return np.random.default_rng(13)


def test_kl_is_the_mean_of_that_of_samples(rng):
    data = jnp.asarray(rng.normal(size=(30, 4)))
    energy = NegativeELBO(Moments.from_data(data), beta=0.6, prior_std=1.3)
    point = GaussianLike(vae(rng, 4, 3, "full").like, 0.7, 0.3)(jr.key(0))
    each = collapse.kl_samples(energy, point, data)
    np.testing.assert_allclose(
        np.mean(each, axis=0), collapse.kl(energy, point), rtol=1e-12
    )
    with pytest.raises(ValueError, match="data are 2 arrays: give the rows of x"):
        collapse.kl_samples(energy, point, data, data)


def test_kl_of_a_conditional_vae_is_the_mean_of_that_of_samples(rng):
    x, y = (jnp.asarray(rng.normal(size=(30, size))) for size in (2, 3))
    energy = ConditionalELBO(Moments.from_data(x, y), prior_std=0.9)
    like = LinearCVAE.zeros(2, 3, 2, covariance="diagonal")
    point = GaussianLike(like, 0.7, 0.3)(jr.key(0))
    each = collapse.kl_samples(energy, point, x, y)
    np.testing.assert_allclose(
        np.mean(each, axis=0), collapse.kl(energy, point), rtol=1e-12
    )


@pytest.mark.parametrize("kind", ["diagonal", "isotropic"])
def test_kl_is_what_the_elbo_pays_for(rng, kind):
    """With a diagonal covariance: its derivative by beta is minus the sum."""
    problem = vae(rng, 4, 3, kind)
    point = GaussianLike(problem.like, 0.5, 0.2)(jr.key(1))

    def elbo(beta):
        return NegativeELBO(
            problem.energy.moments, beta=beta, covariance=problem.energy.covariance
        ).elbo(point)

    energy = NegativeELBO(problem.energy.moments, covariance=problem.energy.covariance)
    slope = jax.grad(elbo)(jnp.asarray(1.0))
    np.testing.assert_allclose(-slope, collapse.kl(energy, point).sum(), rtol=1e-12)


def test_kl_of_both_levels_is_what_the_elbo_pays_for(rng):
    problem = hvae(rng, 3, (3, 2), ("diagonal", "diagonal"))
    point = GaussianLike(problem.like, 0.5, 0.2)(jr.key(1))

    def elbo(betas):
        return HierarchicalELBO(
            problem.energy.moments, beta_1=betas[0], beta_2=betas[1]
        ).elbo(point)

    energy = HierarchicalELBO(problem.energy.moments)
    slopes = jax.grad(elbo)(jnp.ones(2))
    paid = [part.sum() for part in collapse.kl_hierarchical(energy, point)]
    np.testing.assert_allclose(-slopes, paid, rtol=1e-12)


def test_kl_at_the_minimum(rng):
    """Twice the KL of an active latent is log(theta^2/(beta eta^2)); in a hierarchical
    VAE that of z_2 is log(m/tau). The aggregate posterior is the prior."""
    moments = autoencoding(jnp.diag(jnp.array([2.0, 1.0, 0.3])))
    energy = NegativeELBO(moments, beta=0.7, decoder_std=0.9, prior_std=1.2)
    known = VAETheory(energy, 3)
    point: Any = known.optimum()
    ratio = np.array([2.0, 1.0, 0.3]) / (0.7 * 0.81)
    wanted = np.log(np.maximum(ratio, 1))
    np.testing.assert_allclose(2 * collapse.kl(energy, point), wanted, atol=1e-12)
    aggregate = collapse.code(energy, point) + point.covariance.matrix()
    np.testing.assert_allclose(aggregate, 1.44 * np.eye(3), atol=1e-12)
    hierarchical = HierarchicalELBO(
        moments, beta_2=0.7, decoder_std=0.9, prior_std=1.2, covariance_1=jnp.eye(3)
    )
    known = HVAETheory(hierarchical, 3, 3)
    second = collapse.kl_hierarchical(hierarchical, known.optimum())[1]
    active = np.asarray(known.omega2) > 0
    wanted = np.where(active, np.log(np.asarray(known.second) / (0.7 * 0.81)), 0)
    np.testing.assert_allclose(2 * second, wanted, atol=1e-12)


def test_collapse_of_a_share_of_the_samples():
    divergences = jnp.array(
        [[0.0, 0.5, 0.0], [0.0, 0.5, 0.0], [0.0, 0.5, 0.9], [0, 0, 0]]
    )
    for delta, wanted in ((0.0, [1, 0, 0]), (0.25, [1, 0, 1]), (0.8, [1, 1, 1])):
        found = collapse.is_collapsed(divergences, 0.1, delta)
        np.testing.assert_array_equal(found, np.array(wanted, bool))
    for epsilon, delta, text in (
        (0.0, 0.1, "epsilon must be > 0"),
        (float("nan"), 0.1, "epsilon must be > 0"),
        (0.1, 1.0, "delta must be at least 0"),
    ):
        with pytest.raises(ValueError, match=text):
            collapse.is_collapsed(divergences, epsilon, delta)


@pytest.mark.parametrize("family", ["vae", "cvae", "hvae"])
def test_spectra_of_the_optimum_are_those_of_the_theory(rng, family):
    problem = {
        "vae": lambda: vae(rng, 3, 4, "full"),
        "cvae": lambda: cvae(rng, 2, 3, 2, "general"),
        "hvae": lambda: hvae(rng, 2, (3, 4), ("isotropic", "full")),
    }[family]()
    known = problem.theory(problem.energy)
    found = collapse.spectra(problem.energy, known.optimum())
    assert set(found) == set(known.spectra())
    for name, wanted in known.spectra().items():
        distance = collapse.spectral_distance(found[name], wanted)
        # Roots of rounding are 1e-8.
        assert float(distance) < 1e-7, name


def test_spectral_distance():
    one, other = jnp.array([3.0, 1.0, 0.0]), jnp.array([0.5, 0.0, 2.5])
    assert float(collapse.spectral_distance(one, other)) == pytest.approx(1.0 / 3)
    with pytest.raises(ValueError, match="3 and 2 values"):
        collapse.spectral_distance(one, other[:2])


@pytest.mark.parametrize("kind", ["full", "general"])
def test_active_units_and_turned_latents(rng, kind):
    """At a turned minimum every coordinate looks active; turned back, only the modes
    that are. Loss and KL of the whole stay."""
    problem = vae(rng, 2, 4, kind)
    known = problem.theory(problem.energy)
    point, energy = known.optimum(), problem.energy
    back_energy, back = collapse.turned(energy, point)
    np.testing.assert_allclose(back_energy(back), energy(point), rtol=1e-12)
    wanted = 4 - int(known.collapsed())
    units = collapse.active_units(back_energy, back, threshold=1e-6)
    assert units.sum() == wanted and units[:wanted].all()


@pytest.mark.parametrize("kind", ["full", "general"])
def test_turned_latents_of_the_second_level(rng, kind):
    """At a random point: the loss stays, and the decoder's columns are orthogonal."""
    problem = hvae(rng, 2, (2, 3), ("isotropic", kind))
    point = GaussianLike(problem.like, 0.7, 0.4)(jr.key(1))
    back_energy, back = collapse.turned(problem.energy, point)
    np.testing.assert_allclose(back_energy(back), problem.energy(point), rtol=1e-12)
    inner = back.decoder_2.matrix().T @ back.decoder_2.matrix()
    np.testing.assert_allclose(inner, jnp.diag(jnp.diagonal(inner)), atol=1e-12)
    assert (jnp.diff(jnp.diagonal(inner)) <= 1e-12).all()


def test_conditional_code_counts_both_inputs(rng):
    moments = joint_moments(rng, 2, 2)
    energy = ConditionalELBO(moments, beta=0.3)
    known = CVAETheory(energy, 2)
    back_energy, back = collapse.turned(energy, known.optimum())
    np.testing.assert_allclose(back_energy(back), known.optimal_energy(), rtol=1e-12)
    np.testing.assert_allclose(
        np.sqrt(np.diag(collapse.code(back_energy, back))),
        known.spectra()["encoder"],
        atol=1e-7,
    )


@pytest.mark.parametrize("delta", [0.0, 0.05, 0.1, 0.33])
def test_collapse_level_is_where_collapse_begins(rng, delta):
    divergences = jnp.asarray(rng.exponential(size=(20, 3)))
    level = collapse.collapse_level(divergences, delta)
    for latent in range(3):
        at = float(level[latent])
        above, below = (
            collapse.is_collapsed(divergences, epsilon, delta)[latent]
            for epsilon in (np.nextafter(at, 9), at)
        )
        assert above and not below
    with pytest.raises(ValueError, match="delta must be at least 0 and below 1, got 1"):
        collapse.collapse_level(divergences, 1.0)
