"""Geometries, one file per manifold."""

from .base import AbstractManifold as AbstractManifold
from .euclidean import Euclidean as Euclidean
from .stiefel import Stiefel as Stiefel
