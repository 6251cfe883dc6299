"""Time what a job waits for before its first step, with an empty and a filled kernel cache.

    python benchmarks/start.py [--arch sm_90] [--rounds N]

Each measurement is a process of its own, which imports torch before the clock starts. It then
imports the optimizer and gets the kernel of a mode: the library for this CPU, or the cubin for a
GPU, which need not be there. A job on a GPU would also load the cubin; that is not measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]

# Prints seconds. The mode is Megatron's default in bf16.
_START = """
import json, sys, time
import torch
start = time.perf_counter()
import megatron_adams
from megatron_adams.kernels import Mode, select_backend
imported = time.perf_counter()
mode = Mode("fp32", "bf16", "fp32", "fp32")
if sys.argv[1] == "host":
    select_backend(torch.device("cpu"), mode, "host")
else:
    from megatron_adams.kernels.cuda import cubin
    cubin(mode, sys.argv[1])
ready = time.perf_counter()
print(json.dumps({"import": imported - start, "kernel": ready - imported}))
"""


def start(target: str, cache: str) -> dict[str, float]:
    """Return the seconds of the import and of getting the kernel, in a new process."""
    environment = {**os.environ, "MEGATRON_ADAMS_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _START, target]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the start of AdamS.")
    parser.add_argument("--arch", default="sm_90", help="of the GPU; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    start("host", tempfile.mkdtemp())  # reads the files of torch and of this package from disk
    print("| kernel | cache | import, ms | kernel, ms | together, ms |")
    print("| --- | --- | ---: | ---: | ---: |")
    for target in ("host", args.arch):
        times: dict[str, list[dict[str, float]]] = {"empty": [], "filled": []}
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as cache:
                times["empty"].append(start(target, cache))
                times["filled"].append(start(target, cache))
        for state, rounds in times.items():
            cells = [median(r["import"] for r in rounds), median(r["kernel"] for r in rounds)]
            cells.append(median(r["import"] + r["kernel"] for r in rounds))
            print(f"| {target} | {state} |", " | ".join(f"{s * 1e3:.0f}" for s in cells), "|")


if __name__ == "__main__":
    main()
