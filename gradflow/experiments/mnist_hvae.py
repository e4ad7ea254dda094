r"""A linear hierarchical VAE that encodes MNIST: which dimensions of $z_2$ collapse.

With $\sigma_1 = \eta = \beta_1 = 1$, dimension i of $z_2$ collapses at
$\beta_2 = \max(\theta_i, 1)$, where $\theta_i^2$ are the eigenvalues of
$\mathbb{E}\,xx^\top$: the whole of $z_2$ at 6.1718, and all dimensions with
$\theta_i < 1$ at 1. The source prints $\theta_i$ for them, too: there nothing happens.

The leading principal directions of the images are kept. From starts without the others
the flow (and Adam) never takes them up: it is the flow on all of MNIST.

*Claims under test:* Dang, Tran, Nguyen, Ho 2023, Theorem 4 and Figures 2 and 10, as
corrected in `theory/hvae.py`.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from cyclopts import Parameter

from ..collapse import kl_hierarchical, turned
from ..datasets import mnist
from ..models.hvae import HierarchicalELBO, LinearHVAE
from ..report import Report
from ..theory.hvae import HVAETheory
from .base import whole_number
from .side_report import report
from .sides import AbstractProblem, Place, SidesConfig


CLAIM = (
    "A linear hierarchical VAE on MNIST: beside each threshold of collapse of z_2, "
    "beta_2 = max(theta_i, 1), exact flow ends with as many active dimensions as the "
    "closed form says, and with its spectra; Adam from the same start does too."
)
SOURCE = "Dang et al. 2023, Theorem 4, Figures 2 and 10"
COST = "about 5 minutes on one core for the default settings"


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Config(SidesConfig):
    """Settings: one row of the table for each side of each threshold in beta_2, and of
    each value that is printed as one and is none."""

    latents: int = 32
    "Size of each of the two latent spaces."
    modes: int = 32
    "Leading principal directions that are kept of x."
    marks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    "Modes whose thresholds are looked at; 1 is the largest."
    watched: float = 300.0
    "Flow time up to which the figure follows runs; they go on to rest."

    def __post_init__(self):
        super().__post_init__()
        # The rank of the images.
        whole_number(self, "modes", least=1, most=712)


def run(config: Config, *, progress: bool | None = None) -> Report:
    """Runs both methods and reports one row for each side."""
    return report("mnist_hvae", CLAIM, config, lambda: Images(config), progress)


class Images(AbstractProblem):
    """MNIST's images by beta_2, with as many latents on each level."""

    name = "beta_2"

    def __init__(self, config: Config):
        self.config = config
        self.moments = mnist().restrict(config.modes)
        size = config.latents
        self.like = LinearHVAE.zeros(config.modes, size, size)
        theory = self.posed(1.0)[1]
        self.theta = np.asarray(theory.spectrum())
        self.by_mode = np.array([theory.collapse_threshold(i) for i in range(size)])
        self.thresholds = np.unique(self.by_mode)

    def posed(self, value):
        size = self.config.latents
        energy = HierarchicalELBO(
            self.moments, beta_2=float(value), covariance_1=jnp.eye(size)
        )
        return energy, HVAETheory(energy, size, size)

    def places(self):
        """The thresholds, each once, and the theta that are none."""
        found: dict[float, list[int]] = {}
        for mode in self.config.marks:
            found.setdefault(float(self.by_mode[mode - 1]), []).append(mode)
        places = [
            Place(f"threshold of {_listed(modes)}", value)
            for value, modes in found.items()
        ]
        printed = [m for m in self.config.marks if self.theta[m - 1] < 1]
        return places + [
            Place(f"theta of mode {mode}, no threshold", float(self.theta[mode - 1]))
            for mode in printed
        ]

    def wanted(self, theory):
        r"""$\frac12 \log(m_i / \tau)$."""
        tau = theory.energy.beta_2 / theory.energy.beta_1
        nats = 0.5 * jnp.log(theory.second / tau)
        return np.asarray(jnp.where(theory.omega2 > 0, nats, 0.0))

    @staticmethod
    def nats(energy, point):
        return -jnp.sort(-kl_hierarchical(*turned(energy, point))[1])


def _listed(modes: list[int]) -> str:
    return ("mode " if len(modes) == 1 else "modes ") + ", ".join(map(str, modes))
