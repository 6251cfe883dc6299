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

from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from megatron_adams.megatron.callers import asks_for_adams, global_arguments

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 5.0
"""A worker that was told to end is forgotten by its caller within milliseconds."""


def wrap_init_persistent_async_worker(original: Callable[..., Any]) -> Callable[..., Any]:
    """Watch the worker that is started, from now on."""

    def init_persistent_async_worker(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import async_utils

        outcome = original(*args, **kwargs)
        settings = global_arguments(async_utils.get_args)
        # The worker of the other strategy, nvrx, is nvidia-resiliency-ext's own.
        is_megatrons = getattr(settings, "async_strategy", None) == "mcore"
        if asks_for_adams(settings) and is_megatrons:
            worker = PersistentAsyncCaller._persistent_process
            threading.Thread(
                target=_watch, args=(worker,), name="checkpoint worker watch", daemon=True
            ).start()
        return outcome

    return init_persistent_async_worker


def _watch(worker: Any) -> None:
    wait([worker.sentinel])
    time.sleep(_CLOSE_TIMEOUT_S)
    if PersistentAsyncCaller._persistent_process is not worker:
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
