"""The example's script, held up at the iterations that PACED_AT names until the rank gets SIGTERM.

A signal then comes at the same iteration on a fast machine and on a slow one. The file
PACED_FOLDER/<iteration> says that a rank waits.
"""

import os
import runpy
import time
from pathlib import Path
from typing import Any

from megatron.training import get_signal_handler, training

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "pretrain_gpt" / "pretrain_gpt.py"
TIMEOUT_S = 240

if __name__ == "__main__":
    train_step = training.train_step
    held_at = {int(word) for word in os.environ["PACED_AT"].split()}

    def paced_train_step(*args: Any, iteration: int, **kwargs: Any) -> Any:
        if iteration in held_at:
            Path(os.environ["PACED_FOLDER"], str(iteration)).touch()
            deadline = time.monotonic() + TIMEOUT_S
            while not get_signal_handler()._signal_received:
                assert time.monotonic() < deadline, "no SIGTERM"
                time.sleep(0.05)
        return train_step(*args, iteration=iteration, **kwargs)

    training.train_step = paced_train_step
    runpy.run_path(str(SCRIPT), run_name="__main__")
