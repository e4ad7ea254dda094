"""The command line: demo, list, run, plot, verify, merge, export.

Experiments are imported only when one is needed: `--help` must not wait for jax.
Exit codes: 0 done, 1 the run failed, 2 bad input, 3 undecided draws under `--strict`,
130 interrupted.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict, Toml

from . import runs
from .compiling import compile_fast
from .experiments import NAMES, SIZES, STUDIES


app = App(
    name="gradflow",
    help=(
        "Where does gradient flow go? Certified verdicts on many runs. Errors are one "
        "line; --debug shows where they come from."
    ),
    # `main` has a message for it.
    suppress_keyboard_interrupt=False,
    # `--depths 2 3`, and no flag for an empty list: none may be empty.
    default_parameter=Parameter(consume_multiple=True, negative_iterable=()),
)
run_app = App(name="run", help="Run an experiment; its settings are its flags.")
app.command(run_app)

Out = Annotated[Path, Parameter(help="Folder for draws, report and figure.")]
Quiet = Annotated[
    bool, Parameter(negative="", help="Print no table and show no progress.")
]
Strict = Annotated[
    bool, Parameter(negative="", help="Exit with code 3 if any draw is undecided.")
]
Chunk = Annotated[
    int | None,
    Parameter(help="Draws per file; what was not yet written is lost when killed."),
]
Shard = Annotated[
    str | None,
    Parameter(help="i/n: compute the i-th of n parts, for `gradflow merge`."),
]
Distributed = Annotated[
    bool,
    Parameter(
        negative="",
        help="Compute a part in each process of a jax.distributed job, then merge.",
    ),
]
Folder = Annotated[Path, Parameter(help="A folder written by `gradflow run`.")]


@app.command
def demo(*, out: Out = Path("gradflow-demo"), quiet: Quiet = False) -> int:
    """Deep linear autoencoders on MNIST: where do a thousand runs end? And what no
    usual integrator sees: half of all square balanced starts end at a saddle."""
    # Nothing is compiled before the first experiment is loaded.
    os.environ |= compile_fast()
    name, folder = "saddle_avoidance", out / "saddle_avoidance"
    square = {"draws": 256, "batch": 256, "ranks": (3,), "depths": (2,), "curves": 0}
    square["starts"] = ("balanced",)
    # Most of both is compilation, so the second goes on beside the first.
    beside = _Beside(name, square)
    runs.check(folder, name, runs.experiment(name).Config(**square))
    # None of these runs is stiff.
    config = runs.experiment("convergence").Config(method="tsit5")
    code = runs.report("convergence", config, out, quiet=quiet, strict=False)
    report = beside.result()
    return max(code, runs.finish(report, folder, quiet=quiet, strict=False))


@app.command(name="list")
def list_experiments() -> int:
    """List the experiments: what each one claims, where that comes from, and what it
    costs."""
    for name in NAMES:
        experiment = runs.experiment(name)
        print(f"{name}\n    {experiment.CLAIM}\n    Source: {experiment.SOURCE}.")
        print(f"    Cost: {experiment.COST}.")
    return 0


@app.command
def plot(folder: Folder, /) -> int:
    """Draw the figure of a report again."""
    from .report import read_report

    for path in runs.draw(read_report(folder), folder):
        print(path)
    return 0


@app.command
def verify(
    folder: Folder,
    /,
    *,
    chunks: Annotated[int, Parameter(help="How many to compute again.")] = 3,
    quiet: Quiet = False,
) -> int:
    """Compute some chunks of a study's draws again and compare.

    Made with the same versions on the same kind of device they have the same bits.
    """
    return runs.verify(folder, chunks, quiet=quiet)


@app.command
def merge(
    *folders: Path, out: Out, quiet: Quiet = False, strict: Strict = False
) -> int:
    """Put the shards of a study together, and report if that is all of it.

    Parameters
    ----------
    folders
        Those that `gradflow run --shard` wrote.
    """
    return runs.merge(folders, out, quiet=quiet, strict=strict)


@app.command
def export(folder: Folder, file: Path, /) -> int:
    """Write the draws of a study as a netCDF file, a group per row of its table.

    Parameters
    ----------
    file
        The file to write, such as draws.nc.
    """
    from .store.export import export_netcdf

    export_netcdf(folder, file)
    print(file)
    return 0


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits; every error is one line on stderr.

    `--debug` lets errors through with their traceback.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    try:
        with _messages("--quiet" in tokens):
            code = _dispatch(tokens)
    except KeyboardInterrupt as stop:
        code = _complain(str(stop) or "stopped", 130)
    except CycloptsError as error:
        code = _complain(str(error), 2)
    except Exception as error:
        if debug:
            raise
        code = _complain(*_explained(error))
    sys.exit(code)


@contextlib.contextmanager
def _messages(quiet: bool):
    """What the numeric code has to say goes to stderr, a line each."""
    logger, handler = logging.getLogger("gradflow"), logging.StreamHandler(sys.stderr)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _explained(error: Exception) -> tuple[str, int]:
    """What the user is told of an error, and the exit code."""
    if isinstance(error, ValueError):
        return str(error), 2
    if isinstance(error, (RuntimeError, OSError)) and str(error):
        return str(error), 1
    return f"{type(error).__name__}: {error}; --debug shows where it comes from", 1


def _dispatch(tokens: list[str]) -> int:
    if tokens[:1] == ["run"]:
        for name in NAMES:
            if name not in run_app:
                _register(name)
        tokens, file = _without_config(tokens)
        tokens, size = _without_size(tokens)
        # cyclopts checks the file's keys as it checks flags; what comes first counts.
        settings = Toml(file or "", use_commands_as_keys=False, allow_unknown=False)
        sized = Dict(size, use_commands_as_keys=False, allow_unknown=False)
        files = () if file is None else (settings,)
        run_app.config = (*files, sized, _check_whole)
    result = app(
        tokens, exit_on_error=False, print_error=False, result_action="return_value"
    )
    return result if isinstance(result, int) else 0


def _register(name: str) -> None:
    """Adds `gradflow run NAME`, with the fields of its `Config` as flags."""
    experiment = runs.experiment(name)

    def whole(
        *,
        settings: Any = None,
        out: Out = Path(f"gradflow-{name}"),
        quiet: Quiet = False,
        strict: Strict = False,
    ) -> int:
        chosen = experiment.Config() if settings is None else settings
        return runs.report(name, chosen, out, quiet=quiet, strict=strict)

    def kept(
        *,
        settings: Any = None,
        out: Out = Path(f"gradflow-{name}"),
        chunk: Chunk = None,
        shard: Shard = None,
        distributed: Distributed = False,
        quiet: Quiet = False,
        strict: Strict = False,
    ) -> int:
        chosen = experiment.Config() if settings is None else settings
        part = runs.shard_of(shard)
        if distributed:
            if shard is not None:
                raise ValueError("--shard and --distributed are both given: choose one")
            return runs.distributed(
                name, chosen, out, chunk=chunk, quiet=quiet, strict=strict
            )
        if part == (1, 1):
            return runs.kept(name, chosen, out, chunk=chunk, quiet=quiet, strict=strict)
        return runs.shard(name, chosen, out, part, chunk=chunk, quiet=quiet)

    command = kept if name in STUDIES else whole
    command.__annotations__["settings"] = experiment.Config | None
    help_text = (
        f"{experiment.CLAIM} Settings can be read from a TOML file: --config; --quick "
        "and --full choose smaller and larger ones."
    )
    run_app.command(command, name=name, help=help_text)


def _without_config(tokens: list[str]) -> tuple[list[str], Path | None]:
    """Takes `--config FILE` out of the tokens."""
    rest, file = [], None
    remaining = iter(tokens)
    for token in remaining:
        if token == "--config" or token.startswith("--config="):
            _, equals, value = token.partition("=")
            value = value if equals else next(remaining, "")
            if not value:
                raise ValueError("--config needs the name of a TOML file")
            file = Path(value)
            _check_toml(file)
        else:
            rest.append(token)
    return rest, file


def _without_size(tokens: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes `--quick` and `--full` out of the tokens, as settings."""
    asked = [size for size in ("quick", "full") if f"--{size}" in tokens]
    if not asked:
        return tokens, {}
    if len(asked) == 2:
        raise ValueError("--quick and --full are both given: choose one")
    rest = [token for token in tokens if token != f"--{asked[0]}"]
    # Of no experiment: what is wrong with the name is said later.
    sizes = SIZES.get(rest[1] if len(rest) > 1 else "", {})
    return rest, sizes.get(asked[0], {})


def _check_whole(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Refuses `--draws 2.5`, which cyclopts would round."""
    del app, commands
    for argument in arguments:
        if int in (argument.hint, *get_args(argument.hint)):
            for token in argument.tokens:
                if "." in token.value:
                    name = argument.name.lstrip("-")
                    raise ValueError(
                        f"{name} must be a whole number, got {token.value}"
                    )


def _check_toml(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"--config {file}: there is no such file")
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--config {file} is not valid TOML: {error}") from None
    # cyclopts takes a table of a command's name to be for that command.
    tables = [name for name, value in settings.items() if isinstance(value, dict)]
    if tables:
        raise ValueError(
            f"--config {file} has the table [{tables[0]}]: write settings without one, "
            "such as draws = 100"
        )


class _Beside:
    """An experiment in a process of its own: of the threads of one process only one
    runs Python at a time, and jax traces in Python."""

    def __init__(self, name: str, settings: dict[str, Any]):
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._received, sent = context.Pipe(duplex=False)
        # It ends with this process, which alone answers an interrupt.
        process = context.Process(
            target=_run_beside, args=(name, settings, sent), daemon=True
        )
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        sent.close()

    def result(self) -> Any:
        """Its report, or what it raised."""
        try:
            found = self._received.recv()
        except EOFError:
            raise RuntimeError(f"the process that ran {self._name} was ended") from None
        if isinstance(found, Exception):
            raise found
        return found


def _run_beside(name: str, settings: dict[str, Any], sent: Any) -> None:
    experiment = runs.experiment(name)
    try:
        found = experiment.run(experiment.Config(**settings), progress=False)
    except Exception as error:
        found = error
    sent.send(found)


def _complain(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code
