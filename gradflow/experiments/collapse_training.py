r"""How fast flow and Adam come to the closed form, collapsed or not, on synthetic data.

A VAE, a conditional one and a hierarchical one on Gaussian samples. D_MA, the mean
distance of spectra from the closed form's, is followed along both methods from the same
starts: where all latents collapse (beta, or beta_2, above every threshold), and where
some stay active.

The source's synthetic figures have settings where all latents collapse, so that a
method that only forgets its start passes. Its sizes and step sizes are not used here:
data, betas, starts and Adam's schedule are this file's own.

*Claims under test:* Dang, Tran, Nguyen, Ho 2023, Theorems 1, 3 and 4 with Figures 5, 7
and 9, as corrected in `theory/`.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from cyclopts import Parameter
from tqdm import tqdm

from ..collapse import kl, kl_hierarchical, turned
from ..initial import GaussianLike
from ..models.cvae import ConditionalELBO, LinearCVAE
from ..models.hvae import HierarchicalELBO, LinearHVAE
from ..models.vae import LinearVAE, NegativeELBO
from ..moments import Moments
from ..report import environment, Report, TRAJECTORIES
from ..study import find_device, precision
from ..theory.cvae import CVAETheory
from ..theory.hvae import HVAETheory
from ..theory.vae import VAETheory
from .base import LARGEST_COUNT, positive, RunConfig, whole_number
from .sides import Ended, flow_times, flowed, METHODS, trained, updates_seen


CLAIM = (
    "On synthetic Gaussian data exact flow and Adam come to the closed form's spectra "
    "(D_MA) from the same starts, where all latents of linear VAEs collapse and where "
    "some stay active."
)
SOURCE = "Dang et al. 2023, Theorems 1, 3 and 4, Figures 5, 7 and 9"
COST = "about 2 minutes on one core for the default settings"
FAMILIES = ("VAE", "CVAE", "HVAE")
SETTINGS = ("collapsed", "active")
# From the closed form: what the table's time is that of.
NEAR = 1e-3
# Of the figure: some spectra are roots of eigenvalues, which rounding leaves at 1e-8.
FLOOR = 1e-9


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings: one row of the table for each family, collapsed and active."""

    draws: int = 4
    "Starts per row, the same for both methods."
    batch: int = 1
    "Without effect: runs are one after the other."
    tolerance: float = 1e-7
    "The flow's stopping speed."
    rtol: float | None = None
    "The flow's tolerance per step, relative to the size of the point; 1e-6 by default."
    max_steps: int = 100_000
    "Steps per solver before the next one takes over."
    samples: int = 1000
    "Rows of data."
    dimension: int = 8
    "Of x, and of y."
    latents: int = 4
    "Size of each latent space."
    largest: float = 3.0
    "Variance of the data in its largest direction (of y given x, for the CVAE)."
    least: float = 0.1
    "In its smallest; evenly in logarithm between."
    above: float = 1.2
    "The collapsed setting, in units of the largest threshold."
    scale: float = 0.3
    "Standard deviation of the entries of a start's maps."
    watched: float = 300.0
    "Flow time up to which the figure follows runs; they go on to rest."
    updates: int = 4000
    "Steps of Adam."
    learning_rate: float = 0.02
    "Adam's first; it goes to 0 like a cosine."

    def __post_init__(self):
        super().__post_init__()
        for name in ("largest", "least", "scale", "watched", "learning_rate"):
            positive(self, name)
        for name in ("samples", "updates"):
            whole_number(self, name, least=1, most=LARGEST_COUNT)
        for name in ("dimension", "latents"):
            whole_number(self, name, least=2, most=LARGEST_COUNT)
        positive(self, "above")
        if self.above <= 1:
            raise ValueError(
                f"above={self.above} must be above 1: below it not all latents collapse"
            )
        if self.latents > self.dimension:
            raise ValueError(
                f"latents={self.latents} is more than dimension={self.dimension}: use "
                "at most as many"
            )


class Family:
    """One family on its data: energies by beta, or by beta_2 of an HVAE."""

    def __init__(self, config: Config, name: str):
        self.config, self.name = config, name
        self.moments = _moments(config, name)
        size, latent = config.dimension, config.latents
        self.like: Any = {
            "VAE": lambda: LinearVAE.zeros(size, latent),
            "CVAE": lambda: LinearCVAE.zeros(size, size, latent),
            "HVAE": lambda: LinearHVAE.zeros(size, latent, latent),
        }[name]()
        theory = self.posed(1.0)[1]
        self.thresholds = np.array(
            [theory.collapse_threshold(mode) for mode in range(latent)]
        )

    def posed(self, beta: float) -> tuple[Any, Any]:
        latent = self.config.latents
        if self.name == "VAE":
            energy = NegativeELBO(self.moments, beta=beta)
            return energy, VAETheory(energy, latent)
        if self.name == "CVAE":
            energy = ConditionalELBO(self.moments, beta=beta)
            return energy, CVAETheory(energy, latent)
        energy = HierarchicalELBO(
            self.moments, beta_2=beta, covariance_1=jnp.eye(latent)
        )
        return energy, HVAETheory(energy, latent, latent)

    def beta(self, setting: str) -> float:
        """Above all thresholds, or half way between the first two."""
        if setting == "collapsed":
            return float(self.config.above * self.thresholds[0])
        return float(np.sqrt(self.thresholds[0] * self.thresholds[1]))

    @staticmethod
    def nats(energy, point):
        if isinstance(point, LinearHVAE):
            return kl_hierarchical(*turned(energy, point))[1]
        return kl(*turned(energy, point))


def run(config: Config, *, progress: bool | None = None) -> Report:
    """Runs both methods and reports one row per family and setting."""
    device = find_device(config.device)
    began = time.perf_counter()
    # tqdm: None means off where stderr is no terminal.
    hide = None if progress is None else not progress
    with precision(config.dtype), jax.default_device(device):
        rows, panels = [], []
        with tqdm(total=6 * config.draws, unit=" starts", disable=hide) as bar:
            for name in FAMILIES:
                family = Family(config, name)
                found = {
                    setting: _ends(config, family, setting, bar) for setting in SETTINGS
                }
                rows += [_row(config, family, s, ends) for s, ends in found.items()]
                panels.append(_panel(config, name, found))
        return Report(
            "collapse_training",
            CLAIM,
            dataclasses.asdict(config),
            environment(config.dtype, device, TRAJECTORIES),
            rows,
            [],
            {"title": "Distance from the closed form (D_MA)", "panels": panels},
            {"all": time.perf_counter() - began},
        )


def _moments(config: Config, name: str) -> Moments:
    """Of samples of x, or of x and y = T x + noise."""
    size, samples = config.dimension, config.samples
    keys = jr.split(jr.fold_in(jr.key(config.seed), FAMILIES.index(name)), 3)
    deviations = jnp.sqrt(jnp.geomspace(config.largest, config.least, size))
    own = deviations[None, :] * jr.normal(keys[0], (samples, size))
    if name != "CVAE":
        return Moments.from_data(np.asarray(own))
    x = jr.normal(keys[1], (samples, size))
    y = x @ jr.normal(keys[2], (size, size)) / size**0.5 + own
    return Moments.from_data(np.asarray(x), np.asarray(y))


def _ends(config: Config, family: Family, setting: str, bar) -> dict[str, list[Ended]]:
    energy, theory = family.posed(family.beta(setting))
    init = GaussianLike(family.like, jnp.asarray(config.scale))
    ends: dict[str, list[Ended]] = {method: [] for method in METHODS}
    for draw in range(config.draws):
        start = init(jr.fold_in(jr.key(config.seed), 100 + draw))
        ends["flow"].append(flowed(family, energy, theory, start, config))
        ends["Adam"].append(trained(family, energy, theory, start, config))
        bar.update()
    return ends


def _row(config: Config, family: Family, setting: str, ends) -> dict[str, Any]:
    beta = family.beta(setting)
    wanted = int((family.thresholds > beta).sum())
    row: dict[str, Any] = {
        "family": family.name,
        "setting": setting,
        "beta": beta,
        "active in theory": wanted,
        "draws": config.draws,
        "flow: certified": sum(end.certified for end in ends["flow"]),
    }
    seen = {"flow": flow_times(config), "Adam": updates_seen(config.updates)}
    for method, runs in ends.items():
        first = np.median([_reached(seen[method], end.curve) for end in runs])
        unit = "time" if method == "flow" else "steps"
        row |= {
            f"{method}: right": sum(end.active == wanted for end in runs),
            f"{method}: D_MA": max(end.distance for end in runs),
            f"{method}: {unit} to {NEAR:g}": float(first),
        }
    return row


def _reached(at: np.ndarray, curve: np.ndarray) -> float:
    """From when on the distance stays below `NEAR`; infinite if it does not."""
    far = np.flatnonzero(~(curve < NEAR))
    after = 0 if far.size == 0 else far[-1] + 1
    return float(at[after]) if after < len(at) else np.inf


def _panel(config: Config, name: str, found: dict[str, Any]) -> dict[str, Any]:
    steps = updates_seen(config.updates)
    # Of a cosine from 1 to 0, the sum so far.
    share = steps / 2 + config.updates / (2 * np.pi) * np.sin(
        np.pi * steps / config.updates
    )
    x = {"flow": flow_times(config), "Adam": config.learning_rate * share}
    return {
        "title": name,
        "sets": [
            {
                "label": f"{method}, {setting}",
                "x": x[method],
                "runs": [np.maximum(end.curve, FLOOR) for end in ends[method]],
                "style": {"ls": "-" if method == "flow" else "--"},
            }
            for setting, ends in found.items()
            for method in METHODS
        ],
        "lines": [],
        "xlabel": "flow time; for Adam the sum of its step sizes",
        "ylabel": f"D_MA, the largest of all spectra, or {FLOOR:g}",
        "xscale": "log",
        "yscale": "log",
    }
