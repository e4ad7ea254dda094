"""The processes of a `jax.distributed` job, each with a part of one study."""

import socket
from typing import Any


# Seconds. Parts end hours apart, and the last process merges and reports alone.
PATIENCE = 7 * 24 * 3600


def join_job() -> tuple[int, int]:
    """Joins the job that this process is of, and says which of how many it is, from 1.

    **Raises:** `RuntimeError` outside of a job, or when the others don't come.
    """
    import jax

    try:
        jax.distributed.initialize(shutdown_timeout_seconds=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"--distributed: {socket.gethostname()} could not join a job ({error}): "
            "start it with srun, mpirun or on every host of a TPU pod, or give each "
            "process its own --shard i/n"
        ) from None
    return jax.process_index() + 1, jax.process_count()


def wait_for_all() -> None:
    """Returns when all processes of the job have come here.

    Devices are not used for that: their collectives give up after half a minute.
    """
    # jax has no public barrier without devices.
    from jax._src import distributed

    client: Any = distributed.global_state.client
    client.wait_at_barrier("gradflow: all parts are done", PATIENCE * 1000)
