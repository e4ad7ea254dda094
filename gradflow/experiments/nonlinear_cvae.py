r"""Which latents of a conditional VAE of perceptrons collapse, digit by digit.

One network per digit learns to draw three quadrants of an image, y, given the bottom
left one, x. A latent is ($\epsilon$, $\delta$)-collapsed if
$\mathrm{KL}(q(z_i \mid x, y) \| p(z_i)) < \epsilon$ for a share $1 - \delta$ of the
samples. Beside each digit stands the linear CVAE of the same data at its optimum.

*Claim under test:* Dang, Tran, Nguyen, Ho 2023, section 5 with figure 3: digits with
larger eigenvalues $\theta$ of $\mathrm{Cov}(y \mid x)$ collapse less. Widths, steps,
$\delta$ and the grid of $\epsilon$ are ours.

*Erratum:* the second moments of the source are not centered. A bias takes up the mean,
so to networks that have some the eigenvalues of centered moments matter: by these 7
comes before 6.
"""

import dataclasses
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from cyclopts import Parameter

from .. import collapse
from ..datasets import mnist
from ..environment import environment
from ..models.cvae import ConditionalELBO
from ..models.nonlinear import NonlinearCVAE, SampledConditionalELBO
from ..precision import find_device, precision
from ..report import Report
from ..statistics import fraction
from ..store.folder import Store
from ..theory.cvae import CVAETheory
from .base import positive, whole_number
from .samples import centered_moments, mnist_samples, quadrants
from .training import Network, train, TrainingConfig


CLAIM = (
    "Conditional VAEs of perceptrons collapse less on digits whose quadrants vary more "
    "given the first one: their order is that of the leading eigenvalues theta of "
    "Cov(y given x)."
)
SOURCE = "Dang et al. 2023, section 5 and figure 3"
COST = "about 3 minutes on one core for the default settings"
# Where shares are averaged and drawn, in nats.
EPSILONS = np.geomspace(1e-2, 10.0, 61)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """Settings: one row of the table for each digit."""

    digits: tuple[int, ...] = (1, 9, 6, 7)
    "One model for each."
    beta: float = 1.0
    "The ELBO's."
    decoder_std: float = 0.7
    "Standard deviation of pixels given the latents: with 1 hardly any is active."

    def __post_init__(self):
        super().__post_init__()
        whole_number(self, "digits", least=0, most=9)
        positive(self, "beta")
        if len(set(self.digits)) < len(self.digits):
            raise ValueError(f"digits={self.digits} has equal entries: give each once")


def run(
    config: Config, *, progress: bool | None = None, store: Store | None = None
) -> Report:
    """Trains the networks and reports one row per digit."""
    device = find_device(config.device)
    samples, name = {}, ""
    for digit in config.digits:
        name, samples[digit] = mnist_samples(config.images, digit, config.seed)
    with precision("float64"), jax.default_device(device):
        linear = {digit: _Linear(config, digit, samples[digit]) for digit in samples}
    with precision(config.dtype), jax.default_device(device):
        found, seconds = train(
            _networks(config, samples),
            config,
            data=name,
            progress=progress,
            store=store,
        )
    found = {digit: found[f"digit {digit}"] for digit in config.digits}
    return Report(
        "nonlinear_cvae",
        CLAIM,
        dataclasses.asdict(config),
        environment(config.dtype, device),
        [_row(config, digit, linear[digit], found[digit]) for digit in config.digits],
        [
            f"trained on {name}",
            *_order(linear, found, "theta", "the sum of theta"),
            *_order(linear, found, "centered", "the sum of theta of centered moments"),
        ],
        {
            "title": f"Conditional VAEs of perceptrons, {name}",
            "bands": 2,
            "panels": _panels(config, linear, found),
        },
        seconds,
    )


class _Linear:
    """What theory has to say of the linear CVAE on the same data."""

    def __init__(self, config: Config, digit: int, samples):
        self.count = len(samples)
        x, y = quadrants(samples)
        moments = centered_moments(x, y)
        self.theta, self.centered = (
            float(np.linalg.eigvalsh(known.conditional())[-config.latents :].sum())
            for known in (mnist(digit, task="quadrant"), moments)
        )
        energy = ConditionalELBO(
            moments,
            beta=config.beta,
            decoder_std=config.decoder_std,
            prior_std=config.prior_std,
        )
        theory = CVAETheory(energy, config.latents, diagonal=True)
        point = theory.optimum()
        x, y = (jnp.asarray(rows - rows.mean(axis=0), float) for rows in (x, y))
        each = collapse.kl_samples(energy, point, x, y)
        self.level = np.asarray(collapse.collapse_level(each, config.delta))
        self.nats = np.asarray(each.mean(axis=0))
        self.collapsed = int((self.level < config.epsilon).sum())


def _networks(config: Config, samples) -> dict[str, Network]:
    # Of equal sizes: what is compiled for one digit serves all.
    longest = max(len(one) for one in samples.values())
    energy = SampledConditionalELBO(config.beta, config.decoder_std, config.prior_std)
    networks = {}
    for digit, one in samples.items():
        data = tuple(_padded(part, longest) for part in quadrants(one))
        start = eqx.Partial(
            NonlinearCVAE.random, data[0].shape[1], data[1].shape[1], config.latents,
            width=config.width, depth=config.depth,
        )  # fmt: skip
        networks[f"digit {digit}"] = Network(
            start,
            eqx.Partial(_loss, energy),
            data,
            jnp.asarray(len(one)),
            eqx.Partial(_measure, energy, data, len(one), config.delta),
        )
    return networks


def _padded(rows: np.ndarray, count: int):
    return jnp.asarray(np.pad(rows, ((0, count - len(rows)), (0, 0))), float)


def _loss(energy, point, x, y, *, key):
    return -energy.elbo(point, x, y, key=key)


def _measure(energy, data, count, delta, point, key) -> dict[str, np.ndarray]:
    each, means, elbo = (np.asarray(a)[:count] for a in _seen(energy, point, data, key))
    return {
        "level": np.asarray(collapse.collapse_level(jnp.asarray(each), delta)),
        "nats": each.mean(axis=0),
        "spread": means.var(axis=0),
        "elbo": elbo.mean(),
    }


@eqx.filter_jit
def _seen(energy, point, data, key):
    """Of each sample the divergences, the means of z, and the ELBO."""

    def one(key, x, y):
        elbo = energy.elbo(point, x, y, key=key)
        return energy.kl(point, x, y), energy.code(point, x, y)[0], elbo

    return jax.vmap(one)(jr.split(key, len(data[0])), *data)


def _share(level: np.ndarray) -> np.ndarray:
    """The share of collapsed latents at each epsilon."""
    return (level[..., None, :] < EPSILONS[:, None]).mean(axis=-1)


def _row(config: Config, digit: int, linear: _Linear, found) -> dict[str, Any]:
    collapsed = (found["level"] < config.epsilon).sum(axis=1)
    active = (found["spread"] > collapse.ACTIVE).sum(axis=1)
    return {
        "digit": digit,
        "samples": linear.count,
        "sum of theta": linear.theta,
        "centered": linear.centered,
        "latents": config.latents,
        "linear: collapsed": linear.collapsed,
        "linear: share": float(_share(linear.level).mean()),
        "linear: nats": float(linear.nats.sum()),
        "networks": len(collapsed),
        "collapsed": int(np.median(collapsed)),
        "fewest": int(collapsed.min()),
        "most": int(collapsed.max()),
        "active units": int(np.median(active)),
        "share": float(_share(found["level"]).mean()),
        "nats": float(np.median(found["nats"].sum(axis=1))),
        "ELBO": float(np.median(found["elbo"])),
    }


def _order(linear, found, by: str, what: str) -> list[str]:
    """Whether digits with more theta collapse less: by the share that is collapsed,
    averaged over epsilon, and by the nats that all latents carry. Networks of the same
    number have the same initial weights."""
    digits = sorted(found, key=lambda digit: getattr(linear[digit], by))
    if len(digits) < 2:
        return []
    measures = {
        "the share of collapsed latents": lambda one: _share(one["level"]).mean(axis=1),
        "nats": lambda one: -one["nats"].sum(axis=1),
    }
    lines = []
    for measure, of in measures.items():
        falls = np.array(
            [of(found[a]) > of(found[b]) for a, b in itertools.pairwise(digits)]
        )
        whole = fraction(falls.all(axis=0))
        pairs = ", ".join(
            f"{one} before {other} in {fall.sum()} of {len(fall)}"
            for (one, other), fall in zip(
                itertools.pairwise(digits), falls, strict=True
            )
        )
        lines.append(
            f"{what} predicts the order {', '.join(map(str, digits))}; by {measure} "
            f"found for {whole.count} of {whole.draws} initial weights, 95 % interval "
            f"[{whole.low:.4f}, {whole.high:.4f}]: {pairs}"
        )
    return lines


def _panels(config: Config, linear, found) -> list[dict[str, Any]]:
    """Shares against epsilon above, the nats of each latent below."""
    places = np.arange(1, config.latents + 1)
    falling = lambda nats: np.sort(nats, axis=-1)[..., ::-1]
    shares, nats = [], []
    for digit, one in found.items():
        panel = {"line": "linear, at its optimum", "yscale": "linear"}
        shares.append(
            panel
            | {
                "title": f"digit {digit}, sum of theta {linear[digit].theta:.4g}",
                "sets": [
                    {"label": "networks", "x": EPSILONS, "runs": _share(one["level"])}
                ],
                "lines": [{"x": EPSILONS, "y": _share(linear[digit].level)}],
                "xlabel": r"$\epsilon$ (nats)",
                "ylabel": "share of collapsed latents",
                "xscale": "log",
            }
        )
        nats.append(
            panel
            | {
                "title": "mean over samples",
                "sets": [
                    {"label": "networks", "x": places, "runs": falling(one["nats"])}
                ],
                "lines": [{"x": places, "y": falling(linear[digit].nats)}],
                "xlabel": "latent, largest first",
                "ylabel": "nats",
                "xscale": "linear",
            }
        )
    return shares + nats
