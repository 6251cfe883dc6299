"""Run real Megatron on one GPU over NCCL in bf16: Adam, and AdamS with various flags.

    python tests/gpu/megatron_runs.py --out results.json --seconds 200

It needs torch with CUDA and megatron-core (PYTHONPATH will do), but neither TransformerEngine nor
Apex, nor an installation of this package. `--rehearse` makes the same runs with a tiny model on CPU
processes, which shows that commands and logs are as this program expects. The results file is
rewritten after each run. The full logs are in the same folder. Exits with 1 if a run failed.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "recorded_pretrain.py"

# The value of --log-interval. A logged step also counts its update RMS, so its times are kept
# apart.
_LOG_INTERVAL = 4

# What Megatron needs without TransformerEngine and Apex.
_LOCAL = (
    "--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm "
    "--no-masked-softmax-fusion --no-rope-fusion"
)
_COMMON = (
    "--bf16 --use-distributed-optimizer --lr 1e-4 --lr-decay-style constant --weight-decay 0.1 "
    "--adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --seed 1234 --mock-data "
    "--tokenizer-type NullTokenizer --no-create-attention-mask-in-dataloader "
    "--attention-dropout 0 --hidden-dropout 0 --logging-level 20 "
    "--eval-iters 0 --eval-interval 1000 --num-workers 0 --distributed-timeout-minutes 2 "
    f"--log-interval {_LOG_INTERVAL}"
)
# 355 million parameters.
_GPT = (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 "
    "--max-position-embeddings 1024 --vocab-size 50257 --micro-batch-size 4 "
    "--global-batch-size 8 --train-iters 12"
)
_REHEARSED_GPT = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --vocab-size 127 --micro-batch-size 2 "
    "--global-batch-size 4 --train-iters 8 --distributed-backend gloo"
)
_TIMERS = "--timing-log-level 1"
_GRAPH = "--optimizer-cuda-graph"
# Without TransformerEngine, Megatron adds up the parts of the norm on the host, but a CUDA graph
# does it on the device. The norm can then differ in its last bit, and so can clipped gradients.
# Without clipping, everything except the norm has the same bits.
_NO_CLIPPING = "--clip-grad 0"

# Adam with --use-precision-aware-optimizer is missing because it needs TransformerEngine. Runs with
# a CUDA graph have no timers, because these wait for the device.
RUNS = {
    "adam": f"--optimizer adam {_TIMERS}",
    "adams": f"--optimizer adams {_TIMERS}",
    "adams, precision-aware, exp_avg bf16": f"--optimizer adams {_TIMERS} "
    "--use-precision-aware-optimizer --exp-avg-dtype bf16",
    "adams, cautious": f"--optimizer adams --adams-cautious {_TIMERS}",
    "adams, logs": "--optimizer adams --adams-log-gpu-memory --adams-log-adamw-rms",
    "adams, CUDA graph": f"--optimizer adams {_GRAPH}",
    "adams, no clipping": f"--optimizer adams {_NO_CLIPPING}",
    "adams, CUDA graph, no clipping": f"--optimizer adams {_GRAPH} {_NO_CLIPPING}",
}
_PLAIN_RUN, _GRAPH_RUN = "adams, no clipping", "adams, CUDA graph, no clipping"
_AGAIN = "adams, no clipping, again"

_RUN_LIMIT_S = 75.0
_TERMINATION_S = 10.0
_LAST_LINES = 12
# The first steps allocate and compile. With a CUDA graph, three steps and the capture come first.
_NUM_FIRST_STEPS = 5
# torchrun's report on a dead worker begins with this path. The worker's own words are above it.
_TORCHRUN_REPORT = "torch/distributed/elastic/multiprocessing/api.py"


@dataclass
class Record:
    """The results of a run.

    Attributes:
        step_ms, optimizer_ms, inner_step_ms: the median times of later, unlogged steps: the whole
            step, all that Megatron's optimizer does, and AdamS's or Adam's own step.
        logged_inner_step_ms: the same as inner_step_ms for later, logged steps.
        peak_mib: torch.cuda.max_memory_allocated at the end.
        state_bytes: the bytes of the optimizer's state and main params.
        weights: a checksum of the model's bits at the end.
        words: anything else, such as the last lines of a run that failed.
    """

    name: str
    flags: str
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    step_ms: float | None = None
    optimizer_ms: float | None = None
    inner_step_ms: float | None = None
    logged_inner_step_ms: float | None = None
    peak_mib: float | None = None
    num_params: int | None = None
    state_bytes: int | None = None
    weights: int | None = None
    seconds: float = 0.0
    ok: bool = False
    words: str = ""


def command(flags: str) -> list[str]:
    """Return the command that a user would type."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    launcher = ("--nproc-per-node", "1", "-m", "megatron_adams.launch")
    rehearsal = ("--cpu-rehearsal",) if "gloo" in flags.split() else ()
    return [*torchrun, *launcher, *rehearsal, str(SCRIPT), *flags.split()]


def later_median(ms: list[float], *, is_logged: bool = False) -> float | None:
    """Return the median of the later steps' values, given one per step; None if there are none."""
    later = [
        value
        for step, value in enumerate(ms, start=1)
        if step > _NUM_FIRST_STEPS and (step % _LOG_INTERVAL == 0) == is_logged
    ]
    return statistics.median(later) if later else None


def medians(recorded: dict[str, Any]) -> dict[str, float | None]:
    """Return the times of a `Record` from those of recorded_pretrain.py."""
    timers = recorded.pop("timers_ms")
    inner = timers["optimizer-inner-step"]
    return {
        "step_ms": later_median(recorded.pop("step_ms")),
        "optimizer_ms": later_median(timers["optimizer"]),
        "inner_step_ms": later_median(inner),
        "logged_inner_step_ms": later_median(inner, is_logged=True),
    }


def last_words(log: str) -> str:
    """Return the last lines that the worker printed."""
    lines = [line for line in log.splitlines() if line.strip()]
    report = next((i for i, line in enumerate(lines) if _TORCHRUN_REPORT in line), len(lines))
    return "\n".join(lines[:report][-_LAST_LINES:])


def end(process: subprocess.Popen[bytes]) -> None:
    """End torchrun, which then ends its worker."""
    process.terminate()
    try:
        process.wait(_TERMINATION_S)
    except subprocess.TimeoutExpired:
        # The worker dies with it, see recorded_pretrain.py.
        process.kill()
        process.wait()


def run(name: str, flags: str, folder: Path, limit_s: float) -> Record:
    """Make a run. If it goes wrong, the record says how."""
    stem = re.sub(r"\W+", "-", name)
    log, recorded = folder / f"megatron-{stem}.log", folder / f"megatron-{stem}.json"
    recorded.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "RECORD_FILE": str(recorded),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # Makes two runs give equal bits.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        # At start, Megatron makes Inductor compile its fusions, which takes tens of seconds and a C
        # compiler. --disable-jit-fuser comes too late: the functions are decorated by then (0.19).
        "TORCHDYNAMO_DISABLE": "1",
    }
    start = time.monotonic()
    is_late = False
    with log.open("w") as output:
        process = subprocess.Popen(
            command(flags), cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            is_late, code = True, None
        finally:
            end(process)
    text = log.read_text(errors="replace")
    record = Record(name, flags, seconds=round(time.monotonic() - start, 1))
    if recorded.exists():
        values = json.loads(recorded.read_text())
        recorded.unlink()
        for key, value in {**medians(values), **values}.items():
            setattr(record, key, value)
    if is_late:
        record.words = f"no end within {limit_s:.0f} s; the last lines:\n{last_words(text)}"
    elif code != 0:
        record.words = f"exit code {code}; the last lines:\n{last_words(text)}"
    elif record.weights is None:
        record.words = f"it ended before its last step; the last lines:\n{last_words(text)}"
    else:
        record.ok = True
    return record


def same_bits(one: Record, other: Record) -> str | None:
    """Return where two runs differ; None if losses and weights have the same bits.

    The norms that are logged may differ by rounding: see _NO_CLIPPING.
    """
    for step, (a, b) in enumerate(zip(one.losses, other.losses, strict=True), start=1):
        if a != b:
            return f"loss of step {step}: {a!r} and {b!r}"
    for step, (a, b) in enumerate(zip(one.grad_norms, other.grad_norms, strict=True), start=1):
        if not math.isclose(a, b, rel_tol=2**-22):
            return f"grad norm of step {step}: {a!r} and {b!r}"
    return None if one.weights == other.weights else "the weights at the end"


def compare(graph: Record, plain: Record, again: Record | None) -> None:
    """Record, for the run with a CUDA graph, whether it has the plain run's bits."""
    difference = same_bits(graph, plain)
    if difference is None:
        graph.words = f"losses and weights are those of {plain.name!r}, bit for bit"
        return
    graph.ok = False
    graph.words = f"differs from {plain.name!r}: {difference}"
    if again is not None and again.ok:
        repeated = same_bits(again, plain)
        graph.words += (
            f"; but so does a second run of {plain.name!r} ({repeated}): the model's step is not "
            "repeatable here"
            if repeated
            else f"; a second run of {plain.name!r} does not"
        )


def table(records: list[Record]) -> str:
    """Return the records as a Markdown table."""

    def number(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = [
        "| run | loss | step ms | optimizer ms | inner step ms (logged) | peak MiB | state MiB | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for record in records:
        state = None if record.state_bytes is None else record.state_bytes / 2**20
        loss = number(record.losses[-1], 5) if record.losses else "-"
        inner = f"{number(record.inner_step_ms, 2)} ({number(record.logged_inner_step_ms, 2)})"
        last_line = record.words.rpartition("\n")[2]
        outcome = ("ok" if record.ok else "FAILED") + (f": {last_line}" if last_line else "")
        cells = [record.name, loss, number(record.step_ms, 2), number(record.optimizer_ms, 2)]
        cells += [inner, number(record.peak_mib), number(state, 2), outcome]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the results, as JSON")
    parser.add_argument("--seconds", type=float, default=300, help="for all runs together")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with a tiny model and few steps"
    )
    arguments = parser.parse_args()
    if not arguments.rehearse:
        import torch

        if not torch.cuda.is_available():
            print("not run: no GPU")
            return 0
    deadline = time.monotonic() + arguments.seconds
    folder = arguments.out.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    base = f"{_REHEARSED_GPT if arguments.rehearse else _GPT} {_COMMON} {_LOCAL}"
    records: list[Record] = []

    def make(name: str, flags: str) -> Record:
        left_s = deadline - time.monotonic()
        if left_s < 1:
            record = Record(name, flags, words=f"not run: {arguments.seconds:.0f} s were over")
        else:
            record = run(name, f"{base} {flags}", folder, min(_RUN_LIMIT_S, left_s))
        records.append(record)
        report()
        return record

    def report() -> None:
        arguments.out.write_text(json.dumps([asdict(record) for record in records], indent=1))

    for name, flags in RUNS.items():
        if name not in arguments.only:
            continue
        if arguments.rehearse:
            flags = flags.replace(_GRAPH, "").strip()
        record = make(name, flags)
        if name == _GRAPH_RUN and record.ok and _PLAIN_RUN in arguments.only:
            plain = next(known for known in records if known.name == _PLAIN_RUN)
            if not plain.ok:
                record.words = "not compared: the run without a CUDA graph failed"
            else:
                differs = same_bits(record, plain) is not None
                again = make(_AGAIN, RUNS[_PLAIN_RUN]) if differs else None
                compare(record, plain, again)
            if arguments.rehearse:
                record.words = f"without {_GRAPH}, a CPU has none; {record.words}"
            report()
        print(f"{record.name}: {'ok' if record.ok else 'FAILED'}, {record.seconds} s", flush=True)
    print(table(records))
    return 0 if all(record.ok for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
