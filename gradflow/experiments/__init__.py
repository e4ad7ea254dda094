"""Named studies: each file has a `Config`, a `CLAIM`, a `COST` and `run`.

Those in `STUDIES` have many draws, `studies` gives them, and `run` takes a `Store`; if
they have `settled`, it fills in what settings leave open. `run` of those in `TRAINED`,
whose draws are networks (see `training.py`), takes a `Store` too.
`SIZES` are the settings of --quick and --full. Plain values, so that the command line
can have them without importing jax.
"""

NAMES = (
    "convergence",
    "figures",
    "saddle_avoidance",
    "equivalence",
    "escape",
    "em_versus_flow",
    "posterior_collapse",
    "flow_versus_training",
    "nonlinear_cvae",
    "nonlinear_hvae",
    "own",
    "mnist_cvae",
    "mnist_hvae",
    "collapse_training",
)
STUDIES = ("convergence", "saddle_avoidance", "own")
TRAINED = ("nonlinear_cvae", "nonlinear_hvae")
SIZES = {
    "convergence": {
        "quick": {"draws": 32, "batch": 32, "curves": 2},
        "full": {"draws": 10_000, "batch": 256},
    },
    "figures": {"quick": {"draws": 1}, "full": {"paper": True}},
    "saddle_avoidance": {
        "quick": {"draws": 100, "batch": 100, "depths": [2]},
        "full": {"draws": 10_000},
    },
    "equivalence": {
        "quick": {"depths": [2, 3], "ranks": [2], "draws": 2},
        "full": {"dimension": 6, "ranks": [2, 4, 6], "draws": 16},
    },
    "em_versus_flow": {
        "quick": {"models": ["ppca"], "draws": 20},
        "full": {"draws": 2000},
    },
    "posterior_collapse": {
        "quick": {"grids": ["vae"], "points": 6, "latents": [2], "draws": 2},
        "full": {"points": 24, "draws": 16, "starts": 256},
    },
    "flow_versus_training": {
        "quick": {"draws": 8, "halvings": 3, "horizon": 4.0},
        "full": {"draws": 256, "halvings": 8},
    },
    "own": {"quick": {"draws": 32}, "full": {"draws": 10_000}},
    "mnist_cvae": {
        "quick": {"latents": 4, "modes": 6, "marks": [1, 4], "updates": 1000},
        "full": {"draws": 8},
    },
    "nonlinear_cvae": {
        "quick": {"draws": 1, "width": 64, "steps": 400},
        "full": {"draws": 10, "width": 512, "steps": 20_000},
    },
    "mnist_hvae": {
        "quick": {"latents": 4, "modes": 4, "marks": [1, 4], "updates": 1000},
        "full": {"latents": 64, "modes": 64, "marks": [1, 2, 4, 8, 16, 32, 64]},
    },
    "collapse_training": {
        "quick": {"draws": 1, "dimension": 4, "latents": 2, "updates": 1000},
        "full": {"draws": 32},
    },
    "nonlinear_hvae": {
        "quick": {"width": 64, "steps": 200, "beta_1": [1.0], "beta_2": [0.5, 5.0]},
        "full": {"draws": 3, "width": 512, "steps": 20_000},
    },
    "escape": {"quick": {"draws": 2}, "full": {"draws": 64}},
}
