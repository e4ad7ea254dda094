import dataclasses
import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow.environment
import gradflow.report
import gradflow.store.files
from gradflow import read_report, Report
from gradflow.environment import environment
from gradflow.store.files import write_whole


def _report(**changes):
    fields = {
        "experiment": "convergence",
        "claim": "All runs end somewhere.",
        "config": {"seed": 3, "scales": (0.3, 0.03), "digit": None},
        "environment": {"jax": "1.2.3", "dtype": "float64"},
        "rows": [
            {"depth": 2, "share": 0.123456, "widths": "3-1-3"},
            {"depth": 10, "share": 1.0, "widths": "4-2-2-4"},
        ],
        "notes": ["draw 7 is undecided"],
        "figure": {"panels": []},
        "seconds": {"curves": 1.5},
    }
    return Report(**fields | changes)


def _refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def _strict(text):
    return json.loads(text, parse_constant=_refuse_constant)


def test_json_is_strict():
    values = {
        "nan": float("nan"),
        "infinities": (float("inf"), -np.inf),
        "numpy": np.array([[1.0, np.nan], [np.inf, 2.0]]),
        "numpy numbers": [np.float32(0.5), np.int64(3), np.bool_(True)],
        "jax": jnp.arange(3),
        "jax number": jnp.asarray(2.5),
        "words": np.array(["a", "b"], dtype=object),
        "empty": np.zeros((0, 2)),
        "others": [None, True, "text", 7],
    }
    figure = _strict(_report(figure=values).to_json())["figure"]
    assert figure == {
        "nan": None,
        "infinities": ["inf", "-inf"],
        "numpy": [[1.0, None], ["inf", 2.0]],
        "numpy numbers": [0.5, 3, True],
        "jax": [0, 1, 2],
        "jax number": 2.5,
        "words": ["a", "b"],
        "empty": [],
        "others": [None, True, "text", 7],
    }


def test_numbers_keep_all_digits():
    values = np.random.default_rng(0).normal(size=100)
    figure = _strict(_report(figure={"values": values}).to_json())["figure"]
    np.testing.assert_array_equal(figure["values"], values)


def test_written_report_is_read_back(tmp_path):
    report = _report()
    report.write(tmp_path / "new" / "folder")
    found = read_report(tmp_path / "new" / "folder")
    expected = dataclasses.asdict(report)
    expected["config"]["scales"] = [0.3, 0.03]
    assert dataclasses.asdict(found) == expected
    assert found.to_json() == report.to_json()
    # The folder may be given as text.
    assert read_report(str(tmp_path / "new" / "folder")) == found
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"report.json", "report.md"}


def test_same_settings_may_be_written_again(tmp_path):
    _report().write(tmp_path)
    _report(seconds={"curves": 2.5}, rows=[{"depth": 1}]).write(tmp_path)
    assert read_report(tmp_path).seconds == {"curves": 2.5}
    assert "2.50 s" in (tmp_path / "report.md").read_text()


def test_other_settings_change_nothing(tmp_path):
    _report().write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for changes in (
        {"config": {"seed": 4, "scales": (0.3, 0.03), "digit": None}},
        {"config": {"seed": 3, "scales": (0.3,), "digit": None}},
        {"config": {"seed": 3, "scales": (0.3, 0.03), "digit": None, "new": 1}},
        {"experiment": "other"},
    ):
        with pytest.raises(ValueError, match="give a new folder with --out"):
            _report(**changes).write(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, broken, error):
    path = tmp_path / "report.json"
    write_whole(path, b"old")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(gradflow.store.files.os, broken, fail)
    with pytest.raises(type(error)):
        write_whole(path, b"new and longer")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [
        ("report.json", b"old")
    ]


def test_table_is_aligned():
    assert _report().table().splitlines() == [
        "| depth | share  | widths  |",
        "| ----- | ------ | ------- |",
        "| 2     | 0.1235 | 3-1-3   |",
        "| 10    | 1      | 4-2-2-4 |",
    ]
    assert _report(rows=[]).table() == "(no rows)"


def test_markdown_says_what_it_was_made_with():
    text = _report().to_markdown()
    report = _report()
    pieces = [report.claim, report.table(), "seed=3", "jax 1.2.3", "curves 1.50 s"]
    for piece in [*pieces, "- draw 7 is undecided\n"]:
        assert piece in text
    assert "\n- " not in _report(notes=[]).to_markdown()


def test_environment(monkeypatch):
    device = jax.devices("cpu")[0]
    found = environment("float32", device)
    assert found["dtype"] == "float32" and found["device"].startswith("cpu")
    assert found["jax"] == jax.__version__ and found["numpy"] == np.__version__
    # Run from a folder, not installed: no reason to lose a run.
    monkeypatch.setattr(gradflow.environment, "VERSIONED", ("no-such-package",))
    assert environment("float32", device)["no-such-package"] == "not installed"


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Report)])
def test_a_report_that_lacks_something_is_damaged(tmp_path, key):
    content = dataclasses.asdict(_report())
    for damaged in (
        {k: v for k, v in content.items() if k != key},
        content | {key: 3},
        content | {"extra": 3},
    ):
        (tmp_path / "report.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="report.json is damaged"):
            read_report(tmp_path)


def test_every_truncation_is_seen(tmp_path):
    text = _report().to_json()
    for length in range(0, len(text), 7):
        (tmp_path / "report.json").write_text(text[:length])
        with pytest.raises(ValueError, match="move it away and run the study again"):
            read_report(tmp_path)


def test_a_share_below_1_does_not_look_like_it():
    row = {"low": 1 - 3.7e-6, "high": 1.0, "small": 3.7e-6}
    assert "| 1 - 3.7e-06 | 1 " in _report(rows=[row]).table()
