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
# # When latents collapse
#
# A variational autoencoder whose latent says nothing about the data, so that
# $q(z_i \mid x) = p(z_i)$, has collapsed there. In a linear VAE with its exact ELBO one
# can say when: at the minimum latent i is active iff $\theta_i^2 > \beta\eta^2$, where
# $\theta_i^2$ are the variances of the data's modes. This notebook
#
# 1. reads thresholds and minimum off the closed form,
# 2. asks where 256 random starts end, for several $\beta$,
# 3. watches small starts learn one mode after the other, from saddle to saddle,
# 4. does the same on MNIST, where a conditional VAE draws three quadrants from the
#    fourth.
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

import gradflow as gf
from gradflow.collapse import kl
from gradflow.datasets import mnist
from gradflow.models import ConditionalELBO, LinearVAE, NegativeELBO
from gradflow.theory import CVAETheory, VAETheory


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

SMOKE = os.environ.get("GRADFLOW_SMOKE") == "1"
DRAWS = 16 if SMOKE else 256
BETAS = [0.5, 2.0] if SMOKE else [0.25, 0.5, 0.6, 0.9, 1.2, 2.0, 2.7, 3.3]

plt.rcParams.update(gf.plot.STYLE)

# %% [markdown]
# ## 1. The closed form
#
# Data with variances 3, 1.5, 0.75 and 0.375 in four random directions, and as many
# latents. Everything that the loss needs to know of the data is its second moments.

# %%
VARIANCES = jnp.array([3.0, 1.5, 0.75, 0.375])
LATENTS = 4
directions = jr.orthogonal(jr.key(0), 4)
xx = (directions * VARIANCES[None, :]) @ directions.T
moments = gf.Moments(xx, xx, xx, 1, autoencoding=True)


def posed(beta):
    energy = NegativeELBO(moments, beta=beta)
    return energy, VAETheory(energy, LATENTS, diagonal=True)


energy, theory = posed(1.0)
print("latents collapse from beta =", [
    round(float(theory.collapse_threshold(mode)), 4) for mode in range(LATENTS)
])  # fmt: skip
print("collapsed at beta = 1:", int(theory.collapsed()), "of", LATENTS)
print("least loss:", float(theory.optimal_energy()))
print("loss of the optimum given:", float(energy(theory.optimum())))

# %% [markdown]
# The thresholds are the variances (here $\eta = 1$). At the minimum an active latent
# has $\frac12 \log(\theta_i^2 / \beta\eta^2)$ nats of the data.
#
# ## 2. Where random starts end
#
# For each $\beta$, Gaussian starts, the exact flow, and a verdict: a run is certified
# if its loss is below every critical value but the least.

# %%
like = LinearVAE.zeros(4, LATENTS, covariance="diagonal")


def finding(flow, theory, solution):
    nats = jnp.sort(kl(flow.energy, solution.point))[::-1]
    return gf.classify(flow, theory, solution), nats


runs = {}
for beta in BETAS:
    energy, theory = posed(beta)
    flow = gf.GradientFlow(energy)
    study = gf.Study(
        gf.GaussianLike(like, 0.5),
        gf.Integrator(flow, tolerance=1e-6, max_steps=100_000),
        eqx.Partial(finding, flow, theory),
        draws=DRAWS,
    )
    verdict, nats = gf.run_study(study, jr.key(1)).finding
    certified = gf.fraction(verdict.kind == gf.KIND.global_minimum)
    active = int(theory.modes.active().sum())
    right = gf.fraction((nats > 1e-3).sum(axis=1) == active)
    runs[beta] = nats
    print(f"beta {beta}: {active} active in theory; certified {certified}")
    print(f"    as many active in runs: {right}")

# %%
figure, axes = plt.subplots(figsize=(4.6, 3), layout="constrained")
grid = np.geomspace(0.2, 4, 200)
for mode, variance in enumerate(np.asarray(VARIANCES)):
    ends = np.array([runs[beta][:, mode] for beta in BETAS])
    middle = np.median(ends, axis=1)
    spread = [middle - ends.min(axis=1), ends.max(axis=1) - middle]
    axes.errorbar(
        BETAS, middle, spread, fmt="o", ms=4, capsize=2, color=gf.plot.RUNS[mode],
        label=f"latent {mode + 1}",
    )  # fmt: skip
    known = 0.5 * np.log(np.maximum(variance / grid, 1))
    axes.plot(grid, known, color="black", lw=0.6, label="theory" if mode == 0 else None)
axes.set(xscale="log", xlabel="beta", ylabel="KL from the prior (nats)")
axes.set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
axes.set_xticks([], minor=True)
axes.set_title(f"median and range of {DRAWS} runs each")
axes.legend()
plt.show()

# %% [markdown]
# ## 3. The way there: saddle to saddle
#
# From small maps, a run first comes close to the collapsed point, a saddle. Each mode
# leaves it at its own rate, the largest first, so the loss goes down in steps. The thin
# lines on the left are critical values in closed form: those with the 0, 1, 2, ...
# largest modes.

# %%
energy, theory = posed(0.2)
flow = gf.GradientFlow(energy)
times = jnp.asarray(np.geomspace(0.3, 1000, 300))


@jax.jit
def followed(key):
    solution = gf.integrate(
        flow,
        gf.GaussianLike(LinearVAE.zeros(4, LATENTS), 1e-10)(key),
        times=times,
        observe={
            "loss": energy,
            "learned": lambda point: jnp.diagonal(
                theory.vectors.T @ theory.explained(point) @ theory.vectors
            ),
        },
        method="auto",
        throw=False,
    )
    return solution.history


history = followed(jr.key(2))
levels = [
    float(theory.modes.critical_value(jnp.arange(4) < count)) for count in range(5)
]
figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3), layout="constrained")
left.plot(times, history["loss"], color=gf.plot.RUNS[0])
for level in levels:
    left.axhline(level, color="black", lw=0.6, zorder=0)
left.set(xscale="log", xlabel="time", ylabel="loss")
left.set_title("loss, and critical values (thin)")
for mode in range(4):
    right.plot(
        times, history["learned"][:, mode], color=gf.plot.RUNS[mode],
        label=f"mode {mode + 1}",
    )  # fmt: skip
    goal = 1 - 0.2 / float(VARIANCES[mode])
    right.axhline(goal, color="black", lw=0.6, zorder=0)
right.set(xscale="log", xlabel="time", ylabel="share of a mode that is reconstructed")
right.set_title("modes, and where they end (thin)")
right.legend(loc="lower left", bbox_to_anchor=(0, 0.03))
plt.show()

# %% [markdown]
# ## 4. MNIST
#
# A conditional VAE draws three quadrants y of an image from the fourth, x. What the
# best linear map of x leaves of y has the covariance Cov(y given x), whose eigenvalues
# are the thresholds. The second moments of all 60 000 images come with the package.

# %%
known = CVAETheory(ConditionalELBO(mnist(task="quadrant")), 64)
marks = (1, 2, 4, 8, 16, 32, 64)
for mark in marks:
    threshold = float(known.collapse_threshold(mark - 1))
    print(f"latent {mark:2d} collapses at beta = {threshold:.5g}")

# %% [markdown]
# How much a quadrant leaves open depends on the digit: least of a 1, most of a 7. How
# many latents are active at one beta need not follow the sum: compare 6 and 7.

# %%
for digit in (1, 9, 6, 7):
    spectrum = CVAETheory(
        ConditionalELBO(mnist(digit, task="quadrant")), 16
    ).spectrum()[:16]
    print(
        f"digit {digit}: sum of the 16 leading eigenvalues {float(spectrum.sum()):.3f},"
        f" active at beta = 1: {int((spectrum > 1).sum())} of 16"
    )

# %% [markdown]
# And the flow? On the eight leading principal directions of the images (a VAE that
# starts there stays there), beside the threshold of each latent.

# %%
leading = mnist().restrict(4 if SMOKE else 8)
values = np.diagonal(leading.xx)
small = LinearVAE.zeros(len(values), len(values))


@eqx.filter_jit
def end(energy, theory, start):
    flow = gf.GradientFlow(energy)
    solution = gf.integrate(
        flow, start, tolerance=1e-6, method="auto", max_steps=100_000, throw=False
    )
    learned = theory.explained(solution.point)
    sizes = jnp.linalg.svd(learned, compute_uv=False)
    return gf.classify(flow, theory, solution).kind, sizes


hits = []
for mode, value in enumerate(values):
    for factor in (0.97, 1.03):
        energy = NegativeELBO(leading, beta=factor * float(value))
        theory = VAETheory(energy, len(values))
        kind, learned = end(energy, theory, gf.GaussianLike(small, 0.3)(jr.key(4)))
        count = int((learned > 1e-3).sum())
        wanted = len(values) - int(theory.collapsed())
        hits.append(bool(kind == gf.KIND.global_minimum) and count == wanted)
        print(f"beta = {factor} of threshold {mode + 1}: {count} active of {wanted}")
print("certified, with the right number:", gf.fraction(np.array(hits)))

# %% [markdown]
# `gradflow run mnist_cvae` does this with 64 latents, by flow and by Adam side by side;
# `gradflow run posterior_collapse` draws whole phase diagrams.
