"""Processes of one study, and the files that they leave."""

import os
import socket
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def chunks(folder):
    """The bytes of each file of draws."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("chunk-*"))
    }


def count_of_chunks(folder):
    """How many there are, while others come and go."""
    return len(list(Path(folder).rglob("chunk-*.npz")))


def job_of(processes, arguments, **variables):
    """The processes of a job on this machine, as Slurm would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(processes),
        "JAX_COORDINATOR_PORT": port,
        "JAX_LOCAL_DEVICE_IDS": "0",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    command = [sys.executable, "-c", "from gradflow.cli import main; main()"]
    return [
        subprocess.Popen(
            [*command, *map(str, arguments)],
            env={
                **os.environ,
                **slurm,
                "SLURM_PROCID": str(process),
                "SLURM_LOCALID": str(process),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
