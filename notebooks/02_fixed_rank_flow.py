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
# # The flow of the product, and the sign that no step may break
#
# If the factors of a deep linear network start *balanced*,
# $W_{j+1}^\top W_{j+1} = W_j W_j^\top$, their product $W = W_N \cdots W_1$ moves by
# itself:
#
# $$\dot W = -\mathcal{A}_W(\nabla L(W)), \qquad
# \mathcal{A}_W(Z) = \sum_{j=1}^N (WW^\top)^{\frac{N-j}{N}} Z\,
# (W^\top W)^{\frac{j-1}{N}},$$
#
# a Riemannian gradient flow on the matrices of the rank of $W(0)$ (Bah, Rauhut,
# Terstiege, Westdickenberg 2020). Its rank never changes in finite time, and for square
# $W$ of full rank neither does the sign of $\det W$. Numbers do not know that. This
# notebook
#
# 1. meets the operator and its metric,
# 2. integrates one flow in three coordinate systems,
# 3. follows a start of the wrong sign, exactly and by its factors,
# 4. asks where 256 starts end, and audits the usual answer,
# 5. refutes a conjecture with one matrix.
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
from gradflow.manifolds import balanced_operator, FixedRank, tangent_projection
from gradflow.models import LinearMap, LowRank, SquaredLoss


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

SMOKE = os.environ.get("GRADFLOW_SMOKE") == "1"
DRAWS = 16 if SMOKE else 256
DEPTH = 2

plt.rcParams.update(gf.plot.STYLE)

# %% [markdown]
# ## 1. The operator and its metric
#
# Data: an autoencoder whose inputs have second moments $C = \mathrm{diag}(3, 2, 1)$.
# $\mathcal{A}_W$ raises the index: for every tangent $\xi$ at $W$,
# $g_W(\mathcal{A}_W(\nabla L), \xi) = \mathrm{d}L(\xi)$.

# %%
C = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
energy = SquaredLoss(gf.Moments(C, C, C, 1, autoencoding=True))

rank_two = LowRank.of(jnp.array([[2.0, 1.0, 0.5], [0.0, 1.0, 1.0], [2.0, 2.0, 1.5]]), 2)
W = LinearMap(rank_two.matrix())
manifold = FixedRank(rank=2, depth=DEPTH)
slope = energy.differential(W)
gradient = manifold.gradient(W, slope)
xi = LinearMap(tangent_projection(W.weight, jr.normal(jr.key(0), (3, 3)), 2))
left, right = manifold.inner(W, gradient, xi), jnp.sum(slope.weight * xi.weight)
print(f"g(grad L, xi) - dL(xi) = {float(left - right):.1e}")
applied = balanced_operator(W.weight, slope.weight, DEPTH, rank=2)
print(f"gradient - A_W(dL)     = {float(jnp.abs(applied - gradient.weight).max()):.1e}")

# %% [markdown]
# ## 2. One flow, three roads
#
# The factors, the nine entries of $W$, and `LowRank`, the singular value
# decomposition with the singular values as logarithms.

# %%
roads = {
    "factors": (gf.GradientFlow(energy), rank_two.balanced(DEPTH)),
    "entries": (gf.GradientFlow(energy, manifold), W),
    "LowRank": (gf.GradientFlow(energy, manifold), rank_two),
}
times = jnp.linspace(0.1, 2.0, 20)
paths = {
    name: gf.integrate(
        flow,
        start,
        times=times,
        observe={"W": lambda point: point.matrix()},
        tolerance=1e-7,
        rtol=1e-10,
    ).history["W"]
    for name, (flow, start) in roads.items()
}
for name in ("entries", "LowRank"):
    distance = float(jnp.abs(paths[name] - paths["factors"]).max())
    print(f"factors and {name}: {distance:.1e} apart at most")

# %% [markdown]
# ## 3. A start of the wrong sign
#
# The minimum, $W = 1$, has determinant 1. This start has $\det W(0) < 0$, and the exact
# flow cannot change that: it ends at $\mathrm{diag}(1, 1, 0)$, a saddle. The least
# singular value falls for ever. `integrate` follows it on `LowRank` points; the
# factors, by the same method at the same tolerance, do not.

# %%
square = FixedRank(rank=3, depth=DEPTH)
W0 = jr.normal(jr.key(5), (3, 3))
start = LowRank.of(W0, 3)
print(f"det W(0) = {float(jnp.linalg.det(W0)):.2f}")

end = 15.0 if SMOKE else 150.0
times = jnp.linspace(0, end, 301)[1:]
exact = gf.integrate(
    gf.GradientFlow(energy, square),
    start,
    times=times,
    observe={"log": lambda point: point.log_values[-1]},
    max_steps=100_000,
)
factors = gf.integrate(
    gf.GradientFlow(energy),
    start.balanced(DEPTH),
    times=times,
    observe={
        "log": lambda network: jnp.log(
            jnp.linalg.svd(network.matrix(), compute_uv=False)[-1]
        )
    },
    audit=gf.Audit,
    max_steps=100_000,
)
last = float(exact.history["log"][-1])
print(f"t = {end:g}: least singular value e^{last:.1f}, exactly followed")
sign = jnp.linalg.det(exact.point.left) * jnp.linalg.det(exact.point.right)
print(f"sign of det W there: {float(sign):+.0f}")
broken = {name: f"{float(t):.2f}" for name, t in factors.broken.items()}
print(f"the factors break {broken}")

# %%
figure, axes = plt.subplots(figsize=(5.0, 2.6), layout="constrained")
base = np.log(10)
axes.plot(times, exact.history["log"] / base, color=gf.plot.RUNS[0], label="LowRank")
axes.plot(
    times, factors.history["log"] / base, "--", color=gf.plot.RUNS[5], label="factors"
)
# Near the saddle the third mode obeys u' = -2 u for lambda = 1 (depth 2).
steady = times > end / 3
shift = exact.history["log"][-1] + 2 * end
axes.plot(
    times[steady],
    (shift - 2 * times[steady]) / base,
    color="black",
    lw=0.6,
    label="theory",
)
axes.set_xlabel("time")
axes.set_ylabel("log10 of the\nleast singular value")
axes.legend()
plt.show()

# %% [markdown]
# ## 4. Where do 256 starts end?
#
# The verdict for the exact flow needs no long run: the sign excludes the minimum, and
# once the loss is below all other saddles' only one place is left. The factors claim
# the minimum every time; the audit marks the runs that broke an invariant of the exact
# flow on their way.

# %%
theory = gf.theory.LowRankTheory(energy, rank=3, depth=DEPTH)
flow = gf.GradientFlow(energy, square)
initialize = gf.LowRankInit((3, 3), 3, 1.0)
exact_study = gf.Study(
    initialize,
    gf.Integrator(flow, stop=theory.decided),
    eqx.Partial(gf.classify, flow, theory),
    draws=DRAWS,
)
found = gf.run_study(exact_study, jr.key(1)).finding
minimum = np.asarray(found.kind == gf.KIND.global_minimum)
saddle = np.asarray(found.kind == gf.KIND.strict_saddle)
print("global minimum:", gf.fraction(minimum))
print("strict saddle: ", gf.fraction(saddle))

# %%
plain = gf.GradientFlow(energy)
factor_study = gf.Study(
    lambda key: initialize(key).balanced(DEPTH),
    gf.Integrator(plain, stop=theory.linear.certificate, audit=gf.Audit),
    eqx.Partial(gf.classify, plain, theory.linear),
    draws=DRAWS,
)
claimed = gf.run_study(factor_study, jr.key(1)).finding
print("claimed by the factors:", gf.fraction(claimed.kind == gf.KIND.global_minimum))
print("precision limited:     ", gf.fraction(claimed.precision_limited))
assert np.array_equal(claimed.precision_limited, saddle)
first = int(np.argmax(saddle))
print(gf.describe(jax.tree.map(lambda leaf: leaf[first], found)))
print(gf.describe(jax.tree.map(lambda leaf: leaf[first], claimed)))

# %% [markdown]
# ## 5. One matrix against a conjecture
#
# Conjecture 41 (b) of the source: a balanced start with $u_i^\top W(0) u_i > 0$ for
# the leading eigenvectors, and $W(0) U_r$ of rank $r$, ends at $U_r U_r^\top$. This
# matrix of rank 2 fulfills both. Its flow never leaves the upper left block, where
# the determinant is negative.

# %%
counterexample = LowRank.of(
    jnp.array([[1.0, 3.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), 2
)
theory = gf.theory.LowRankTheory(energy, rank=2, depth=DEPTH)
print({name: bool(flag) for name, flag in theory.hypotheses(counterexample).items()})
flow = gf.GradientFlow(energy, manifold)
run = gf.integrate(flow, counterexample, times=jnp.array([60.0]), max_steps=100_000)
print(np.round(run.point.matrix(), 6))
print(f"second singular value: e^{float(run.point.log_values[1]):.1f}")
print(gf.describe(gf.classify(flow, theory, run)))
