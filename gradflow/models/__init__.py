"""The unknowns and the energies, one file per family."""

from ..noise import (
    AbstractNoise as AbstractNoise,
    Block as Block,
    Diagonal as Diagonal,
    Full as Full,
    Isotropic as Isotropic,
)
from .base import (
    AbstractEnergy as AbstractEnergy,
    AbstractLatentEnergy as AbstractLatentEnergy,
)
from .cvae import ConditionalELBO as ConditionalELBO, LinearCVAE as LinearCVAE
from .factor import (
    battery_pattern as battery_pattern,
    LatentGaussian as LatentGaussian,
    NegativeLogLikelihood as NegativeLogLikelihood,
)
from .hvae import HierarchicalELBO as HierarchicalELBO, LinearHVAE as LinearHVAE
from .linear import (
    AbstractLinearNetwork as AbstractLinearNetwork,
    DeepLinear as DeepLinear,
    invariants as invariants,
    LinearMap as LinearMap,
    SquaredLoss as SquaredLoss,
    TiedAutoencoder as TiedAutoencoder,
)
from .low_rank import LowRank as LowRank
from .nonlinear import (
    NonlinearCVAE as NonlinearCVAE,
    NonlinearHVAE as NonlinearHVAE,
    SampledConditionalELBO as SampledConditionalELBO,
    SampledHierarchicalELBO as SampledHierarchicalELBO,
)
from .vae import (
    AbstractCovariance as AbstractCovariance,
    CholeskyCovariance as CholeskyCovariance,
    DiagonalCovariance as DiagonalCovariance,
    LinearVAE as LinearVAE,
    NegativeELBO as NegativeELBO,
    RootCovariance as RootCovariance,
)
