"""Formulas of Dang et al. 2023 that are false as printed, each on a problem where it
shows: the printed form fails and ours holds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from elbo_problems import autoencoding, cvae, hvae, largest, minimized, vae

from gradflow import collapse
from gradflow.models import ConditionalELBO, HierarchicalELBO, NegativeELBO
from gradflow.moments import Moments
from gradflow.theory import CVAETheory, HVAETheory, VAETheory


@pytest.fixture
def rng():
    return np.random.default_rng(12)


def conditional(theta, **numbers):
    """A problem in which E has these eigenvalues."""
    size = len(theta)
    eye, zero = jnp.eye(size), jnp.zeros((size, size))
    return ConditionalELBO(
        Moments(eye, zero, jnp.diag(jnp.asarray(theta)), 1), **numbers
    )


def test_theorem_1_tests_an_eigenvalue(rng):
    """theta >= beta eta^2, not sqrt(beta) eta: they differ for theta between."""
    numbers: Any = dict(beta=0.5, decoder_std=0.6, prior_std=1.2)
    # beta eta^2 = 0.18 and sqrt(beta) eta = 0.424.
    theta = np.array([1.1, 0.3])
    problem = cvae(rng, 2, 2, 2, "full")
    problem.energy = conditional(theta, **numbers)
    _, _, point = minimized(problem, rng, starts=3)
    found = np.sort(collapse.spectra(problem.energy, point)["covariance"]) ** 0.5
    sigma = np.sqrt(0.5) * 1.2 * 0.6 / np.sqrt(theta)
    printed = np.where(theta >= np.sqrt(0.5) * 0.6, sigma, 1.2)
    ours = np.where(theta >= 0.5 * 0.6**2, sigma, 1.2)
    np.testing.assert_allclose(found, np.sort(ours), atol=1e-6)
    assert np.abs(found - np.sort(printed)).max() > 0.1
    known = np.sqrt(CVAETheory(problem.energy, 2).spectra()["covariance"])
    np.testing.assert_allclose(np.sort(known), np.sort(ours), rtol=1e-12)


def test_appendix_of_theorem_1_has_a_square_too_many(rng):
    """(16): omega^2 = (theta - beta eta^2)/e^2, printed with theta^2."""
    problem = cvae(rng, 2, 2, 2, "full")
    problem.energy = conditional([2.0, 0.7], beta=0.5, decoder_std=0.6)
    _, _, point = minimized(problem, rng, starts=3)
    found = np.asarray(collapse.spectra(problem.energy, point)["decoder"])
    theta = np.array([2.0, 0.7])
    np.testing.assert_allclose(found, np.sqrt(theta - 0.18), atol=1e-6)
    assert np.abs(found - np.sqrt(theta**2 - 0.18)).max() > 0.3


def test_prior_term_is_inside_the_bracket(rng):
    """(3), B.2.1: (1/eta^2)[... + beta c^2 (...)] with c = eta/e; printed outside."""
    problem = vae(rng, 3, 2, "full")
    energy, point = problem.energy, problem.theory(problem.energy).optimum()
    code, sigma = collapse.code(energy, point), point.covariance.matrix()
    prior = energy.beta * (jnp.trace(code) + jnp.trace(sigma))
    c2 = (energy.decoder_std / energy.prior_std) ** 2
    constant = 3 * np.log(2 * np.pi * energy.decoder_std**2) + energy.beta * 2 * (
        2 * np.log(energy.prior_std) - 1
    )
    twice = -2 * energy.elbo(point) - constant
    base = energy(point) - prior / energy.prior_std**2
    np.testing.assert_allclose(base + prior * c2 / energy.decoder_std**2, twice)
    assert abs(base + prior * c2 - twice) > 0.05


def test_gradient_39_has_a_factor_beta(rng):
    """dL/dV = 0 at given U, and W = (U^T U + beta c^2)^-1 U^T with Sigma beta eta^2
    times that inverse: the fit to log|Sigma| is beta U(U^T U + beta c^2)^-1."""
    problem = vae(rng, 3, 2, "full")
    energy = problem.energy
    decoder = jnp.asarray(rng.normal(size=(3, 2)))
    penalty = energy.beta * (energy.decoder_std / energy.prior_std) ** 2

    def profiled(decoder):
        sigma = lambda u: (
            energy.beta
            * energy.decoder_std**2
            * jnp.linalg.inv(u.T @ u + penalty * jnp.eye(2))
        )
        return -energy.beta * jnp.linalg.slogdet(sigma(decoder))[1]

    slope = 0.5 * jax.grad(profiled)(decoder)
    inverse = jnp.linalg.inv(decoder.T @ decoder + penalty * jnp.eye(2))
    np.testing.assert_allclose(slope, energy.beta * decoder @ inverse, atol=1e-12)
    assert np.abs(slope - decoder @ inverse).max() > 0.01


def test_threshold_below_43_has_a_factor_beta():
    """theta^2 = 0.5 is active for beta = 0.6, eta = 0.8; printed: theta^2 >= eta^2."""
    moments = autoencoding(jnp.diag(jnp.array([2.0, 0.5])))
    known = VAETheory(NegativeELBO(moments, beta=0.6, decoder_std=0.8), 2)
    assert 0.6 * 0.64 < 0.5 < 0.64
    omega = np.sqrt(0.5 - 0.6 * 0.64)
    np.testing.assert_allclose(known.spectra()["decoder"][1], omega, rtol=1e-12)
    assert largest(known.energy.differential(known.optimum())) < 1e-12


def test_k_where_c_squared_is_printed(rng):
    """Theorem 4, Remark 9: W_2 and Sigma_2 have k = c^2 beta_2/beta_1."""
    problem = hvae(rng, 3, (2, 2), ("isotropic", "full"), betas=(1.3, 0.7))
    energy = problem.energy
    _, _, point = minimized(problem, rng)
    c2 = float(energy.decoder_std / energy.prior_std) ** 2
    decoder, encoder = point.decoder_2.matrix(), point.encoder_2.matrix()
    sigma = point.covariance_2.matrix()
    ratio = 0.7 / 1.3

    def missed(k, scale):
        outer = jnp.linalg.inv(decoder @ decoder.T + k * jnp.eye(2))
        left = encoder - decoder.T @ outer
        inner = jnp.linalg.inv(decoder.T @ decoder + k * jnp.eye(2))
        right = sigma - scale * float(energy.decoder_std) ** 2 * inner
        return float(jnp.max(jnp.abs(left))), float(jnp.max(jnp.abs(right)))

    assert max(missed(c2 * ratio, ratio)) < 1e-6
    assert missed(c2, ratio)[0] > 0.01  # Theorem 4
    assert missed(c2, ratio)[1] > 0.01
    assert missed(c2, 1.0)[1] > 0.01  # Remark 9


def test_right_singular_vectors_of_z(rng):
    """Theorems 4, 5: V_1 = P Lambda S^T with Z = R Theta S^T. In ambient coordinates
    W_1 A W_1^T is diagonal with W_1 along eigenvectors of A, that is S = 1, R = P_A."""
    problem = hvae(rng, 3, (3, 3), ("isotropic", "full"), betas=(1.0, 0.5))
    _, _, point = minimized(problem, rng)
    values, vectors = np.linalg.eigh(problem.energy.moments.xx)
    whitened = np.asarray(point.encoder_1.matrix()) @ vectors * np.sqrt(values)
    off = lambda m: np.abs(m - np.diag(np.diag(m))).max()
    assert off(whitened.T @ whitened) < 1e-5
    assert off(vectors @ whitened.T @ whitened @ vectors.T) > 0.05


def test_case_b_has_a_square_root(rng):
    """omega^2 = (sigma_1^2 - eta^2 beta_2/beta_1)/e^2 where lambda = 0."""
    energy = HierarchicalELBO(
        autoencoding(jnp.diag(jnp.array([0.04, 0.01]))),
        beta_2=0.6,
        decoder_std=0.8,
        prior_std=1.2,
        covariance_1=jnp.eye(2),
    )
    problem = hvae(rng, 2, (2, 2), ("isotropic", "full"))
    problem.energy = energy
    _, _, point = minimized(problem, rng)
    found = np.asarray(collapse.spectra(energy, point)["decoder_2"])
    square = (1 - 0.64 * 0.6) / 1.44
    np.testing.assert_allclose(found, np.sqrt(square), atol=1e-6)
    assert np.abs(found - square).max() > 0.1
    known = HVAETheory(energy, 2, 2).spectra()
    np.testing.assert_allclose(known["decoder_2"], np.sqrt(square), rtol=1e-12)
    np.testing.assert_allclose(known["encoder_1"], 0, atol=1e-12)


def test_condition_106_has_the_ratio_of_betas():
    """Both fixed: omega > 0 iff t > c sigma_2 sqrt(beta_2/beta_1); printed without the
    root, which would keep this mode."""
    std, prior, sigma_1, sigma_2 = 0.8, 1.2, 1.0, 0.9
    beta_1, beta_2 = 0.5, 2.0
    theta = 0.75
    moments = autoencoding(jnp.asarray([[theta**2]]))
    energy = HierarchicalELBO(
        moments, beta_1=beta_1, beta_2=beta_2, decoder_std=std, prior_std=prior,
        covariance_1=sigma_1**2 * jnp.eye(1), covariance_2=sigma_2**2 * jnp.eye(1),
    )  # fmt: skip
    scale = std / prior * sigma_2
    cube = sigma_1**2 * theta**2 / (scale * np.sqrt(beta_1 * beta_2))
    t = max(sigma_1, cube ** (1 / 3))
    assert scale < t < scale * np.sqrt(beta_2 / beta_1)
    known = HVAETheory(energy, 1, 1)
    assert float(known.spectra()["decoder_2"][0]) == 0
    assert largest(energy.differential(known.optimum())) < 1e-12


def test_small_modes_collapse_at_one_and_not_at_theta():
    """Section 5, figure 2 (b): for sigma_1 = eta = beta_1 = 1 the threshold of a mode
    is max(theta, 1); printed: theta."""
    for beta_2, omega in ((0.612, np.sqrt(1 - 0.612)), (1.02, 0.0)):
        energy = HierarchicalELBO(
            autoencoding(jnp.asarray([[0.36]])),
            beta_2=beta_2,
            covariance_1=jnp.eye(1),
        )
        known = HVAETheory(energy, 1, 1)
        np.testing.assert_allclose(known.spectra()["decoder_2"][0], omega, atol=1e-12)
        assert largest(energy.differential(known.optimum())) < 1e-12
        assert float(known.collapse_threshold(0)) == pytest.approx(1.0)
