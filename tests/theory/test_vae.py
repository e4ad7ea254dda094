"""The minimum of linear VAEs, and verdicts on points and runs."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from elbo_problems import (
    agrees,
    all_global,
    autoencoding,
    counted,
    FIXED,
    LEARNED,
    second_moment,
    spectra_agree,
    vae,
)
from jax.flatten_util import ravel_pytree

from gradflow import collapse
from gradflow.critical import classify, KIND, RULE
from gradflow.flow import GradientFlow
from gradflow.initial import GaussianLike
from gradflow.models import CholeskyCovariance, LinearMap, LinearVAE, NegativeELBO
from gradflow.solve import Integrator
from gradflow.study import run_study, Study
from gradflow.theory import VAETheory
from gradflow.types import names_of


A = np.array(
    [
        [2.0, 0.5, 0.2, 0.0],
        [0.5, 1.5, 0.3, 0.1],
        [0.2, 0.3, 0.8, 0.2],
        [0, 0.1, 0.2, 0.3],
    ]
)


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def data(matrix=A):
    return autoencoding(jnp.asarray(matrix))


@pytest.mark.parametrize(
    "kind, x, latent, rank_x, learn_decoder, hidden",
    [
        ("full", 4, 2, None, False, None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("diagonal", 3, 4, None, False, None),
                ("root", 4, 2, None, True, None),
                ("isotropic", 3, 4, 2, False, None),
                ("diagonal fixed", 4, 3, 2, True, None),
                ("general", 3, 4, None, False, None),
                ("full", 3, 3, None, False, ((1,), (4,))),
                ("isotropic", 3, 2, None, False, ((), (1, 3))),
            ]
        ),
    ],
)
def test_minimum_against_strong_minimization(
    rng, kind, x, latent, rank_x, learn_decoder, hidden
):
    with counted():
        for _ in range(3):
            problem = vae(
                rng, x, latent, kind, rank_x=rank_x, learn_decoder=learn_decoder,
                hidden=hidden,
            )  # fmt: skip
            spectra_agree(problem, *agrees(problem, rng))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*LEARNED, *FIXED])
@pytest.mark.parametrize("learn_decoder", [False, True])
@pytest.mark.parametrize("sizes", [(4, 2, None), (3, 4, None), (4, 3, 3), (2, 1, 2)])
def test_strong_minimization_of_many_problems(rng, kind, learn_decoder, sizes):
    """3 x 6 x 2 x 4 = 144 problems, but for those refused as unbounded."""
    x, latent, rank_x = sizes
    options = {"rank_x": rank_x, "learn_decoder": learn_decoder}
    with counted():
        for _ in range(3):
            problem = vae(rng, x, latent, kind, **options)
            try:
                problem.theory(problem.energy)
            except ValueError as refusal:
                assert learn_decoder and "unbounded below" in str(refusal)
                assert min(latent, x) >= (rank_x or x)
                continue
            spectra_agree(problem, *agrees(problem, rng))


def test_worked_example():
    """Checked by L-BFGS and BFGS of another implementation, in all digits."""
    numbers: Any = dict(beta=0.7, decoder_std=0.8, prior_std=1.2)
    two = VAETheory(NegativeELBO(data(), **numbers), 2)
    five = VAETheory(NegativeELBO(data(), **numbers), 5)
    close = lambda found, wanted: np.testing.assert_allclose(found, wanted, atol=1e-12)
    close(two.optimal_energy(), 5.687476701164873)
    close(five.optimal_energy(), 6.9177058895146)
    close(two.spectra()["decoder"], [1.1590040038387035, 0.7472142414715166])
    close(two.spectra()["encoder"], [1.0812988444906104, 0.9616267150295748])
    close(two.spectra()["covariance"], [0.27079280890327057, 0.515274060941429])
    close(two.explained(two.optimum())[0, 0], 0.7535035912333883)
    assert int(two.collapsed()) == 0 and int(five.collapsed()) == 2
    for stds, least in (
        ([0.6, 0.6], 5.723580789842563),
        ([0.5, 1.3, 0.9, 0.2, 0.8], 7.598008849964415),
    ):
        sigma = jnp.diag(jnp.asarray(stds) ** 2)
        energy = NegativeELBO(data(), covariance=sigma, **numbers)
        close(VAETheory(energy, len(stds)).optimal_energy(), least)
    divergences = collapse.kl(two.energy, two.optimum())
    close(2 * divergences, [1.6710444068945958, 1.0276994762838982])
    free = VAETheory(NegativeELBO(data(), decoder_std=None), 2)
    close(free.optimal_energy(), 5.636655172535617)
    close(free.modes.decoder_variance(), 0.4828340294281601)


@pytest.mark.parametrize("diagonal", [False, True])
def test_with_a_learned_decoder_it_is_probabilistic_pca(diagonal):
    """beta = 1: the ELBO is the likelihood at its maximum (Tipping and Bishop 1999)."""
    values, vectors = np.linalg.eigh(A)
    values, vectors = values[::-1], vectors[:, ::-1]
    for latent in (1, 2, 3):
        energy = NegativeELBO(data(), decoder_std=None, prior_std=1.3)
        known = VAETheory(energy, latent, diagonal=diagonal)
        noise = values[latent:].mean()
        logs = np.log(values[:latent]).sum() + (4 - latent) * np.log(noise)
        likelihood = -0.5 * (4 * np.log(2 * np.pi) + logs + 4)
        optimum = known.optimum()
        assert abs(float(energy.elbo(optimum)) - likelihood) < 1e-9
        decoder = np.asarray(optimum.decoder.matrix()) * 1.3
        wanted = (vectors[:, :latent] * (values[:latent] - noise)) @ vectors[
            :, :latent
        ].T
        np.testing.assert_allclose(decoder @ decoder.T, wanted, atol=1e-9)
        np.testing.assert_allclose(known.modes.decoder_variance(), noise, rtol=1e-12)


def test_everything_collapses_from_the_first_threshold_on():
    for factor, count in ((1.001, 3), (0.999, 2)):
        threshold = VAETheory(NegativeELBO(data()), 3).collapse_threshold(0)
        energy = NegativeELBO(data(), beta=factor * threshold)
        known = VAETheory(energy, 3)
        assert int(known.collapsed()) == count
        assert np.sum(known.active(known.optimum())) == 3 - count
        divergence = np.asarray(collapse.kl(energy, known.optimum()))
        assert (divergence > 1e-12).sum() == 3 - count


def planted(known, chosen):
    """The critical point that has taken up these modes, of unit-covariance latents."""
    energy = known.energy
    variance, prior = energy.decoder_std**2, energy.prior_std**2
    penalty = energy.beta * variance / prior
    vectors = np.asarray(known.vectors)[:, chosen]
    omega2 = (np.asarray(known.spectrum())[chosen] - energy.beta * variance) / prior
    latent = known.modes.latent
    decoder = np.zeros((len(vectors), latent))
    decoder[:, : len(chosen)] = vectors * np.sqrt(omega2)
    decoder = jnp.asarray(decoder)
    inverse = jnp.linalg.inv(decoder.T @ decoder + penalty * jnp.eye(latent))
    return LinearVAE(
        LinearMap(inverse @ decoder.T),
        LinearMap(decoder),
        CholeskyCovariance.of(energy.beta * variance * inverse),
    )


def test_verdicts_at_every_critical_point_and_beside_them(rng):
    """Saddles by their Hessian, the minimum by its value; nothing is claimed of points
    that are merely close. Rotations of the latents do not disturb any of it."""
    energy = NegativeELBO(data(), beta=0.5, decoder_std=0.7)
    known = VAETheory(energy, 2)
    judge = eqx.filter_jit(lambda at: classify(GradientFlow(energy), known, at))
    for chosen in ([], [0], [1], [2], [0, 1], [0, 2], [1, 2]):
        point = planted(known, chosen)
        found = judge(point)
        best = chosen == [0, 1]
        kind = names_of(KIND, found.kind)
        assert kind == ("global_minimum" if best else "strict_saddle")
        rule = "loss_certificate" if best else "hessian"
        assert names_of(RULE, found.rule) == rule
        assert np.flatnonzero(found.active).tolist() == chosen
        assert abs(float(found.value_gap)) < 1e-12
        beside = GaussianLike(jax.tree.map(jnp.asarray, point), 1.0)(jr.key(0))
        moved = jax.tree.map(lambda a, b: a + 1e-7 * b, point, beside)
        expected = ("global_minimum",) if best else ("unresolved",)
        assert names_of(KIND, judge(moved).kind) in expected


@pytest.mark.slow
def test_no_critical_value_lies_below_the_certificate(rng):
    """Critical points that Newton's method finds from anywhere, for each kind."""
    from scipy.optimize import root

    for kind in ("full", "diagonal", "general"):
        problem = vae(rng, 3, 2, kind)
        known = problem.theory(problem.energy)
        flat, rebuild = ravel_pytree(problem.like)
        slope = jax.jit(jax.grad(lambda v: problem.energy(rebuild(v))))  # noqa: B023
        hessian = jax.jit(jax.jacfwd(slope))
        values = []
        for _ in range(40):
            end = root(slope, rng.normal(size=flat.size), jac=hessian, method="lm")
            if np.abs(slope(end.x)).max() < 1e-9:
                values.append(float(problem.energy(rebuild(jnp.asarray(end.x)))))
        gaps = np.array(values) - float(known.optimal_energy())
        assert len(gaps) > 10 and gaps.min() > -1e-9
        above = gaps[gaps > 1e-8]
        assert above.size == 0 or above.min() > 0.999999 * float(known.gap)


def study(problem, draws, max_steps=20_000):
    known = problem.theory(problem.energy)
    flow = GradientFlow(problem.energy)
    return known, run_study(
        Study(
            GaussianLike(problem.like, 0.5, 0.3),
            Integrator(flow, stop=known.certificate, max_steps=max_steps),
            eqx.Partial(classify, flow, known),
            draws=draws,
        ),
        jr.key(3),
    )


def all_certified(problem, draws):
    known, outcome = study(problem, draws)
    all_global(outcome)
    assert (outcome.finding.gap < float(known.certificate.level - known.least)).all()


@pytest.mark.slow
def test_random_starts_end_at_the_minimum(rng):
    all_certified(vae(rng, 4, 3, "full"), draws=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, options",
    [
        *((kind, {}) for kind in (*LEARNED, *FIXED)),
        ("full", {"learn_decoder": True}),
        ("full", {"hidden": ((3,), (4,))}),
    ],
)
def test_random_starts_of_every_kind_end_at_the_minimum(rng, kind, options):
    latent = 2 if "learn_decoder" in options else 3
    all_certified(vae(rng, 4, latent, kind, **options), draws=200)


@pytest.mark.slow
def test_kl_crosses_zero_at_the_thresholds_of_a_flow(rng):
    """Just below and above each threshold the flow itself has as many active latents
    as the theory says."""
    moments = autoencoding(second_moment(rng, [2.0, 1.0], 2))
    energy = NegativeELBO(moments)
    for mode in range(2):
        threshold = VAETheory(energy, 2).collapse_threshold(mode)
        for factor in (0.9, 1.1):
            moved = NegativeELBO(moments, beta=factor * threshold)
            known = VAETheory(moved, 2)
            run = Integrator(GradientFlow(moved), tolerance=1e-7)
            end = run(GaussianLike(LinearVAE.zeros(2, 2), 0.3)(jr.key(0))).point
            found = np.asarray(collapse.spectra(moved, end)["encoder"]) ** 2 > 1e-3
            assert found.sum() == mode + (factor < 1) == 2 - int(known.collapsed())


def test_bad_input():
    energy = NegativeELBO(data())
    cases: Any = (
        ({"latent": 0}, "latent must be >= 1, got 0"),
        ({"latent": True}, "latent must be a whole number"),
        ({"latent": 2, "rank": 3}, "rank=3 is larger than latent=2"),
        ({"latent": 2, "rank": 0}, "rank must be >= 1"),
    )
    for options, text in cases:
        with pytest.raises(Exception, match=text):
            VAETheory(energy, **options)
    fixed = NegativeELBO(data(), covariance=jnp.eye(3))
    with pytest.raises(ValueError, match="give latent=3"):
        VAETheory(fixed, 2)
    free = NegativeELBO(data(), decoder_std=None)
    with pytest.raises(ValueError, match="unbounded below: 4 latents can explain"):
        VAETheory(free, 4)
    with pytest.raises(ValueError, match="mode=7 must be from 0 to 3"):
        VAETheory(energy, 2).collapse_threshold(7)
