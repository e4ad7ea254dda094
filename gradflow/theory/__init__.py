"""What is known in closed form, one file per family, named as in `models`."""

from . import dynamics as dynamics, oja as oja, rates as rates
from .base import AbstractTheory as AbstractTheory, Limit as Limit, Match as Match
from .cvae import CVAETheory as CVAETheory
from .factor import battery_optimum as battery_optimum, theory_of as theory_of
from .hvae import HVAETheory as HVAETheory
from .linear import LinearTheory as LinearTheory
from .low_rank import LowRankTheory as LowRankTheory
from .pcca import PCCATheory as PCCATheory
from .ppca import PPCATheory as PPCATheory
from .vae import VAETheory as VAETheory
