"""Run examples/pretrain_gpt/pretrain_gpt.py and record it in a file, for megatron_runs.py.

The environment variable RECORD_FILE names the file, which is rewritten after each step. For each
step it has "losses" and "grad_norms" unrounded (Megatron's log rounds them), "step_ms" until the
device is done, and "timers_ms" with the TIMERS, which run with --timing-log-level 1. At the end it
also has "weights", a checksum of the model's bits, "peak_mib" and "state_bytes".
"""

import ctypes
import json
import os
import runpy
import signal
import time
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args, get_timers, training

_SCRIPT = Path(__file__).parents[2] / "examples/pretrain_gpt/pretrain_gpt.py"
_PR_SET_PDEATHSIG = 1
TIMERS = ("optimizer", "optimizer-inner-step")


def checksum(tensors: list[torch.Tensor]) -> int:
    """Return a checksum of the tensors' bits and order, with int64's wraparound."""
    total = 0
    for tensor in tensors:
        kind = {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
        bits = tensor.detach().reshape(-1).view(kind).to(torch.int64)
        places = torch.arange(1, bits.numel() + 1, dtype=torch.int64, device=bits.device)
        total = total * 31 + int((bits * places).sum())
    return total % 2**63


def state_bytes(optimizer: Any, model_params: list[torch.Tensor]) -> int:
    """Return the bytes of the inner optimizers' state, and of params that are not the model's."""
    models = {param.untyped_storage().data_ptr() for param in model_params}
    total = 0
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                kept = [v for v in part.optimizer.state[param].values() if torch.is_tensor(v)]
                if param.untyped_storage().data_ptr() not in models:
                    kept.append(param)
                total += sum(tensor.numel() * tensor.element_size() for tensor in kept)
    return total


def timers_ms() -> dict[str, float]:
    """Return the sums of Megatron's timers so far, in ms; empty if the timers do not run."""
    if get_args().timing_log_level < 1:
        return {}
    timers = get_timers()
    return {name: timers(name, log_level=1).active_time() * 1e3 for name in TIMERS}


def main() -> None:
    # This process dies with torchrun, which starts its workers in sessions of their own. So a
    # killed run leaves nothing on the GPU.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    file = Path(os.environ["RECORD_FILE"])
    record: dict[str, Any] = {
        "losses": [],
        "grad_norms": [],
        "step_ms": [],
        "timers_ms": {name: [] for name in TIMERS},
    }
    held: dict[str, Any] = {}
    set_up, train_step = training.setup_model_and_optimizer, training.train_step

    def watched_set_up(*args: Any, **kwargs: Any) -> Any:
        held["model"], held["optimizer"], _ = built = set_up(*args, **kwargs)
        return built

    def watched_train_step(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        before, start = timers_ms(), time.perf_counter()
        outcome = train_step(*args, **kwargs)
        torch.cuda.synchronize()
        record["step_ms"].append((time.perf_counter() - start) * 1e3)
        for name, ms in timers_ms().items():
            record["timers_ms"][name].append(ms - before[name])
        record["losses"] += [float(loss) for loss in outcome[0].values()]
        record["grad_norms"].append(float(outcome[5]))
        file.write_text(json.dumps(record))
        return outcome

    training.setup_model_and_optimizer = watched_set_up
    training.train_step = watched_train_step
    runpy.run_path(str(_SCRIPT), run_name="__main__")
    record["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    params = [param for chunk in held["model"] for param in chunk.parameters()]
    record |= {
        "num_params": sum(param.numel() for param in params),
        "state_bytes": state_bytes(held["optimizer"], params),
        "weights": checksum(params),
    }
    file.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
