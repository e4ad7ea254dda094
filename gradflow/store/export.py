"""A study's draws with labels, for xarray and whatever reads netCDF."""

from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import checked_arguments
from .files import canonical
from .folder import read_study


@checked_arguments
def to_xarray(folder: Path | str) -> dict[str, Any]:
    """One `xarray.Dataset` per study of a folder, by name; each variable has a leading
    dimension `draws`, of which chunks may be missing. Needs the extra `[io]`.

    **Raises:** `ValueError` for a folder without draws, or if xarray is missing.
    """
    try:
        import xarray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "xarray is not installed: pip install 'gradflow[io]'"
        ) from None
    study, cells = read_study(Path(folder))
    found = {}
    for cell in cells:
        parts = [(cell.rows(i), cell.read(i)[0]) for i in sorted(cell.done)]
        if not parts:
            continue
        draws = np.concatenate([np.array(rows) for rows, _ in parts])
        variables = {}
        for name in parts[0][1]:
            arrays = [arrays[name] for _, arrays in parts]
            array = np.concatenate(arrays)
            if array.dtype.kind == "S":
                array = array.astype("U")
            rest = [f"{name}_{axis}" for axis in range(1, array.ndim)]
            variables[name] = (("draws", *rest), array)
        _, made = cell.read(min(cell.done))
        notes = {"study": canonical(study), "made": canonical(made)}
        found[cell.name] = xarray.Dataset(variables, {"draws": draws}, notes)
    if not found:
        raise ValueError(f"{folder} has no draws: run the study first")
    return found


def export_netcdf(folder: Path | str, file: Path | str) -> None:
    """Writes what `to_xarray` gives into one netCDF file, a group per study.

    **Raises:** `ValueError` also if the file is there, or can't be written.
    """
    path = Path(file)
    if path.exists():
        raise ValueError(f"{path} exists: give a new file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path.parent} is no folder: give a file in one")
    sets = to_xarray(folder)
    part = path.with_name(path.name + ".part")
    try:
        for number, (name, data) in enumerate(sets.items()):
            mode = "a" if number else "w"
            # "/" would begin a group within a group.
            group = name.replace("/", "-")
            data.to_netcdf(part, mode=mode, group=group, engine="h5netcdf")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
