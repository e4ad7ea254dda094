"""The unknowns and the energies, one file per family."""

from .base import AbstractEnergy as AbstractEnergy
from .linear import (
    AbstractLinearNetwork as AbstractLinearNetwork,
    DeepLinear as DeepLinear,
    invariants as invariants,
    LinearMap as LinearMap,
    SquaredLoss as SquaredLoss,
    TiedAutoencoder as TiedAutoencoder,
)
from .low_rank import LowRank as LowRank
