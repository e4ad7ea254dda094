"""Named studies: each file has a `Config`, a `CLAIM`, a `COST` and `run`.

A plain list, so that the command line can name them without importing them.
"""

NAMES = (
    "convergence",
    "figures",
    "saddle_avoidance",
    "equivalence",
    "escape",
    "em_versus_flow",
)
