"""One experiment run into a folder: its draws, its report, its figure."""

import dataclasses
import importlib
import math
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .compiling import enough_threads, keep_compiled, plain_loops
from .experiments import NAMES, STUDIES, TRAINED


# Draws of a file per lane: with fewer more lanes idle while the last ones end, more of
# them are lost when a run is killed.
REFILLS = 32


def experiment(name: str) -> Any:
    if "jax" not in sys.modules:
        for variable, value in (keep_compiled() | enough_threads()).items():
            os.environ.setdefault(variable, value)
        os.environ |= plain_loops()
        # jax says so of the half of a file that another process is writing, or was
        # when it was killed; it compiles again.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
    return importlib.import_module(f"gradflow.experiments.{name}")


def settled(name: str, config: Any) -> Any:
    """The settings with what only a study of one's own can say."""
    fill = getattr(experiment(name), "settled", None)
    return config if fill is None else fill(config)


def check(out: Path, name: str, config: Any) -> None:
    """Refuses a folder in which the report could not be written: before hours of
    computing, not after."""
    from .report import check_folder

    check_folder(out, name, dataclasses.asdict(config))


def report(name: str, config: Any, out: Path, *, quiet: bool, strict: bool) -> int:
    """Runs an experiment in memory, and writes its report."""
    check(out, name, config)
    if name in TRAINED:
        return trained(name, config, out, quiet=quiet, strict=strict)
    try:
        found = experiment(name).run(config, progress=False if quiet else None)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; nothing of this run was written") from None
    return finish(found, out, quiet=quiet, strict=strict)


def trained(name: str, config: Any, out: Path, *, quiet: bool, strict: bool) -> int:
    """Runs an experiment that trains networks, which are kept in `out`: those that are
    done, and how far the one under way is."""
    from .store.folder import Store

    settings = dataclasses.asdict(config)
    with Store(out, settings, experiment=name, chunk=1) as store:
        progress = False if quiet else None
        try:
            found = experiment(name).run(config, progress=progress, store=store)
        except KeyboardInterrupt:
            done, every, _ = store.safe()
            raise KeyboardInterrupt(
                f"stopped; {done} of {every} networks are done, the one under way is "
                "kept to its last checkpoint; run again to go on"
            ) from None
        return finish(found, out, quiet=quiet, strict=strict)


def kept(
    name: str,
    config: Any,
    out: Path,
    *,
    chunk: int | None,
    quiet: bool,
    strict: bool,
) -> int:
    """Runs an experiment of many draws, which are kept in `out` as they are done."""
    from .store.folder import Store

    config = settled(name, config)
    check(out, name, config)
    settings = dataclasses.asdict(config)
    chunk = chunk or _chunk(out, config.batch)
    with Store(out, settings, experiment=name, chunk=chunk) as store:
        progress = False if quiet else None
        try:
            found = experiment(name).run(config, progress=progress, store=store)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_stopped(store)) from None
        return finish(found, out, quiet=quiet, strict=strict)


def shard(
    name: str,
    config: Any,
    out: Path,
    part: tuple[int, int],
    *,
    chunk: int | None,
    quiet: bool,
) -> int:
    """Computes one part of an experiment's draws, in a folder of its own."""
    from .store.folder import Store
    from .study import fill_studies

    number, count = part
    folder = shard_folder(out, number, count)
    config = settled(name, config)
    check(folder, name, config)
    settings = dataclasses.asdict(config)
    # So that each part has some.
    chunk = chunk or _chunk(folder, config.batch, math.ceil(config.draws / count))
    with Store(folder, settings, experiment=name, chunk=chunk, shard=part) as store:
        try:
            fill_studies(
                experiment(name).studies(config),
                store,
                dtype=config.dtype,
                device=config.device,
                progress=False if quiet else None,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_stopped(store)) from None
        chunks, _, draws = store.safe()
    if not quiet:
        print(
            f"shard {number} of {count}: {chunks} chunks ({draws} draws) in {folder}; "
            f"when all are done: gradflow merge {out}/shard-*-of-{count} --out DIR"
        )
    return 0


def distributed(
    name: str,
    config: Any,
    out: Path,
    *,
    chunk: int | None,
    quiet: bool,
    strict: bool,
) -> int:
    """Computes one part in each process of a job; then the first of them merges all.

    Every chunk is on disk before the processes wait for each other.
    """
    from .distributed import join_job, wait_for_all

    number, count = join_job()
    # What runs before it may not use jax.
    config = settled(name, config)
    check(out, name, config)
    first = number == 1
    shard(name, config, out, (number, count), chunk=chunk, quiet=quiet or not first)
    wait_for_all()
    if not first:
        return 0
    folders = [shard_folder(out, i, count) for i in range(1, count + 1)]
    elsewhere = [folder for folder in folders if not (folder / "draws").is_dir()]
    if elsewhere:
        raise RuntimeError(
            f"{elsewhere[0]} is not on a disk of this machine: bring all parts "
            f"together and run gradflow merge {out}/shard-*-of-{count} --out DIR"
        )
    return merge(folders, out, quiet=quiet, strict=strict)


def _chunk(folder: Path, batch: int, most: int = sys.maxsize) -> int | None:
    """How many draws a file has in a new folder. One that was begun keeps its own."""
    from .store.folder import CHUNK

    if (folder / "draws").exists():
        return None
    return min(max(CHUNK, REFILLS * batch), most)


def shard_folder(out: Path, number: int, count: int) -> Path:
    return out / f"shard-{number}-of-{count}"


def shard_of(text: str | None) -> tuple[int, int]:
    """The part that `--shard` asks for."""
    if text is None:
        return 1, 1
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    number, count = (int(digits) for digits in match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"shard must be i/n with 1 <= i <= n, such as 2/8, got {text}")
    return number, count


def _stopped(store: Any) -> str:
    chunks, every, _ = store.safe()
    if chunks == 0:
        return "stopped; nothing of this run was written"
    return f"stopped; {chunks} of {every} chunks saved; run again to go on"


def merge(folders: Sequence[Path], out: Path, *, quiet: bool, strict: bool) -> int:
    """Puts shards together, and reports if that is all."""
    from .store import merging

    study = merging.merge(folders, out)
    lacking = merging.missing(out)
    name = study["experiment"]
    if lacking or name not in STUDIES:
        if not quiet:
            rest = f", {lacking} chunks are missing" if lacking else ""
            print(f"merged {len(folders)} folders into {out}{rest}")
        return 0
    # Where the shards ran, nothing has to run now.
    config = dataclasses.replace(config_of(name, study["settings"]), device=None)
    return kept(name, config, out, chunk=None, quiet=quiet, strict=strict)


def verify(folder: Path, chunks: int, *, quiet: bool) -> int:
    """Computes some of what a folder has again, and compares."""
    from .report import read_report
    from .store.folder import read_study
    from .verifying import same_rows, verify_studies

    progress = False if quiet else None
    study = read_study(folder)[0] if (folder / "draws").is_dir() else None
    # Networks are trained again, all of them.
    if study is not None and study["experiment"] not in TRAINED:
        name = study["experiment"]
        if name not in STUDIES:
            raise ValueError(
                f"{folder} has draws of {name or 'a study in Python'}, which the "
                "command line can't make: use gradflow.verify_studies"
            )
        config = config_of(name, study["settings"])
        checked = verify_studies(
            experiment(name).studies(config),
            folder,
            chunks=chunks,
            dtype=config.dtype,
            device=config.device,
            progress=progress,
        )
    else:
        before = read_report(folder)
        if before.experiment not in NAMES:
            raise ValueError(f"{folder} is of an unknown experiment")
        config = config_of(before.experiment, before.config)
        again = experiment(before.experiment).run(config, progress=progress)
        checked = same_rows(before, again)
    if not quiet:
        for line in checked.lines:
            print(line)
    print(checked.summary)
    return 0 if checked.sound else 1


def config_of(name: str, settings: dict[str, Any]) -> Any:
    """An experiment's settings from what was stored of them."""
    known = {field.name for field in dataclasses.fields(experiment(name).Config)}
    unknown = settings.keys() - known
    if unknown:
        raise ValueError(
            f"{name} has no setting {min(unknown)}: the study was made by another "
            "gradflow"
        )
    return experiment(name).Config(**{k: _decoded(v) for k, v in settings.items()})


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(item) for item in value)
    # JSON has no infinity, and no setting has these as text.
    return float(value) if value in ("inf", "-inf") else value


def finish(report: Any, out: Path, *, quiet: bool, strict: bool) -> int:
    """Writes a report, draws it, prints it."""
    report.write(out)
    figures = draw(report, out)
    if not quiet:
        print(f"{report.claim}\n\n{report.table()}\n")
        for note in report.notes:
            print(f"  {note}")
        times = ", ".join(f"{k} {v:.1f} s" for k, v in report.seconds.items())
        made = report.environment
        print(f"{made['dtype']} on {made['device']}; {times}")
        if "runs" in made:
            print(f"runs {made['runs']}")
        names = ["report.json", "report.md", *(path.name for path in figures)]
        print(f"wrote {', '.join(names)} to {out}")
    # Not every experiment gives verdicts.
    undecided = sum(row.get("undecided", 0) for row in report.rows)
    return 3 if strict and undecided else 0


def draw(report: Any, folder: Path) -> list[Path]:
    import matplotlib

    # No window, wherever this runs.
    matplotlib.use("agg")
    from .plot import save

    return save(report, folder)
