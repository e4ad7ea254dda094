"""One study every way there is: one process, shards, a job, killed and resumed, chunks
of two sizes. The same bytes for the same chunks, the same verdict of every draw."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from jobs import chunks, count_of_chunks, job_of, ROOT

from gradflow.cli import main
from gradflow.store.export import to_xarray


DRAWS = 512
STUDY = (
    "run saddle_avoidance --ranks 3 --depths 2 --starts balanced --batch 64 "
    f"--curves 0 --quiet --draws {DRAWS}"
).split()
KILLS = 3


def _run(*tokens):
    with pytest.raises(SystemExit) as exit:
        main([str(token) for token in tokens])
    assert exit.value.code == 0


def _killed(folder):
    """Ended by SIGKILL at three times, each after more chunks, then left to end."""
    command = [sys.executable, "-c", "from gradflow.cli import main; main()", *STUDY]
    command += ["--chunk", "64", "--out", folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kills = 0
    for wanted in [4 * (kill + 1) for kill in range(KILLS)]:
        process = subprocess.Popen(command, env=environment)
        while count_of_chunks(folder) < wanted and process.poll() is None:
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True)
    return kills


@pytest.mark.slow
def test_every_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ways = {"one process": "one", "two shards": "merged", "two processes": "job"}
    ways |= {"killed and resumed": "killed", "chunks of 256": "large"}
    _run(*STUDY, "--chunk", 64, "--out", "one")
    _run(*STUDY, "--chunk", 256, "--out", "large")
    for part in (1, 2):
        _run(*STUDY, "--chunk", 64, "--out", "parts", "--shard", f"{part}/2")
    parts = [f"parts/shard-{part}-of-2" for part in (1, 2)]
    _run("merge", *parts, "--out", "merged", "--quiet")
    tokens = [*STUDY, "--chunk", 64, "--out", tmp_path / "job", "--distributed"]
    for process in job_of(2, tokens):
        said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    kills = _killed("killed")
    assert kills == KILLS
    found = {way: to_xarray(folder) for way, folder in ways.items()}
    whole = {
        # Those of a job's parts lie in folders of their own beside the merged ones.
        way: {k: v for k, v in chunks(folder).items() if not k.startswith("shard")}
        for way, folder in ways.items()
    }
    for way, studies in found.items():
        differ = elsewhere = 0
        for name, draws in studies.items():
            first = found["one process"][name]
            assert np.array_equal(draws["draws"], np.arange(DRAWS))
            other = draws["finding.kind"].values != first["finding.kind"].values
            limited = first["finding.precision_limited"].values
            differ += int(other.sum())
            elsewhere += int((other & ~limited).sum())
        same = sum(whole[way].get(k) == v for k, v in whole["one process"].items())
        print(
            f"{way}: {differ} of {DRAWS * len(studies)} verdicts differ, {elsewhere} "
            f"of them not precision limited; {same} of {len(whole['one process'])} "
            "files have the same bytes"
        )
        assert elsewhere == 0
        if way != "chunks of 256":
            assert whole[way] == whole["one process"]
