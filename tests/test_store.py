"""Draws on disk: nothing lost when killed, nothing wrong unnoticed."""

import errno
import io
import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gradflow.store.chunk import Damaged, MARK, pack, TRAILER, unpack
from gradflow.store.folder import read_study, Store
from gradflow.store.merging import merge, missing


VERSIONS = {"jax": "1.0", "numpy": "2.0"}
FIELDS = {"key": [0, 7], "code": ["Study(", "  rank=2,", ")"], "arrays": {}}
CELLS = ("depth 2, scale 0.3", "depth 3")
# Three chunks, the last of them short.
DRAWS, CHUNK = 10, 4


def _arrays(name, rows):
    """What a study of this name would find."""
    values = np.array([len(name) / (1 + row) for row in rows])
    return {"time": values, "kind": np.array(["global_minimum"] * len(rows), "S")}


def _fill(folder, cells=CELLS, draws=DRAWS, most=10**9, **options):
    """Computes what is missing, at most so many chunks; how many it computed."""
    computed = 0
    with Store(folder, {"draws": draws, "rank": 2}, chunk=CHUNK, **options) as store:
        made = [store.cell(name, draws, FIELDS, VERSIONS) for name in cells]
        for cell in made:
            for index in cell.todo()[: most - computed]:
                arrays = _arrays(cell.name, cell.rows(index))
                store.write(cell, index, arrays, {"versions": VERSIONS})
                computed += 1
    return computed


def _draws(folder):
    """All files of draws, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("chunk-*"))
    }


def _snapshot(folder):
    return {
        path: path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
        if path.name != "lock"
    }


@pytest.fixture
def clean(tmp_path):
    """A study never interrupted."""
    _fill(tmp_path / "clean")
    return _draws(tmp_path / "clean")


# ---- one chunk


SMALL = {
    "time": np.array([0.5, np.nan, -np.inf]),
    "steps": np.array([[1, 2], [3, 4], [5, 6]]),
    "kind": np.array([b"saddle", b"global", b""]),
    "flags": np.array([True, False, True]),
    "none": np.zeros((3, 0)),
}


def test_chunk_is_what_was_packed():
    content = pack(SMALL, {"count": 3})
    arrays, made = unpack(content)
    assert made == {"count": 3} and arrays.keys() == SMALL.keys()
    for name, array in arrays.items():
        assert array.dtype == SMALL[name].dtype and array.flags.writeable
        np.testing.assert_array_equal(array, SMALL[name])
    assert content == pack(SMALL, {"count": 3})
    # numpy reads it too.
    stored = np.load(io.BytesIO(content), allow_pickle=False)
    np.testing.assert_array_equal(stored["steps"], SMALL["steps"])


def test_every_flipped_bit_and_every_truncation_is_found():
    content = pack({"time": np.array([0.5, 2.0])}, {"count": 2})
    print(f"{len(content)} bytes, each of their bits flipped, each truncation")
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            with pytest.raises(Damaged):
                unpack(bytes(flipped))
        with pytest.raises(Damaged):
            unpack(content[:place])
    with pytest.raises(Damaged):
        unpack(content + b"x")


def _signed(data):
    import hashlib

    return data + MARK + hashlib.sha256(data).digest()


def _npz(method=zipfile.ZIP_STORED, **members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("made.json", b"{}")
        for name, content in members.items():
            archive.writestr(name + ".npy", content)
    return _signed(buffer.getvalue())


def _npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def _claiming(shape):
    buffer = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + b"\0" * 8


STRANGERS = {
    "pickle": (
        _npz(x=_npy(np.array([{}], object), allow_pickle=True)),
        "holds pickled objects; refused",
    ),
    "bomb": (_npz(zipfile.ZIP_DEFLATED, x=_npy(np.zeros(10**6))), "larger"),
    "huge": (_npz(x=_claiming((2**40,))), "not as large as it says"),
    "overflowing": (_npz(x=_claiming((2**32, 2**32, 2))), "not as large"),
    "negative": (_npz(x=_claiming((-1,))), "not as large"),
    "text": (_npz(x=b"hello"), "can't be read"),
    "no archive": (_signed(b"hello"), "can't be read"),
    "empty": (_signed(b""), "can't be read"),
    "unsigned": (_npz()[:-TRAILER], "checksum"),
}


# Their names, not their bytes: an archive holds the time it was made at, and workers
# that collect the tests at different seconds must see the same ones.
@pytest.mark.parametrize("content, piece", STRANGERS.values(), ids=STRANGERS)
def test_contents_of_strangers_are_refused(content, piece):
    with pytest.raises(Damaged, match=piece):
        unpack(content)


def test_objects_are_not_written():
    with pytest.raises(ValueError, match="x has dtype object"):
        pack({"x": np.array([None])}, {})


# ---- a study


def test_resumed_is_the_same_as_uninterrupted(tmp_path, clean):
    assert len(clean) == 6
    for computed in (2, 0, 3, 1, 0):
        assert _fill(tmp_path / "a", most=computed) == computed
    assert _draws(tmp_path / "a") == clean
    assert missing(tmp_path / "a") == 0


def test_nothing_is_left_of_a_study_without_a_draw(tmp_path):
    _fill(tmp_path / "a" / "b", most=0)
    assert list(tmp_path.iterdir()) == []


def test_draws_are_raised(tmp_path, clean):
    for draws in (3, 9, DRAWS):
        _fill(tmp_path / "a", draws=draws)
    assert _draws(tmp_path / "a") == clean
    with pytest.raises(ValueError, match=r"draws: saved 10, asked 9 \(draws can be"):
        _fill(tmp_path / "a", draws=9)
    assert _draws(tmp_path / "a") == clean


def test_a_damaged_chunk_is_computed_again(tmp_path, clean, caplog):
    _fill(tmp_path / "a")
    files = sorted((tmp_path / "a").rglob("chunk-*"))
    good = files[1].read_bytes()
    files[1].write_bytes(good[:100] + b"?" + good[101:])
    files[2].write_bytes(b"")
    files[3].write_bytes(files[0].read_bytes())  # a sound one of another study
    assert _fill(tmp_path / "a") == 3
    assert {k: v for k, v in _draws(tmp_path / "a").items() if "bad" not in k} == clean
    moved = {path.name for path in (tmp_path / "a").rglob("*.bad")}
    assert moved == {f"chunk-00000{i}.npz.bad" for i in (0, 1, 2)}
    first, *_ = caplog.messages
    assert "chunk 1 of depth 2, scale 0.3 is damaged (its checksum" in first
    assert "moved to chunk-000001.npz.bad" in first
    assert any("it is of another study" in message for message in caplog.messages)


def test_what_was_being_written_is_swept(tmp_path, clean):
    _fill(tmp_path / "a", most=2)
    folder = next((tmp_path / "a").rglob("chunk-000000.npz")).parent
    (folder / "chunk-000002.npz.part").write_bytes(b"half")
    (tmp_path / "a" / "draws" / "study.json.part").write_bytes(b"half")
    _fill(tmp_path / "a")
    assert not list((tmp_path / "a").rglob("*.part"))
    assert _draws(tmp_path / "a") == clean


SETTINGS = {
    "draws": 4,
    "rank": 2,
    "scales": [0.3, 0.1],
    "horizon": float("inf"),
    "device": None,
    "data": {"name": "mnist", "digit": 3},
}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rank": 3}, "rank: saved 2, asked 3"),
        ({"scales": [0.3]}, "scales: saved [0.3, 0.1], asked [0.3]"),
        ({"horizon": 1.0}, "horizon: saved inf, asked 1.0"),
        ({"data": {"name": "mnist", "digit": 4}}, "data.digit: saved 3, asked 4"),
        ({"seed": 1}, "seed: saved null, asked 1"),
        ({"draws": 3}, "draws: saved 4, asked 3"),
        ({"rank": 3, "scales": []}, "rank: saved 2, asked 3; scales: saved"),
    ],
)
def test_other_settings_are_refused_field_by_field(tmp_path, change, said):
    def enter(settings, **options):
        with Store(tmp_path / "a", settings, **options) as store:
            cell = store.cell("study", 4, FIELDS, VERSIONS)
            for index in cell.todo():
                store.write(cell, index, _arrays("study", cell.rows(index)), {})

    enter(SETTINGS)
    before = _snapshot(tmp_path)
    with pytest.raises(ValueError) as error:
        enter(SETTINGS | change)
    assert f"{tmp_path / 'a'} was started with different settings: " in str(error.value)
    assert said in str(error.value) and str(error.value).endswith("Use a new folder")
    assert _snapshot(tmp_path) == before
    # Where it runs is no setting, and what is missing comes from the folder.
    enter(SETTINGS | {"device": "gpu"})
    for options, text in (
        ({"chunk": 5}, "chunk: saved 1024, asked 5"),
        ({"experiment": "escape"}, "experiment: saved , asked escape"),
        ({"shard": (1, 2)}, "shard: saved [1, 1], asked [1, 2]"),
    ):
        with pytest.raises(ValueError) as error:
            enter(SETTINGS, **options)
        assert text in str(error.value)


def _summary(norm, direction=1.0, of="float64"):
    return {"of": of, "shape": [2], "norm": norm, "direction": direction}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"key": [0, 8]}, "key: saved [0, 7], asked [0, 8]"),
        ({"code": ["Study(", "  rank=3,", ")"]}, "code: saved rank=2,, asked rank=3,"),
        ({"arrays": {"data": _summary(2.1)}}, "data: saved 2 float64 of norm 2, asked"),
        ({"arrays": {"data": _summary(2.0, 1.1)}}, "data: saved 2 float64 of norm 2"),
        ({"arrays": {"data": _summary(2.0, of="float32")}}, "asked 2 float32 of norm"),
        ({"arrays": {}}, "data: saved 2 float64 of norm 2, asked null"),
        ({"arrays": {"data": _summary(2.0 + 1e-13)}}, None),
    ],
)
def test_other_code_or_data_are_refused(tmp_path, change, said):
    fields = FIELDS | {"arrays": {"data": _summary(2.0)}}

    def enter(fields):
        with Store(tmp_path / "a") as store:
            cell = store.cell("study", 4, fields, VERSIONS)
            for index in cell.todo():
                store.write(cell, index, _arrays("study", cell.rows(index)), {})

    enter(fields)
    if said is None:
        enter(fields | change)
        return
    with pytest.raises(ValueError) as error:
        enter(fields | change)
    assert said in str(error.value)


def test_another_version_is_a_warning_that_names_both(tmp_path, caplog):
    _fill(tmp_path / "a", most=1)
    with Store(tmp_path / "a", {"draws": DRAWS, "rank": 2}) as store:
        # Code may print otherwise then.
        store.cell(CELLS[0], DRAWS, FIELDS | {"code": ["new"]}, {"jax": "1.1"})
        store.cell(CELLS[1], DRAWS, FIELDS, {"jax": "1.1"})
    (message,) = caplog.messages
    assert "was begun with jax 1.0, this is 1.1: new draws may differ" in message
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("name", ["study.json", "cell.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 10**5])
def test_damaged_settings_are_told(tmp_path, name, content):
    _fill(tmp_path / "a")
    next((tmp_path / "a").rglob(name)).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        _fill(tmp_path / "a")


def test_another_format_is_told(tmp_path):
    _fill(tmp_path / "a")
    path = tmp_path / "a" / "draws" / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="is of format 2, this gradflow reads"):
        _fill(tmp_path / "a")


# ---- full disks


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_finished_chunks(tmp_path, clean, monkeypatch, broken):
    _fill(tmp_path / "a", most=3)
    before = _draws(tmp_path / "a")

    def fail(*_):
        raise OSError(errno.ENOSPC, "x")

    with Store(tmp_path / "a", {"draws": DRAWS, "rank": 2}) as store:
        cells = [store.cell(name, DRAWS, FIELDS, VERSIONS) for name in CELLS]
        (index, *_), cell = cells[1].todo(), cells[1]
        with monkeypatch.context() as patch, pytest.raises(RuntimeError) as error:
            patch.setattr(os, broken, fail)
            store.write(cell, index, _arrays(cell.name, cell.rows(index)), {})
    assert str(error.value) == (
        f"could not write chunk 0 of depth 3 to {tmp_path / 'a'} (no space left on "
        "device). 3 chunks (10 draws) are safe; free space and run the same command to "
        "go on"
    )
    assert _draws(tmp_path / "a") == before
    assert _fill(tmp_path / "a") == 3
    assert _draws(tmp_path / "a") == clean


# ---- several processes


def _script(text, *arguments, **options):
    """A process without jax, at the tests' own functions."""
    lines = ("import sys", f"sys.path.insert(0, {str(Path(__file__).parent)!r})")
    lines = (*lines, "from storing import *", text)
    command = [sys.executable, "-c", "\n".join(lines), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, **options
    )


HOLD = """
with Store(sys.argv[1], {"draws": 10, "rank": 2}, chunk=4):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_writers(tmp_path, clean):
    _fill(tmp_path / "a", most=2)
    holder = _script(HOLD, tmp_path / "a")
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = _snapshot(tmp_path)
        with pytest.raises(RuntimeError) as error:
            _fill(tmp_path / "a")
        who = f"another process (pid {holder.pid}) is writing {tmp_path / 'a'}"
        assert who in str(error.value)
        assert _snapshot(tmp_path) == before
    finally:
        holder.kill()
        holder.communicate()
    # Its lock is stale now.
    assert (tmp_path / "a" / "draws" / "lock").read_text() == f"pid {holder.pid}"
    assert _fill(tmp_path / "a") == 4
    assert _draws(tmp_path / "a") == clean


def _killed(*arguments):
    """What `storing.py` says of a study killed over and over."""
    script = Path(__file__).parent / "storing.py"
    command = [sys.executable, str(script), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_killed_at_every_point(tmp_path):
    """Before, after and amid each call that touches the disk: nothing is lost that was
    said to be done, and what is computed in the end is what it would have been."""
    said = _killed("points", tmp_path)
    print(said)
    assert said["points"] >= 200 and said["calls"].keys() >= {
        *("open", "write", "fsync", "close", "replace", "mkdir", "ftruncate"),
    }
    assert said["lost"] == said["different"] == said["left over"] == 0
    assert said["kept"] > 100


@pytest.mark.parametrize(
    "kills", [10, pytest.param(100, marks=pytest.mark.slow)], ids=str
)
def test_killed_at_random(tmp_path, kills):
    said = _killed("random", tmp_path, kills)
    print(said)
    assert said["kills"] == kills
    assert said["lost"] == said["different"] == said["left over"] == 0
    assert 0 < said["kept"]


# ---- shards


def test_shards_are_merged_to_the_same_files(tmp_path, clean):
    parts = [tmp_path / f"part{i}" for i in (1, 2, 3)]
    computed = [_fill(part, shard=(i, 3)) for i, part in enumerate(parts, 1)]
    assert computed == [2, 2, 2]
    names = [set(_draws(part)) for part in parts]
    assert set.union(*names) == set(clean) and sum(map(len, names)) == len(clean)
    merge(parts[:2], tmp_path / "some")
    assert missing(tmp_path / "some") == 2
    study = merge([*parts, parts[0]], tmp_path / "all")
    assert study["settings"] == {"draws": DRAWS, "rank": 2}
    assert _draws(tmp_path / "all") == clean and missing(tmp_path / "all") == 0
    # It is a study like any other, and merging again changes nothing.
    assert _fill(tmp_path / "all") == 0
    merge(parts, tmp_path / "all")
    # What is missing may be merged later, or computed.
    merge(parts[2:], tmp_path / "some")
    assert _draws(tmp_path / "some") == _draws(tmp_path / "all") == clean


def test_shards_of_different_studies_are_refused(tmp_path):
    _fill(tmp_path / "a", shard=(1, 2))
    _fill(tmp_path / "b", shard=(2, 2), draws=11)
    with pytest.raises(ValueError, match="draws: saved 1[01], asked 1[01]"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    with pytest.raises(ValueError, match="nowhere has no draws/study.json"):
        merge([tmp_path / "a", tmp_path / "nowhere"], tmp_path / "c")
    with pytest.raises(ValueError, match="folders is empty"):
        merge([], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_chunks_that_differ_are_told(tmp_path, caplog):
    _fill(tmp_path / "a")
    with Store(tmp_path / "b", {"draws": DRAWS, "rank": 2}, chunk=CHUNK) as store:
        cell = store.cell(CELLS[0], DRAWS, FIELDS, VERSIONS)
        arrays = _arrays(cell.name, cell.rows(0))
        store.write(cell, 0, arrays | {"time": arrays["time"] + 1e-12}, {})
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    (message,) = caplog.messages
    assert "1 chunks of depth 2, scale 0.3 in" in message
    assert _draws(tmp_path / "c") == _draws(tmp_path / "a")


# ---- misuse


@pytest.mark.parametrize("chunk", [0, -1, True])
def test_chunk_that_is_none(chunk):
    with pytest.raises(ValueError, match="chunk must be a whole number"):
        Store("a", chunk=chunk)


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (1, 0), (True, 2)])
def test_shard_that_is_none(shard):
    with pytest.raises(ValueError, match="must be i/n|each item a whole number"):
        Store("a", shard=shard)


def test_a_store_is_opened_before_it_is_used(tmp_path):
    with pytest.raises(ValueError, match="is not open: use it as"):
        Store(tmp_path / "a").cell("study", 4, FIELDS, VERSIONS)


def test_two_studies_of_one_name(tmp_path):
    with Store(tmp_path / "a") as store:
        store.cell("depth 2", 4, FIELDS, VERSIONS)
        with pytest.raises(ValueError, match="are named 'depth,2'"):
            store.cell("depth,2", 4, FIELDS, VERSIONS)


def test_reading_changes_nothing(tmp_path, caplog):
    _fill(tmp_path / "a")
    path = next((tmp_path / "a").rglob("chunk-000000.npz"))
    path.write_bytes(b"")
    before = _snapshot(tmp_path)
    _, cells = read_study(tmp_path / "a")
    assert sorted(len(cell.missing()) for cell in cells) == [0, 1]
    assert _snapshot(tmp_path) == before and "is damaged" in caplog.text
    broken = next(cell for cell in cells if cell.missing())
    with pytest.raises(ValueError, match="can't be used"):
        broken.read(0)
