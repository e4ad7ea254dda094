"""Geometries, one file per manifold."""

from .base import AbstractManifold as AbstractManifold
from .euclidean import Euclidean as Euclidean
from .fixed_rank import (
    balanced_inverse as balanced_inverse,
    balanced_inverse_factored as balanced_inverse_factored,
    balanced_operator as balanced_operator,
    balanced_operator_factored as balanced_operator_factored,
    FixedRank as FixedRank,
    tangent_projection as tangent_projection,
)
from .stiefel import Stiefel as Stiefel
