"""A study without jax that is killed over and over: a script of `test_store.py`.

`points`: in a process for each point, which kills itself there. `random`: from outside.
"""

import collections
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np

from gradflow.store.folder import Store
from gradflow.store.writing import Writer


VERSIONS = {"jax": "1.0"}
FIELDS = {"key": [0, 7], "code": [], "arrays": {}}
CALLS = ("open", "write", "fsync", "close", "replace", "mkdir", "ftruncate", "unlink")


def compute(folder, draws, chunk, tell, pause=0.0):
    """Computes what is missing, as `fill_studies` does; writes a line to `tell` for
    each chunk that is done."""
    last = None
    with Store(folder, {"rank": 2}, chunk=chunk) as store:
        cells = [store.cell(name, draws, FIELDS, VERSIONS) for name in ("a", "b")]
        with Writer(store) as writer:
            for cell in cells:
                for index in cell.todo():
                    rows = cell.rows(index)
                    time.sleep(pause)
                    arrays = {"time": np.sin(np.array(rows) + len(cells))}
                    writer.write(cell, {index: arrays}, {})
                    say(last, tell)
                    last = cell.path(index)
        say(last, tell)


def say(path, tell):
    if path is not None:
        REAL["write"](tell, f"{path}\n".encode())


REAL = {name: getattr(os, name) for name in CALLS}


def killing(point, calls):
    """Makes this process kill itself at its `point`-th step on the disk."""
    counter = iter(range(10**9))

    def step():
        if next(counter) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def patched(name, real):
        def call(*arguments, **options):
            calls[name] += 1
            step()
            if name == "write" and len(arguments[1]) > 1:
                half = len(arguments[1]) // 2
                real(arguments[0], arguments[1][:half])
                step()
                # The rest is left to the caller, as a short write would.
                return half
            result = real(*arguments, **options)
            step()
            return result

        return call

    for name, real in REAL.items():
        setattr(os, name, patched(name, real))


def forked(work):
    """Runs `work(tell)` in a process of its own; its pid and what it tells."""
    read, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            REAL["close"](read)
            work(tell)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    os.close(tell)
    return pid, read


def told(read):
    with os.fdopen(read) as stream:
        return stream.read().splitlines()


def digest(folder):
    found = hashlib.sha256()
    for path in sorted(Path(folder).rglob("chunk-*")):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


def recovered(folder, size: tuple[int, int], done, clean, said):
    """What is left after a kill, and what comes of it."""
    said["kept"] += len(done)
    before = {path: Path(path).read_bytes() for path in done if Path(path).exists()}
    said["lost"] += len(done) - len(before)

    def work(tell):
        os.fsync = lambda file: None  # no power is cut here
        compute(folder, *size, tell)

    pid, read = forked(work)
    again = told(read)
    assert os.waitpid(pid, 0)[1] == 0
    # A chunk that was done is not computed again.
    said["lost"] += len(set(again) & set(done))
    said["different"] += digest(folder) != clean
    said["left over"] += len(list(Path(folder).rglob("*.part")))


def points(root):
    said = collections.Counter()
    calls = collections.Counter()
    size = (5, 3)
    nobody = os.open(os.devnull, os.O_WRONLY)
    compute(root / "clean", *size, nobody)
    clean = digest(root / "clean")
    while True:
        folder = root / "killed"
        point = said["points"]

        def work(tell):
            counted = collections.Counter()
            killing(point, counted)  # noqa: B023
            compute(folder, *size, tell)  # noqa: B023
            REAL["write"](tell, json.dumps(counted).encode())

        pid, read = forked(work)
        done = told(read)
        status = os.waitpid(pid, 0)[1]
        if os.waitstatus_to_exitcode(status) == 0:  # there was no such point
            calls.update(json.loads(done.pop()))
            break
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        recovered(folder, size, done, clean, said)
        shutil.rmtree(folder)
        said["points"] += 1
    return {**said, "calls": calls}


def randomly(root, kills):
    said = collections.Counter()
    size = (200, 2)
    nobody = os.open(os.devnull, os.O_WRONLY)
    compute(root / "clean", *size, nobody)
    clean = digest(root / "clean")
    generator = random.Random(0)
    folder = root / "killed"
    while said["kills"] < kills:
        pid, read = forked(lambda tell: compute(folder, *size, tell, 1e-3))
        time.sleep(generator.uniform(0, 0.2))
        os.kill(pid, signal.SIGKILL)
        done = told(read)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            shutil.rmtree(folder)  # it was done before it was killed
            continue
        said["kills"] += 1
        if said["kills"] % 5 == 0:
            recovered(folder, size, done, clean, said)
            shutil.rmtree(folder)
        else:  # goes on in the next round
            said["kept"] += len(done)
            said["lost"] += sum(not Path(path).exists() for path in done)
    return said


if __name__ == "__main__":
    kind, root = sys.argv[1], Path(sys.argv[2])
    said = points(root) if kind == "points" else randomly(root, int(sys.argv[3]))
    names = ("lost", "different", "left over", "kept", "kills", "points")
    print(json.dumps({name: 0 for name in names} | said))
