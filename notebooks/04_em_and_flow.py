# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One likelihood, by EM, by gradient flow, and in closed form
#
# A Gaussian latent-variable model says $x = \mu + Wz + \varepsilon$ with
# $z \sim N(0, I)$ and $\varepsilon \sim N(0, \Psi)$. The structure of $\Psi$ tells its
# relatives apart: isotropic is probabilistic PCA, diagonal is factor analysis, two full
# blocks are probabilistic CCA. All have one energy here, minus the average
# log-likelihood, computed from second moments. This notebook
#
# 1. lists every critical point of probabilistic PCA on real data, with its kind,
# 2. asks where 256 gradient flows and 256 runs of EM end,
# 3. follows one start by the flow, EM and accelerated EM,
# 4. does factor analysis, which has no closed form, and compares with scikit-learn.
#
# With the environment variable `GRADFLOW_SMOKE=1` it runs at small sizes, to test
# that it runs.

# %%
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_wine
from sklearn.decomposition import FactorAnalysis as TheirFactorAnalysis

import gradflow as gf
from gradflow.models import LatentGaussian, NegativeLogLikelihood
from gradflow.noise import Diagonal, Isotropic


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

SMOKE = os.environ.get("GRADFLOW_SMOKE") == "1"
DRAWS = 16 if SMOKE else 256
LATENTS = 2

plt.rcParams.update(gf.plot.STYLE)

# %% [markdown]
# ## 1. Every critical point of probabilistic PCA
#
# Data: 13 measurements of 178 wines, each scaled to variance 1. A critical point of
# full rank chooses two eigenvectors of the covariance (Tipping and Bishop 1999). Only
# the leading two are a minimum. The index counts the directions that lead down.

# %%
x = load_wine().data
x = (x - x.mean(axis=0)) / x.std(axis=0)
energy = NegativeLogLikelihood(gf.Moments.from_data(x, center=True))
theory = gf.theory.PPCATheory(energy, LATENTS)
flow = gf.GradientFlow(energy)
print("least energy", f"{float(theory.optimal_energy()):.6f}")
for modes in [(0, 1), (0, 2), (1, 2), (0,), ()]:
    verdict = gf.classify(flow, theory, theory.critical_point(modes))
    above = float(theory.critical_energy(modes) - theory.optimal_energy())
    kind = gf.names_of(gf.KIND, verdict.kind)
    print(f"modes {modes!s:7} {above:.4f} above, index {theory.index(modes)}: {kind}")


# %% [markdown]
# ## 2. Where do many starts end?
#
# Independent Gaussian loadings, half of each variance as noise. The flow stops as soon
# as its energy is below that of every saddle: no smaller gradient would say more. EM
# never raises the energy either, which is checked at each of its steps.


# %%
class Start(eqx.Module):
    """Random loadings beside half of each variance as noise."""

    noise: object

    def __call__(self, key):
        return LatentGaussian(0.5 * jr.normal(key, (13, LATENTS)), self.noise)


isotropic = Start(Isotropic.of(0.5, 13))
by_flow = gf.Study(
    isotropic,
    gf.Integrator(flow, stop=theory.certificate),
    eqx.Partial(gf.classify, flow, theory),
    draws=DRAWS,
)
found = gf.run_study(by_flow, jr.key(0)).finding
print("flow at the optimum:", gf.fraction(found.kind == gf.KIND.global_minimum))

expectation = gf.ExpectationMaximization(energy)


def below_saddles(solution):
    return theory.certificate(solution.point)


by_em = gf.Study(isotropic, gf.Iterator(expectation, 1e-8), below_saddles, draws=DRAWS)
outcome = gf.run_study(by_em, jr.key(0))
print("EM at the optimum:  ", gf.fraction(outcome.finding))
worst = float(np.max(outcome.solution.stats["increase"]))
print(f"largest rise of the energy in a step of EM: {worst:.1e}")

# %% [markdown]
# ## 3. One start, three ways
#
# Near the optimum EM is linear: it gains the same factor in each step. Squarem, which
# extrapolates and takes back what would raise the energy, needs fewer.

# %%
start = isotropic(jr.key(3))
best = float(theory.optimal_energy())
steps = jnp.arange(1.0, 61.0)
paths = {
    "EM": gf.iterate(expectation, start, times=steps, throw=False),
    "Squarem": gf.iterate(gf.Squarem(expectation), start, times=steps, throw=False),
}
times = jnp.linspace(0.05, 15.0, 150)
paths["flow"] = gf.integrate(flow, start, times=times, tolerance=1e-9, throw=False)
figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.6), sharey=True, layout="constrained")
for color, (name, solution) in zip((0, 5, 3), paths.items(), strict=True):
    gap = np.asarray(solution.history["energy"]) - best
    panel, at = (axes[1], times) if name == "flow" else (axes[0], steps)
    panel.semilogy(
        at, np.where(gap > 1e-14, gap, np.nan), label=name, color=f"C{color}"
    )
for panel, label in zip(axes, ("iterations", "flow time"), strict=True):
    saddle = float(theory.critical_energy((0, 2))) - best
    panel.axhline(saddle, color="black", lw=0.6, label="nearest saddle")
    panel.set_xlabel(label)
    panel.legend()
axes[0].set_ylabel("energy above the least")
plt.show()

# %% [markdown]
# ## 4. Factor analysis
#
# With a noise variance for each variable there is no closed form. The flow, EM and
# Squarem from the same starts, compared by value.

# %%
diagonal = Start(Diagonal.of(jnp.full(13, 0.5)))
descents = {
    "flow": gf.Integrator(flow, tolerance=1e-6),
    "EM": gf.Iterator(expectation, 1e-8),
    "Squarem": gf.Iterator(gf.Squarem(expectation), 1e-8),
}
ends = {}
for name, descent in descents.items():
    study = gf.Study(diagonal, descent, lambda solution: solution.energy, draws=DRAWS)
    ends[name] = gf.run_study(study, jr.key(1))
least = min(float(np.min(outcome.finding)) for outcome in ends.values())
for name, outcome in ends.items():
    same = outcome.finding - least <= 1e-8
    updates = int(np.median(outcome.solution.stats["velocities"]))
    print(f"{name:8}{gf.fraction(same)}, {updates} evaluations (median)")

# %% [markdown]
# What are the others? On their way to a Heywood case: a noise variance falls towards
# 0, slower and slower, and the steps run out before it is at its floor. The flow from
# the same starts goes to the optimum.

# %%
for name, outcome in ends.items():
    for draw in np.flatnonzero(outcome.finding - least > 1e-8):
        end = jax.tree.map(lambda leaf: leaf[draw], outcome.solution)  # noqa: B023
        variances = np.diagonal(end.point.noise.matrix())
        lowest = load_wine().feature_names[int(np.argmin(variances))]
        print(
            f"{name}, draw {draw}: {float(end.energy) - least:.3f} above the least, "
            f"{gf.names_of(gf.RESULTS, end.result)} after {int(end.stats['steps'])} "
            f"steps; least noise {variances.min():.1e} ({lowest})"
        )

# %% [markdown]
# A user of scikit-learn changes one line. At its default tolerance scikit-learn stops
# early; at 1e-12 both fits are the same.

# %%
ours = gf.FactorAnalysis(LATENTS).fit(x)
for tol in (1e-2, 1e-12):
    theirs = TheirFactorAnalysis(
        LATENTS, tol=tol, max_iter=100_000, svd_method="lapack"
    )
    short = ours.score(x) - theirs.fit(x).score(x)
    apart = np.abs(ours.get_covariance() - theirs.get_covariance()).max()
    print(
        f"scikit-learn, tol {tol:g}: score short by {short:.1e}, covariance {apart:.1e}"
    )
rotated = gf.FactorAnalysis(LATENTS, rotation="varimax").fit(x)
names = load_wine().feature_names
for loadings, number in zip(rotated.components_, (1, 2), strict=True):
    leading = np.argsort(-np.abs(loadings))[:4]
    listed = ", ".join(f"{names[i]} {loadings[i]:+.2f}" for i in leading)
    print(f"factor {number}: {listed}")
