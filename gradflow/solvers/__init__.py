"""What diffrax lacks for gradient flows, as diffrax objects."""

from .chebyshev import RKC2 as RKC2
from .rank_preserving import RankPreserving as RankPreserving
from .step_control import NormwiseStepSize as NormwiseStepSize
from .stiff import stiff as stiff
