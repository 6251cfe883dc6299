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

from megatron_adams.megatron.config import ADAMS

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 5.0
"""A worker that was told to end is forgotten by its caller within milliseconds."""


def wrap_init_persistent_async_worker(original: Callable[..., Any]) -> Callable[..., Any]:
    """Watch the worker that is started, from now on."""

    def init_persistent_async_worker(rank: int, *args: Any, **kwargs: Any) -> None:
        from megatron.training import get_args

        original(rank, *args, **kwargs)
        settings = get_args()
        # The worker of the other strategy, nvrx, is nvidia-resiliency-ext's own.
        if settings.optimizer == ADAMS and settings.async_strategy == "mcore":
            worker = PersistentAsyncCaller._persistent_process
            threading.Thread(
                target=_watch, args=(worker,), name="checkpoint worker watch", daemon=True
            ).start()

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
