"""Every public function refuses bad arguments in one sentence that names them.

The table, `bad_arguments.py`, runs as a script: in one process, and without the
run-time type checker that the other tests run under.
"""

import collections
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import bad_arguments
import pytest

from gradflow.arguments import fits
from gradflow.compiling import keep_compiled


SCRIPT = Path(bad_arguments.__file__)


def _said(*options):
    command = [sys.executable, "-W", "error", str(SCRIPT), *options]
    environment = {**os.environ, **keep_compiled()}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def _all_sound(said):
    counts = collections.Counter(function for function, *_ in said)
    sound = sum(bad_arguments.sound(argument, text) for _, argument, _, text in said)
    print(
        f"{len(said)} bad inputs of {len(counts)} functions, {sound} one-sentence "
        f"errors that name the argument: {dict(counts)}"
    )
    for function, argument, value, text in said:
        where = f"{function}({argument}={value}): {text}"
        assert bad_arguments.sound(argument, text), where


def test_every_public_function_is_in_the_table():
    assert bad_arguments.public().keys() == bad_arguments.CALLS.keys()


def test_every_argument_is_in_the_table():
    for name, item in bad_arguments.public().items():
        parameters = inspect.signature(item).parameters
        assert parameters.keys() == bad_arguments.CALLS[name].keys(), name


def test_one_bad_value_of_each_argument():
    """The first, which is mostly of another type or 0."""
    said = _said("first")
    assert len(said) >= 300
    _all_sound(said)


@pytest.mark.slow
def test_all_bad_values():
    _all_sound(_said())


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, 3, (True, 2.5, "3", None)),
        (float, 3, (True, "3", 1j, None)),
        (float | None, None, ("x",)),
        (tuple[int, str], (1, "a"), ((1, 2), (1,), "ab")),
        (list[int], [], (3, ["a"], "ab")),
        (dict[str, int], {}, (3, [])),
    ],
)
def test_hints(hint, good, bad):
    assert fits(good, hint)
    assert not any(fits(value, hint) for value in bad)
