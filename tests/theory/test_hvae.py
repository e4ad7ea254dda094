"""The minimum of linear hierarchical VAEs, the case left open, and MNIST."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from elbo_problems import (
    all_global,
    autoencoding,
    compared,
    counted,
    hvae,
    largest,
    minimized,
)

from gradflow import collapse
from gradflow.critical import classify, KIND, RULE
from gradflow.datasets import mnist
from gradflow.flow import GradientFlow
from gradflow.initial import GaussianLike
from gradflow.models import CholeskyCovariance, HierarchicalELBO, LinearHVAE, LinearMap
from gradflow.solve import Integrator
from gradflow.study import run_study, Study
from gradflow.theory import HVAETheory
from gradflow.types import names_of


# The two covariances, and a beta where the second one matters.
KINDS = [
    (("isotropic", "full"), None),
    (("isotropic", "diagonal"), None),
    (("isotropic", "isotropic"), None),
    (("isotropic", "general"), None),
    (("general", "full"), None),
    (("full", "full"), (0.7, 1.3)),
    (("diagonal", "diagonal"), (0.9, 1.1)),
    (("full", "isotropic"), None),
    (("diagonal", "diagonal fixed"), None),
]
SIZES = [(3, (2, 2), None), (4, (2, 3), 2), (3, (3, 2), None), (2, (3, 3), None)]


@pytest.fixture
def rng():
    return np.random.default_rng(10)


def without_closed_form(kinds, latents):
    return kinds[0] == "general" and (kinds[1] != "full" or latents[1] < latents[0])


def agrees(problem, rng, unique=True):
    known = problem.theory(problem.energy)
    best, _, point = minimized(problem, rng)
    least = float(known.optimal_energy())
    compared(best, least)
    optimum = known.optimum()
    assert abs(float(problem.energy(optimum)) - least) <= 1e-9
    assert largest(problem.energy.differential(optimum)) < 1e-10 * (1 + abs(least))
    if not unique:
        return
    # Where the m differ, how they pair up with the c is open, and with it z_1's part.
    m = np.asarray(known.second)
    learned = problem.energy.covariance_1 is None
    level_1 = not learned or np.ptp(m) < 1e-9 * m[0]
    for name, wanted in known.spectra().items():
        if level_1 or name.endswith("_2"):
            found = np.sort(collapse.spectra(problem.energy, point)[name])
            np.testing.assert_allclose(found, np.sort(wanted), atol=1e-6)


@pytest.mark.parametrize("kinds, betas", KINDS)
@pytest.mark.slow
def test_minimum_against_strong_minimization(rng, kinds, betas):
    with counted():
        for x, latents, rank_x in (SIZES[0], SIZES[2]):
            if not without_closed_form(kinds, latents):
                problem = hvae(rng, x, latents, kinds, rank_x=rank_x, betas=betas)
                agrees(problem, rng, unique=kinds[0] != "general")


@pytest.mark.slow
@pytest.mark.parametrize("kinds, betas", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_strong_minimization_of_many_problems(rng, kinds, betas, size):
    """3 x 9 x 4 = 108 problems, but for the 3 without a closed form."""
    x, latents, rank_x = size
    if without_closed_form(kinds, latents):
        return
    with counted():
        for _ in range(3):
            problem = hvae(rng, x, latents, kinds, rank_x=rank_x, betas=betas)
            agrees(problem, rng, unique=kinds[0] != "general")


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [k for k, _ in KINDS if k[0] != "diagonal"])
@pytest.mark.parametrize(
    "hidden", [((), (), (1,), ()), ((), (1,), (), ()), ((2,), (3,), (2,), (2,))]
)
def test_minimum_of_deep_maps(rng, kinds, hidden):
    if kinds[0] == "general" and hidden[1] == (1,):
        return
    problem = hvae(rng, 3, (2, 2), kinds, hidden=hidden, betas=(0.8, 1.2))
    agrees(problem, rng, unique=False)


def diagonal(theta, **options):
    moments = autoencoding(jnp.diag(jnp.asarray(theta) ** 2))
    numbers: Any = dict(decoder_std=0.8, prior_std=1.2) | options
    return HierarchicalELBO(moments, **numbers)


def isotropic(std, size):
    return std**2 * jnp.eye(size)


@pytest.mark.parametrize(
    "theta, latents, betas, stds, least, lam, omega",
    [
        ((2.2, 1.3, 0.7), (3, 3), (1.3, 0.7), (0.9, None), 10.808758222047574,
         (2.8179589878390456, 1.4985260615494336, 0.2755675960631071),
         (2.4161317615674833, 1.3720840223015458, 0.6131216320468236)),
        ((2.2, 1.3, 0.7), (2, 4), (1.0, 2.0), (1.0, None), 16.076885967171563,
         (1.6677080080157918, 0.5659615711335884),
         (1.3179450544945592, 0.16731644171050974, 0, 0)),
        ((1.8, 1.2, 0.9), (3, 1), (1.3, 0.7), (0.9, None), 11.408789861592364,
         (2.2467834150815946, 0.3704357715604576, 0), (1.9567228004565742,)),
        ((2.2, 1.3, 0.7), (3, 3), (0.5, 1.5), (0.6, 0.8), 10.87920238266138,
         (1.4364291672325817, 0.917407667730689, 0.48370414118208643),
         (0.9558116987333786, 0.49888223554136857, 0)),
        ((1.8, 0.9), (4, 3), (1.0, 0.3), (1.1, 0.8), 7.837934113051551,
         (2.106510005727641, 1.0154634341206683, 0, 0),
         (0.9753718383660156, 0.7416026491761529, 0.6072443311493891)),
        ((2.2, 1.3, 0.7), (2, 2), (0.7, 1.4), (None, None), 8.564723365592119,
         (0.7620763285777301, 0.6858157152371709), (0, 0)),
        ((2.2, 1.3, 0.7), (2, 2), (0.7, 1.4), (None, 0.6), 10.07594152394389,
         None, (0.9428090415820635, 0.9428090415820635)),
        ((1.8, 0.9), (3, 3), (1.0, 1.0), (None, 1.5), 10.450997162981697,
         None, (0, 0, 0)),
    ],
)  # fmt: skip
def test_worked_examples(theta, latents, betas, stds, least, lam, omega):
    """Checked by minimizers of another implementation, in all digits."""
    sigmas = [
        None if std is None else isotropic(std, size)
        for std, size in zip(stds, latents, strict=True)
    ]
    energy = diagonal(
        theta, beta_1=betas[0], beta_2=betas[1],
        covariance_1=sigmas[0], covariance_2=sigmas[1],
    )  # fmt: skip
    known = HVAETheory(energy, *latents)
    np.testing.assert_allclose(known.optimal_energy(), least, rtol=1e-12)
    spectra = known.spectra()
    np.testing.assert_allclose(spectra["decoder_2"], omega, atol=1e-10)
    if lam is not None:
        np.testing.assert_allclose(spectra["encoder_1"], lam, atol=1e-10)


def test_a_fixed_first_covariance_that_is_not_isotropic():
    energy = diagonal(
        (2.2, 1.3, 0.7), beta_1=1.3, beta_2=0.7,
        covariance_1=jnp.diag(jnp.array([1.06, 0.48]) ** 2),
    )  # fmt: skip
    least = HVAETheory(energy, 2, 2).optimal_energy()
    np.testing.assert_allclose(least, 9.352718936731376, rtol=1e-12)


@pytest.mark.parametrize("stds", [(0.9, None), (0.9, 0.7), (None, 0.7)])
def test_a_dimension_collapses_at_its_threshold(stds):
    theta, latents = (2.2, 1.3, 0.7), (3, 2)
    sigmas = [
        None if std is None else isotropic(std, size)
        for std, size in zip(stds, latents, strict=True)
    ]

    def known(beta_2):
        return HVAETheory(
            diagonal(theta, beta_1=1.3, beta_2=beta_2, covariance_1=sigmas[0],
                     covariance_2=sigmas[1]),
            *latents,
        )  # fmt: skip

    for mode in range(2):
        threshold = float(known(1.0).collapse_threshold(mode))
        assert known(0.999 * threshold).spectra()["decoder_2"][mode] > 0
        assert known(1.001 * threshold).spectra()["decoder_2"][mode] == 0


def test_open_case_above_equality_z_2_collapses_completely():
    energy = diagonal((2.2, 1.3), beta_1=0.9, beta_2=0.91)
    known = HVAETheory(energy, 2, 2)
    assert int(known.collapsed()) == 2 and int(known.collapsed(level=1)) == 0
    np.testing.assert_allclose(
        np.sum(collapse.kl_hierarchical(energy, known.optimum())[1]), 0, atol=1e-12
    )


def on_the_continuum(known, scale):
    """Any m >= eta^2 instead: z_1 larger, and z_2 explains what is more."""
    energy = known.energy
    variance, prior = energy.decoder_std**2, energy.prior_std**2
    k = variance / prior * energy.beta_2 / energy.beta_1
    m = scale * variance
    c = known.ratio
    own = jnp.diag(m / c)
    encoder = jnp.diag(jnp.sqrt(m - m / c) / known.taken)
    decoder_2 = jnp.diag(jnp.sqrt(jnp.full(2, m / prior - k)))
    second = decoder_2.T @ decoder_2 + k * jnp.eye(2)
    inverse = jnp.linalg.inv(second)
    return LinearHVAE(
        LinearMap(encoder),
        LinearMap(decoder_2.T @ inverse),
        LinearMap(energy.moments.xx @ encoder.T / m),
        LinearMap(decoder_2),
        CholeskyCovariance.of(own),
        CholeskyCovariance.of(energy.beta_2 / energy.beta_1 * variance * inverse),
    )


def test_open_case_at_equality_is_a_continuum_and_below_it_unbounded():
    equal = HVAETheory(diagonal((2.2, 1.3)), 2, 2)
    for scale in (1.0, 2.0, 50.0):
        point = on_the_continuum(equal, scale)
        value = float(equal.energy(point))
        assert abs(value - float(equal.optimal_energy())) < 1e-12
        assert largest(equal.energy.differential(point)) < 1e-11
    # It is probabilistic PCA with the noise fixed at eta^2.
    likelihood = -2 * float(equal.energy.elbo(equal.optimum()))
    model = np.maximum(np.array([2.2, 1.3]) ** 2, 0.64)
    logs = np.sum(np.log(2 * np.pi * model) + np.array([2.2, 1.3]) ** 2 / model)
    assert abs(likelihood - logs) < 1e-12
    # Below equality the same path goes down with slope (beta_2 - beta_1) log m for
    # each of the two coupled modes.
    lower = diagonal((2.2, 1.3), beta_1=1.0, beta_2=0.6)
    with pytest.raises(ValueError, match="unbounded below for beta_2 < beta_1"):
        HVAETheory(lower, 2, 2)
    path = eqx.tree_at(lambda k: k.energy, equal, lower)
    values = [float(lower(on_the_continuum(path, s))) for s in (1e3, 1e4, 1e5)]
    np.testing.assert_allclose(np.diff(values), -0.8 * np.log(10), rtol=2e-3)


def run(problem, draws):
    known = problem.theory(problem.energy)
    flow = GradientFlow(problem.energy)
    return run_study(
        Study(
            GaussianLike(problem.like, 0.5, 0.3),
            Integrator(flow, stop=known.certificate, tolerance=1e-3),
            eqx.Partial(classify, flow, known),
            draws=draws,
        ),
        jr.key(5),
    )


@pytest.mark.slow
def test_random_starts_end_at_the_minimum(rng):
    problem = hvae(rng, 2, (2, 2), ("isotropic", "full"), betas=(1.0, 0.8))
    outcome = run(problem, draws=10)
    assert (names_of(KIND, outcome.finding.kind) == "global_minimum").all()


@pytest.mark.slow
@pytest.mark.parametrize("kinds, betas", KINDS)
def test_random_starts_of_every_kind_end_at_the_minimum(rng, kinds, betas):
    latents = (2, 2)
    outcome = run(hvae(rng, 3, latents, kinds, betas=betas or (1.0, 0.8)), draws=200)
    all_global(outcome)
    assert (outcome.finding.gap < 1e-8 * (1 + np.abs(outcome.solution.energy))).all()


def test_the_origin_is_a_strict_saddle_by_its_hessian():
    energy = diagonal((2.2, 1.3), covariance_1=isotropic(0.9, 2), beta_2=0.5)
    known = HVAETheory(energy, 2, 2)
    sigma_2 = CholeskyCovariance.of(1.2**2 * jnp.eye(2))
    origin = eqx.tree_at(lambda p: p.covariance_2, LinearHVAE.zeros(2, 2, 2), sigma_2)
    found = eqx.filter_jit(classify)(GradientFlow(energy), known, origin)
    assert names_of(KIND, found.kind) == "strict_saddle"
    assert names_of(RULE, found.rule) == "hessian" and int(found.index) > 0


def test_mnist_collapses_at_the_largest_theta_and_small_ones_at_one():
    energy = HierarchicalELBO(mnist(), covariance_1=jnp.eye(64))
    known = HVAETheory(energy, 64, 64)
    found = np.array([known.collapse_threshold(mode) for mode in range(64)])
    np.testing.assert_allclose(found[0], 6.1718, rtol=2e-5)
    theta = np.asarray(known.spectrum()[:64])
    assert (theta < 1).sum() > 40
    np.testing.assert_allclose(found, np.maximum(theta, 1), rtol=1e-12)
    for beta_2, left in ((1.001, theta > 1.001), (0.999, theta > 0), (6.18, theta > 7)):
        moved = HierarchicalELBO(
            energy.moments, beta_2=beta_2, covariance_1=jnp.eye(64)
        )
        count = 64 - int(HVAETheory(moved, 64, 64).collapsed())
        assert count == left.sum()


def test_bad_input(rng):
    energy = diagonal((2.2, 1.3), covariance_1=isotropic(0.9, 2))
    cases: Any = (
        ((0, 2), {}, "latent_1 must be >= 1"),
        ((2, 1.5), {}, "latent_2 must be a whole number|latent_2"),
        ((2, 2), {"rank_1": 3}, "rank_1=3 is larger than 2"),
        ((2, 1), {"rank_2": 2}, "rank_2=2 is larger than 1"),
        ((3, 2), {}, "fixed covariance_1 has shape"),
    )
    for sizes, options, text in cases:
        with pytest.raises(Exception, match=text):
            HVAETheory(energy, *sizes, **options)
    known = HVAETheory(energy, 2, 2)
    with pytest.raises(ValueError, match="mode=2 must be from 0 to 1"):
        known.collapse_threshold(2)
    with pytest.raises(ValueError, match="level must be 1"):
        known.collapsed(level=3)
    uneven = jnp.diag(jnp.array([0.5, 0.9]))
    for problem, sizes in (
        (diagonal((2.2, 1.3), covariance_1=uneven), (2, 1)),
        (diagonal((2.2, 1.3), covariance_1=uneven, covariance_2=uneven), (2, 2)),
    ):
        with pytest.raises(ValueError, match="no multiple of the identity"):
            HVAETheory(problem, *sizes)


def test_theories_under_transformations(rng):
    """A grid of beta_2 in one program; a bad value is refused when it runs."""
    sigma = isotropic(0.9, 2)

    @jax.jit
    @jax.vmap
    def least(beta_2):
        return HVAETheory(
            diagonal((2.2, 1.3), beta_2=beta_2, covariance_1=sigma), 2, 2
        ).optimal_energy()

    grid = jnp.array([0.5, 1.0, 3.0])
    single = [
        float(
            HVAETheory(
                diagonal((2.2, 1.3), beta_2=float(b), covariance_1=sigma), 2, 2
            ).optimal_energy()
        )
        for b in grid
    ]
    np.testing.assert_allclose(least(grid), single, rtol=1e-12)
