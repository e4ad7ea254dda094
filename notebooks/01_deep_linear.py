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
# # Where does gradient flow go? A deep linear network on real data
#
# A deep linear network maps $x$ to $W x$ with $W = W_N \cdots W_1$. Gradient flow
# $\dot W_j = -\nabla_{W_j} E$ descends the squared loss
# $E = \frac{1}{2n} \|Y - W_N \cdots W_1 X\|_F^2$. Every critical value of $E$ is known
# in closed form (Bah, Rauhut, Terstiege, Westdickenberg 2020), so one can say *which*
# critical point a run is near, and when it is certain where the run will end.
#
# This notebook goes once through the whole way:
#
# 1. data to second moments,
# 2. moments to the closed form: spectrum, critical values, index sets,
# 3. one run, compared with the closed form while it happens,
# 4. verdicts: what kind of place is this point, and by which rule,
# 5. why a small gradient is not a verdict,
# 6. 256 runs, and what fraction of them ended where.
#
# With the environment variable `GRADFLOW_SMOKE=1` it runs at small sizes, to test
# that it runs.

# %%
import os
from importlib.metadata import version

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf


# Plateaus and saddles are about small differences: float64 throughout.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

SMOKE = os.environ.get("GRADFLOW_SMOKE") == "1"
DRAWS = 8 if SMOKE else 256
OBSERVATIONS = 100 if SMOKE else 600
# Standard deviation of the entries of a small start, and of a tiny one.
SMALL, TINY = 1e-3, 4e-5

plt.rcParams.update(gf.plot.STYLE)
plt.rcParams.update({"figure.dpi": 110})
for package in ("gradflow", "jax", "diffrax", "equinox"):
    print(package, version(package))

# %% [markdown]
# ## 1. Data enter through their second moments
#
# The loss depends on the data only through $XX^\top/n$, $XY^\top/n$ and $YY^\top/n$.
# The exact moments of the 60 000 MNIST training images come with the package. Here the
# task is autoencoding, $Y = X$. Some pixels are 0 in every image, so the second moment
# of all pixels is singular and the theory, which needs it invertible, does not apply;
# we keep the 16 leading principal directions.

# %%
images = gf.datasets.mnist()
moments = images.restrict(16)
share = float(jnp.trace(moments.xx) / jnp.trace(images.xx))
print(f"images           {images.count}")
constant = int(jnp.sum(jnp.diagonal(images.xx) == 0))
print(f"pixels           {len(images.xx)}, of which {constant} always 0")
print(f"directions kept  {len(moments.xx)}, {share:.1%} of the trace of xx")
print(f"condition number {moments.condition_number():.1f} after the restriction")

# %% [markdown]
# For your own data: `gf.Moments.from_data(x, y)`, with samples as rows.
#
# ## 2. The closed form
#
# Let $Q = YX^\top (XX^\top)^{-1/2}$ (with moments in place of the data) have singular
# values $\sigma_1 \ge \sigma_2 \ge \dots$, one per *mode*. The critical values of $E$
# are
#
# $$E_J = \tfrac12 \Big(\mathrm{tr}\,YY^\top/n - \sum_{j \in J} \sigma_j^2\Big),$$
#
# one for each set $J$ of at most $r$ modes, $r$ the narrowest width: at such a point
# the network has learned exactly the modes in $J$. The least value has
# $J = \{1, \dots, r\}$. (In code, modes are counted from 0.)

# %%
energy = gf.models.SquaredLoss(moments)
theory = gf.theory.LinearTheory(energy, rank=4)
values = theory.critical_values()
print("sigma     ", np.array2string(np.asarray(theory.spectrum()[:8]), precision=3))
print(f"index sets {len(theory.index_sets())}, distinct critical values {len(values)}")
print(f"least      {values[0]:.6f}")
print(f"second     {values[1]:.6f}")
print(f"largest    {values[-1]:.6f}")

# %% [markdown]
# The second smallest critical value is what makes certainty possible. The exact flow
# never increases the loss, and (for invertible `xx`) it converges to a critical point.
# So **once the loss is below the second smallest critical value, the limit is a global
# minimizer**. This is `theory.certificate`; it costs one evaluation of the loss.
#
# We take a network of depth 3 and narrowest width 4. Any critical point of the closed
# form can be written as factors of that shape: here is the one that has learned modes
# 0 and 2 but not 1.

# %%
widths = gf.section7_widths(16, depth=3, rank=4)
flow = gf.GradientFlow(energy)
skipping = theory.lift((0, 2), widths)
print(f"widths                  {widths}")
print(f"loss of the lift        {float(energy(skipping)):.12f}")
print(f"closed form             {float(theory.critical_energy((0, 2))):.12f}")
print(f"speed of the flow there {float(flow.speed(skipping)):.1e}")
print(f"negative eigenvalues    {theory.index((0, 2), depth=3)} by the closed form")

# %% [markdown]
# ## 3. One run
#
# A start with small independent Gaussian entries, run until the certificate holds.

# %%
start = gf.GaussianInit(widths, SMALL)(jr.key(0))
run = gf.integrate(flow, start, stop=theory.certificate)
result = gf.names_of(gf.RESULTS, run.result)
print(f"ended as  {result} at time {float(run.time):.2f}")
print(f"steps     {int(run.stats['steps'])}, rtol {float(run.stats['rtol']):.0e}")
print(f"loss      {float(run.energy):.6f}, threshold {float(theory.threshold()):.6f}")

# %% [markdown]
# From that point on the limit of the exact flow is certain, but the run is not there
# yet. (Up to that point the computed run follows the exact one to the solver's
# tolerance per step, `rtol`.) To watch it, we run again, further, and name what to
# observe. Besides the loss:
#
# - the singular values of $W(t)\,(XX^\top/n)^{1/2}$, which at a critical point are the
#   $\sigma_j$ of the learned modes and 0 (when autoencoding, those of $W$ itself all
#   tend to 1 and say less);
# - the matrices $W_{j+1}^\top W_{j+1} - W_j W_j^\top$, which the exact flow conserves.

# %%
times = jnp.linspace(0.0, 1.4 * float(run.time), OBSERVATIONS)
observe = {
    "loss": energy,
    "speed": flow.speed,
    "singular": lambda network: jnp.linalg.svd(
        network.matrix() @ theory.root, compute_uv=False
    )[:4],
    "invariants": gf.models.invariants,
}
watched = gf.integrate(flow, start, times=times, observe=observe)
t = np.asarray(watched.times)
loss = np.asarray(watched.history["loss"])
speed = np.asarray(watched.history["speed"])
singular = np.asarray(watched.history["singular"])

chain = [float(theory.critical_energy(range(k))) for k in range(5)]
nearby = 0.01 * (chain[0] - chain[-1])
print("modes learned  critical value  closest loss  time within 1 % of the whole drop")
for k, value in enumerate(chain):
    gap = np.abs(loss - value)
    spent = float(np.mean(gap < nearby) * t[-1])
    print(f"{k:13d}  {value:14.5f}  {loss[gap.argmin()]:12.5f}  {spent:10.1f}")

# The invariants, at each time, against those of the start.
drift = [
    np.linalg.norm(matrices - matrices[0], axis=(1, 2))
    for matrices in map(np.asarray, watched.history["invariants"])
]
size = [np.linalg.norm(m[0]) for m in map(np.asarray, watched.history["invariants"])]
imbalance = [
    np.linalg.norm(m, axis=(1, 2))
    for m in map(np.asarray, watched.history["invariants"])
]
for j in range(2):
    print(
        f"invariant {j + 1}: norm {size[j]:.3e}, "
        f"largest change along the run {drift[j].max():.1e}"
    )

# %% [markdown]
# This run learns one mode after the other and its loss falls in steps. Thin black lines
# are the closed form, colors are measured.

# %%
figure, (top, middle, bottom) = plt.subplots(
    3, 1, figsize=(5.6, 6.4), sharex=True, layout="constrained", height_ratios=[3, 3, 2]
)
for k, value in enumerate(chain):
    top.axhline(value, color="black", lw=0.7, zorder=0)
    label = "$E_\\emptyset$" if k == 0 else f"$E_{{1..{k}}}$" if k > 1 else "$E_{1}$"
    top.text(1.01, value, label, va="center", transform=top.get_yaxis_transform())
top.axvline(float(run.time), color=gf.plot.RUNS[5], lw=1, ls=":")
top.text(float(run.time), 20, " certified", color=gf.plot.RUNS[5])
top.plot(t, loss, color=gf.plot.RUNS[0], lw=1.5)
top.set_yscale("log")
top.set_yticks([10, 20, 30], ["10", "20", "30"])
top.minorticks_off()
top.set_ylabel("loss")

for j, sigma in enumerate(np.asarray(theory.spectrum()[:4])):
    middle.axhline(sigma, color="black", lw=0.7, ls="--", zorder=0)
    middle.plot(
        t, singular[:, j], color=gf.plot.RUNS[j], lw=1.5, label=f"number {j + 1}"
    )
middle.set_yscale("log")
middle.set_ylim(0.5, 9)
middle.set_yticks([1, 2, 6], ["1", "2", "6"])
middle.minorticks_off()
middle.set_ylabel("singular values of\n$W(t)\\,(XX^\\top/n)^{1/2}$")
middle.legend(loc="lower right", fontsize=7)

for j in range(2):
    color, label = gf.plot.RUNS[j], f"layers {j + 1}, {j + 2}"
    bottom.axhline(size[j], color="black", lw=0.7, zorder=0)
    bottom.plot(t, imbalance[j], color=color, lw=1.5, label=label)
bottom.set_ylim(0, 1.4 * max(size))
bottom.set_ylabel("norm of the\nconserved matrix")
bottom.set_xlabel("time")
bottom.legend(loc="lower left", fontsize=7, ncols=2)
figure.align_ylabels()

# %% [markdown]
# ## 4. Verdicts
#
# `gf.classify` says what kind of place a point is **and by which rule**; a small speed
# is never a rule. First four points of the run above: the start, the slowest observed
# moment before the certificate held (a plateau), the moment the certificate held, and
# the point where the speed is at most 1e-6.
#
# `gap` is the loss above the least, and the active modes are those of the nearest
# critical point. The certificate says where the flow goes, not where the point is: look
# at the active modes when it first holds and when the run is at rest.

# %%
# Compiled once: eagerly each verdict costs about a second.
classify = eqx.filter_jit(gf.classify)


def report(name, point):
    finding = classify(flow, theory, point)
    print(f"{name}:\n    {gf.describe(finding)}\n    active modes {modes(finding)}")


def modes(finding):
    return tuple(int(j) for j in np.flatnonzero(finding.active))


# From the first tenth of the way, so that the slow beginning is not the answer.
between = (t > 0.1 * float(run.time)) & (t < float(run.time))
slowest = t[np.where(between, speed, np.inf).argmin()]
plateau = gf.integrate(flow, start, horizon=float(slowest)).point
end = gf.integrate(flow, start).point
report("start", start)
report(f"slowest, at time {slowest:.1f}", plateau)
report("certificate", run.point)
report("at rest", end)

# %% [markdown]
# Now points that *are* critical, planted by the closed form. The second-order criterion
# (Achour, Malgouyres, Gerchinovitz 2021) tells saddles with a direction of negative
# curvature from those without: exchanging a learned mode for a stronger one is such a
# direction; at depth 3 or more, putting units that are all zero to use is not.
#
# The last point is the second saddle moved by 1e-10. Its loss is that of the saddle to
# rounding; but it is not the saddle, and the flow from here may well leave. The verdict
# stays open, with the predicted time to leave.

# %%
idle = theory.lift((0, 1), widths)
moved = gf.NearPoint(idle, 1e-10)(jr.key(1))
report("modes 0 and 2", skipping)
report("modes 0 and 1, the others idle", idle)
report("the same, moved by 1e-10", moved)

# %% [markdown]
# ## 5. A small gradient is not a verdict
#
# At depth 3 the gradient near the origin falls with the square of the distance, so a
# tiny start is slower than a tolerance of 1e-6 before it has learned anything. Two
# usual stopping rules, the speed itself and diffrax's steady-state event, end at once.

# %%
tiny = gf.GaussianInit(widths, TINY)(jr.key(0))
by_speed = gf.integrate(flow, tiny)
by_event = diffrax.diffeqsolve(
    diffrax.ODETerm(lambda t, point, args: flow.velocity(point)),
    diffrax.Tsit5(),
    t0=0.0,
    t1=1e6,
    dt0=None,
    y0=tiny,
    stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-9),
    event=diffrax.Event(diffrax.steady_state_event(rtol=1e-6, atol=1e-6)),
    saveat=diffrax.SaveAt(t1=True),
)
stopped = jax.tree.map(lambda leaf: leaf[-1], by_event.ys)
print(f"speed at the start         {float(flow.speed(tiny)):.1e}, tolerance 1e-6")
print(f"at one {SMALL / TINY:g} times larger     {float(flow.speed(start)):.1e}")
print(
    f"speed rule                 {gf.names_of(gf.RESULTS, by_speed.result)} "
    f"after {int(by_speed.stats['steps'])} steps, at time {float(by_speed.time):g}"
)
event_hit = by_event.result == diffrax.RESULTS.event_occurred
print(
    f"steady state event         {'occurred' if event_hit else 'did not occur'} "
    f"after {int(by_event.stats['num_steps'])} steps"
)
print(f"loss where it ended        {float(energy(stopped)):.4f}")
print(f"least loss                 {float(theory.optimal_energy()):.4f}")
report("verdict on the tiny start", tiny)

# %% [markdown]
# The verdict is open and carries a prediction of the time to leave. To test it we run
# on, without a stopping rule. At depth 3 a start smaller by a factor takes longer by
# about that factor, which tells how far to go.

# %%
ratio = SMALL / TINY
latest = (0.1 if SMOKE else 1.1) * ratio * float(run.time)
tiny_times = jnp.geomspace(1e-3, 1.0, OBSERVATIONS) * latest
slow = gf.integrate(
    flow,
    tiny,
    times=tiny_times,
    observe=observe,
    max_steps=1_000_000,
)
slow_t = np.asarray(slow.times)
slow_loss = np.asarray(slow.history["loss"])
slow_speed = np.asarray(slow.history["speed"])


def first_time(condition):
    return slow_t[condition.argmax()] if condition.any() else np.nan


leaves = first_time(slow_loss < 0.5 * (chain[0] + chain[1]))
certain = first_time(slow_loss < float(theory.threshold()))
predicted = float(classify(flow, theory, tiny).remaining)
print(f"half of the first drop at time    {leaves:.0f}, predicted {predicted:.0f}")
print(f"measured / predicted              {leaves / predicted:.2f}")
print(f"certificate holds from time       {certain:.0f}")
print(f"{ratio:g} times that of the first run    {ratio * float(run.time):.0f}")
print(f"end: {gf.describe(classify(flow, theory, slow.point))}")
print("\nstretches with speed below 1e-6, in each of which the speed rule is met:")
below = np.flatnonzero(slow_speed < 1e-6)
for part in np.split(below, np.flatnonzero(np.diff(below) > 1) + 1):
    if len(part) > 1:
        middle = slow_loss[part[len(part) // 2]]
        print(
            f"time {slow_t[part[0]]:6.0f} to {slow_t[part[-1]]:6.0f}: "
            f"loss {middle:8.4f}, {middle - chain[-1]:8.4f} above the least"
        )

# %%
figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(5.6, 3.8), sharex=True, layout="constrained"
)
for value in chain:
    top.axhline(value, color="black", lw=0.7, zorder=0)
top.plot(slow_t, slow_loss, color=gf.plot.RUNS[0], lw=1.5)
top.axvline(predicted, color="black", lw=0.7, ls=":")
top.text(predicted, 20, "predicted ", ha="right")
top.set_yscale("log")
top.set_yticks([10, 20, 30], ["10", "20", "30"])
top.minorticks_off()
top.set_ylabel("loss")
bottom.plot(slow_t, slow_speed, color=gf.plot.RUNS[1], lw=1.5)
bottom.axhline(1e-6, color="black", lw=0.7, ls="--", zorder=0)
bottom.text(1.01, 1e-6, "1e-6", va="center", transform=bottom.get_yaxis_transform())
bottom.set_xscale("log")
bottom.set_yscale("log")
bottom.set_ylabel("speed")
bottom.set_xlabel("time")
figure.align_ylabels()

# %% [markdown]
# ## 6. Many draws
#
# A `Study` composes three functions over many draws: *initialize*, *descend*,
# *inspect*. Draw $i$ depends on the key and $i$ only. Two studies stop at the
# certificate; the third starts tiny and stops by the speed rule.


# %%
def study(scale, **stop):
    return gf.Study(
        gf.GaussianInit(widths, jnp.asarray(scale)),
        eqx.Partial(gf.integrate, flow, throw=False, **stop),
        eqx.Partial(gf.classify, flow, theory),
        draws=DRAWS,
    )


def tally(names):
    found, numbers = np.unique(names, return_counts=True)
    return ", ".join(f"{n} {name}" for name, n in zip(found, numbers, strict=True))


cases = {
    "scale 0.3,\nstop: certificate": study(0.3, stop=theory.certificate),
    "scale 0.03,\nstop: certificate": study(0.03, stop=theory.certificate),
    f"scale {TINY:g},\nstop: speed 1e-6": study(TINY),
}
outcomes, counts = {}, {}
for number, (name, case) in enumerate(cases.items()):
    outcome = gf.run_study(case, jr.fold_in(jr.key(0), number))
    kinds = gf.names_of(gf.KIND, outcome.finding.kind)
    ended = gf.names_of(gf.RESULTS, outcome.solution.result)
    open_ = (kinds == "unresolved") | (kinds == "not_critical")
    outcomes[name] = outcome
    counts[name] = gf.fraction(kinds == "global_minimum", open_)
    print(name.replace("\n", " "))
    print(f"    ended as       {tally(ended)}")
    print(f"    verdicts       {tally(kinds)}")
    print(f"    global minimum {counts[name]}")

# %% [markdown]
# The intervals are exact (Clopper-Pearson) 95 % intervals for the probability. A finite
# study does not show "almost surely"; it bounds how often something else may happen.
# Undecided draws stay in the denominator, and the outer interval allows for them to go
# either way: where the speed rule stopped all draws at the start, it is everything.

# %%
figure, (left, right) = plt.subplots(
    1, 2, figsize=(7.2, 2.3), layout="constrained", width_ratios=[3, 2]
)
for place, share in zip((2, 1, 0), counts.values(), strict=True):
    parts = {
        "global minimum": share.count,
        "undecided": share.undecided,
        "saddle": share.draws - share.count - share.undecided,
    }
    edge = 0.0
    for part, number in parts.items():
        color = gf.plot.COLORS[part]
        label = part if place == 2 else None
        left.barh(place, number / share.draws, 0.5, edge, color=color, label=label)
        edge += number / share.draws
    spread = [[share.estimate - share.low], [share.high - share.estimate]]
    left.errorbar(share.estimate, place, xerr=spread, color="black", capsize=3, lw=1)
    note = f"{share.count} of {share.draws}"
    note += f",\n{share.undecided} undecided" if share.undecided else ""
    left.text(1.02, place, note, va="center")
left.set_yticks((2, 1, 0), list(cases))
left.set_xlim(0, 1)
left.set_xlabel("fraction of draws; 95 % interval of the global fraction")
left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=7)
for name, color in zip(list(cases)[:2], gf.plot.RUNS, strict=False):
    ends = outcomes[name].solution.time
    bins = np.geomspace(1, 30, 24)
    label = name.split(",")[0]
    right.hist(ends, bins=bins, color=color, alpha=0.7, label=label)
right.set_xscale("log")
right.set_xlabel("time to the certificate")
right.set_ylabel("draws")
right.legend(fontsize=7)
figure.align_xlabels()

# %% [markdown]
# ## Your turn
#
# - Your data: `gf.Moments.from_data(x, y)`; restrict them if `xx` is singular.
# - Another shape: any `widths` whose ends fit the data, with `rank=min(widths)` in the
#   theory.
# - Another start: any callable from a key to a network, such as `gf.BalancedInit`.
# - The same study from the command line, with figures: `gradflow run convergence`.
