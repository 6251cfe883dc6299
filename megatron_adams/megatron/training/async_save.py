"""An asynchronous save whose worker process dies ends its rank instead of hanging it.

Megatron (0.19) waits for its persistent checkpoint worker without a timeout and without looking
whether it is alive (core/dist_checkpointing/strategies/async_utils.py:PersistentAsyncCaller).
"""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from megatron_adams.megatron.callers import asks_for_adams, global_arguments
from megatron_adams.megatron.versions import STARTS_WORKER_FIRST, worker_of

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 5.0
"""A worker that was told to end is forgotten by its caller within milliseconds."""


_START_POLL_S = 0.1


def wrap_starter_of_worker(original: Callable[..., Any]) -> Callable[..., Any]:
    """Watch the worker that is started, from its start on.

    Args:
        original: versions.py:STARTER_OF_WORKER; a method has the worker's caller for its `self`.
    """

    def start(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import async_utils

        settings = global_arguments(async_utils.get_args)
        # The worker of the other strategy, nvrx, is nvidia-resiliency-ext's own. Up to 0.16 there
        # is the one, and no flag.
        is_megatrons = getattr(settings, "async_strategy", "mcore") == "mcore"
        caller = args[0] if args else None
        if not (asks_for_adams(settings) and is_megatrons and worker_of(caller) is None):
            return original(*args, **kwargs)
        watch = threading.Thread(
            target=_watch, args=(caller,), name="checkpoint worker watch", daemon=True
        )
        if not STARTS_WORKER_FIRST:
            watch.start()  # The save that starts it waits for it, too.
            return original(*args, **kwargs)
        outcome = original(*args, **kwargs)
        watch.start()  # The worker may be forked, which is to be done with no thread.
        return outcome

    return start


def _watch(caller: Any) -> None:
    while (worker := worker_of(caller)) is None:
        time.sleep(_START_POLL_S)
    wait([worker.sentinel])
    time.sleep(_CLOSE_TIMEOUT_S)
    if worker_of(caller) is not worker:
        return  # Ended by its caller.
    logger.error(
        "the checkpoint worker (pid %d) died with exit code %s and its save is lost: stopping "
        "this rank. Restart with --load, which resumes from the last complete checkpoint.",
        worker.pid,
        worker.exitcode,
    )
    logging.shutdown()
    for child in multiprocessing.active_children():  # they would outlive this process
        child.kill()
    # No exception: the main thread may be waiting for the worker, for ever.
    os._exit(1)
