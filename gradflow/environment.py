"""What the numbers may depend on beside the settings: versions, device, dtype."""

import importlib.metadata
import platform
from typing import Any


# The packages whose versions can change a number.
VERSIONED = ("gradflow", "jax", "jaxlib", "diffrax", "equinox", "optimistix", "numpy")

# What a run was for: its path is followed no further, or no more closely, than that.
VERDICTS = "until the limit is certain (verdicts, no accurate trajectories)"
TRAJECTORIES = "accurate to the tolerance all along (trajectories)"


def environment(dtype: str, device: Any, runs: str | None = None) -> dict[str, Any]:
    """What the numbers may depend on beside the settings. `runs`: what their ends are
    good for, `VERDICTS` or `TRAJECTORIES`."""
    return {
        "python": platform.python_version(),
        **versions(),
        "device": f"{device.platform} ({device.device_kind})",
        "dtype": dtype,
        **({} if runs is None else {"runs": runs}),
    }


def versions() -> dict[str, str]:
    """Of the packages in `VERSIONED`."""
    return {name: _version(name) for name in VERSIONED}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
