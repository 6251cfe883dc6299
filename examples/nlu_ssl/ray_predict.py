"""Ask a committee about a pool in several processes: committee_predict.py --ray-actors.

One task of Ray Data reads the pool, and actors, each with all members, answer its batches. The
answers come back in the order of the pool. Nothing else of the recipe imports Ray."""

import logging
import os
import pickle
import signal
import socket
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from committee import Batch, predictions
from pool_files import read_batches

Row = dict[str, Any]
_CONNECT_S = 10.0


def check(actors: int) -> None:
    """Refuse what cannot be done, before anything is read.

    Raises:
        ValueError: there is no actor, Ray Data is not installed, or RAY_ADDRESS does not answer.
    """
    if actors < 1:
        raise ValueError(f"--ray-actors {actors}: must be 1 or more; leave it out for one process")
    try:
        import ray.data  # noqa: F401
    except ImportError as exc:
        what = f"--ray-actors {actors}: needs Ray Data, which cannot be imported ({exc})"
        raise ValueError(f"{what}; pip install 'ray[data]', or leave --ray-actors out") from exc
    if address := os.environ.get("RAY_ADDRESS"):
        host, _, port = address.rpartition(":")
        try:  # Ray itself tries for more than ten minutes.
            socket.create_connection((host, int(port)), _CONNECT_S).close()
        except (OSError, ValueError) as exc:
            what = f"RAY_ADDRESS={address}: must be HOST:PORT of a Ray cluster, and none answers"
            raise ValueError(f"{what} ({exc}); correct it, or unset it") from exc


def _row(value: object) -> Row:
    """Return what goes between the processes; also a ValueError.

    Ray would log a raised one as a fault of its own, and add to what it says.
    """
    return {"pickled": pickle.dumps(value)}


def _read(source: Row) -> Iterator[Row]:
    """Yield each batch of a pool as one row, so that Ray neither divides nor joins batches.

    What else is in its batch decides the last bits of an utterance's answer.
    """
    start = 0
    try:
        for texts in read_batches(Path(source["pool"]), source["size"]):
            yield _row((start, list(texts)))
            start += len(texts)
    except ValueError as exc:
        yield _row(ValueError(str(exc)))


class Teacher:
    """An actor: answers the rows of `_read`, by a committee.Batch each.

    Args:
        models: the folder of the members' folders.
    """

    def __init__(self, models: Path) -> None:
        self.models = models

    @cached_property
    def members(self) -> list[Any]:
        """The members, loaded once."""
        import committee_predict  # which imports this file
        import joint
        import torch

        torch.set_num_threads(1)
        joint.quiet_megatron()
        return committee_predict.load_members(self.models)

    def __call__(self, row: Row) -> Row:
        """Answer a row."""
        asked = pickle.loads(row["pickled"])
        if isinstance(asked, ValueError):
            return row
        start, texts = asked
        try:
            (batch,) = predictions(
                members=[member.intents for member in self.members],
                batches=[texts],
                intents=self.members[0].model.labels.intents,
                slots=[member.tags for member in self.members],
                start=start,
            )
        except ValueError as exc:
            return _row(ValueError(str(exc)))
        return _row(batch)


def _start(actors: int) -> None:
    """Connect to RAY_ADDRESS, or start a cluster for this machine alone; say little."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to Ray's makers
    for name, level in (("ray.data", "WARNING"), ("ray.data._internal.progress", "ERROR")):
        logging.getLogger(name).setLevel(level)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    # Where its processes find this file, whichever script has started them.
    path = f"{Path(__file__).resolve().parent}{os.pathsep}${{PYTHONPATH}}"
    options["runtime_env"] = {"env_vars": {"PYTHONPATH": path}}
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":  # each actor has its CPU, also where there are fewer
        options |= {"num_cpus": actors, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(address, **options)
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would not run `finally`
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # In bytes: it makes each row a block, and so a task of its own. Of Ray's 128 MB, the first
    # actor would have a million utterances.
    context.target_max_block_size = 1


def answers(models: Path, pool: Path, size: int, actors: int) -> Iterator[Batch]:
    """Yield what committee.predictions yields, answered by Ray's actors. Call `check` before.

    They are on the cluster that RAY_ADDRESS names, whose machines have the same files and packages,
    or on one of this machine that ends with the last answer.

    Args:
        size: utterances of a batch.
        actors: how many; each takes one CPU.
    Raises:
        ValueError: see committee.predictions and pool_files.read_batches.
    """
    import ray

    try:
        _start(actors)
        source = ray.data.from_items([{"pool": str(pool.resolve()), "size": size}])
        # With a CPU, it would wait for the actors' to become free; and with as much as they have,
        # Ray would make it a part of one of them.
        batches = source.flat_map(_read, num_cpus=0)
        answered = batches.map(
            Teacher,
            fn_constructor_args=[models.resolve()],
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
        )
        for row in answered.iter_rows():
            answer = pickle.loads(row["pickled"])
            if isinstance(answer, ValueError):
                raise answer
            yield answer
    finally:
        ray.shutdown()
