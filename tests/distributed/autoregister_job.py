"""A job that never calls register(): it trains in a forked, in a spawned and in its own process.

test_autoregister.py starts it by torchrun, with MEGATRON_ADAMS_AUTOREGISTER=1.
"""

import json
import logging
import multiprocessing
import os
import socket

from megatron_adams import cpu_rehearsal

cpu_rehearsal.install()

from tests.distributed import module_cases  # noqa: E402  # behind the stand-in


def train(how: str) -> None:
    """Train as one rank in a process group of its own, and print what was built."""
    logging.basicConfig(level=logging.INFO)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    # torchrun's store belongs to the process that it started.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
    told = module_cases.train(build="plain config", num_steps=2)
    print("told", json.dumps([how, told["parts"], told["grad_norms"]]), flush=True)


if __name__ == "__main__":
    # Before a tensor operation of this process: threads of OpenMP do not survive a fork.
    for method in ("fork", "spawn"):
        process = multiprocessing.get_context(method).Process(target=train, args=(method,))
        process.start()
        process.join()
    train("torchrun")
