"""One training run of the recipe: its command, its process, its losses and its optimizer state.

train.py and sweep.py are made of these. Nothing here imports Megatron: it runs in the processes
that are started."""

import re
import subprocess
import sys
import time
import tomllib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from prepare_data import Dataset
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared.command import (
    REPOSITORY,
    WITHOUT_TRANSFORMER_ENGINE,
    Flags,
    RunError,
    command_line_flags,
    exit_code_of,
    num_visible_gpus,
    training_environment,
)

__all__ = ["REPOSITORY", "exit_code_of", "num_visible_gpus"]  # train.py and sweep.py take them here

FOLDER = Path(__file__).resolve().parent
RECIPE = FOLDER / "recipe.toml"
SCRIPT = FOLDER / "pretrain_gpt.py"

CPU_RANKS = 2
# How long torchrun may take to end its workers: it gives them 30 s after SIGTERM.
TERMINATION_TIMEOUT_S = 40


@dataclass(frozen=True)
class Recipe:
    """The contents of recipe.toml."""

    megatron: Flags
    optimizers: dict[str, Flags]
    cpu: Flags
    gpu: Flags
    without_transformer_engine: Flags = field(default_factory=WITHOUT_TRANSFORMER_ENGINE.copy)

    @classmethod
    def load(cls, path: Path = RECIPE) -> "Recipe":
        """Read a recipe.

        Raises:
            ValueError: the file is missing, no TOML, or has other sections.
        """
        try:
            return cls(**tomllib.loads(path.read_text()))
        except (OSError, tomllib.TOMLDecodeError, TypeError) as exc:
            raise ValueError(f"recipe {path}: {exc}; compare it with {RECIPE}") from exc

    def flags(self, optimizer: str, num_gpus: int) -> Flags:
        """Return the flags of a run of this optimizer on this machine."""
        flags = self.megatron | self.optimizers[optimizer]
        flags |= self.gpu if num_gpus else self.cpu
        if not num_gpus or find_spec("transformer_engine") is None:
            flags |= self.without_transformer_engine
        return flags


@dataclass(frozen=True)
class Progress:
    """One line of Megatron's training log."""

    step: int
    num_steps: int
    ms_per_step: float
    lr: float
    loss: float


@dataclass
class Curves:
    """(step, loss in nats a byte) points of a run."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


# megatron.training.training, training_log and evaluate_and_print_results, 0.19.
_ITERATION = re.compile(
    r" iteration +(\d+)/ *(\d+) \|.* elapsed time per iteration \(ms\): ([\d.]+) \|.*"
    r" learning rate: (\S+) \|.* lm loss: (\S+) \|"
)
_VALIDATION = re.compile(r" validation loss at iteration (\d+)\b.* lm loss value: (\S+) \|")
# torchrun's report on a dead rank begins with this path. The rank's own words are above it.
_TORCHRUN_REPORT = "torch/distributed/elastic/multiprocessing/api.py"


def parse_line(line: str) -> Progress | tuple[int, float] | None:
    """Read a line of a Megatron log: a training line, an evaluation as (step, loss), or neither."""
    if match := _ITERATION.search(line):
        step, num_steps, ms_per_step, lr, loss = match.groups()
        return Progress(int(step), int(num_steps), float(ms_per_step), float(lr), float(loss))
    if match := _VALIDATION.search(line):
        return int(match[1]), float(match[2])
    return None


def data_flags(dataset: Dataset) -> Flags:
    """Return the flags that train on a prepared dataset."""
    return {
        "train-data-path": dataset.train_prefix,
        "valid-data-path": dataset.held_out_prefix,
        "data-cache-path": dataset.train_prefix.parent / "index",
    }


def length_flags(steps: int) -> Flags:
    """Return the flags of a run of another length: evaluated twice on the way and once at the end.

    Raises:
        ValueError: steps is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    return {
        "train-iters": steps,
        # Not a divisor of steps: the last step would be evaluated as a part of training and again
        # after it.
        "eval-interval": steps // 3 + 1,
        "log-interval": max(1, steps // 20),
    }


def num_ranks(flags: Flags, num_gpus: int) -> int:
    """Return how many ranks to use: 2 CPU processes, or as many GPUs as the batch divides into.

    Raises:
        ValueError: global-batch-size is no multiple of a given micro-batch-size.
    """
    batch, micro_batch = (
        int(str(flags.get(name, 1))) for name in ("global-batch-size", "micro-batch-size")
    )
    if batch % micro_batch:
        raise ValueError(
            f"global-batch-size={batch}: must be a multiple of micro-batch-size={micro_batch}"
        )
    wanted = num_gpus or CPU_RANKS
    return max(ranks for ranks in range(1, wanted + 1) if batch // micro_batch % ranks == 0)


def torchrun_command(flags: Flags, *, num_gpus: int) -> list[str]:
    """Return the command that trains with these flags on this machine.

    If the flags give no micro-batch-size, a rank takes its whole part of the batch at once.
    """
    ranks = num_ranks(flags, num_gpus)
    flags = {"micro-batch-size": int(str(flags["global-batch-size"])) // ranks} | flags
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "-m", "megatron_adams.launch"),
        *([] if num_gpus else ["--cpu-rehearsal"]),
        str(SCRIPT),
        *command_line_flags(flags),
    ]


@contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a session of its own, and end it on the way out."""
    environment = {
        # At start, Megatron makes Inductor compile some fusions. That takes a C compiler, and more
        # time than this model gains. --disable-jit-fuser comes too late to prevent it (0.19).
        "TORCHDYNAMO_DISABLE": "1",
        **training_environment(CPU_RANKS),
    }
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers, which are in sessions of their own
            try:
                process.wait(TERMINATION_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def run(command: list[str], log: Path, report: Callable[[str], None]) -> Curves:
    """Run a training command, keep its output in `log`, and report its progress line by line.

    Raises:
        RunError: it failed, or logged no loss.
    """
    curves = Curves()
    last_lines: deque[str] = deque(maxlen=20)
    torchrun_reports = False
    start = time.monotonic()
    with _running(command) as process, log.open("w") as log_file:
        assert process.stdout is not None
        for line in process.stdout:
            log_file.write(line)
            log_file.flush()
            torchrun_reports = torchrun_reports or _TORCHRUN_REPORT in line
            if not torchrun_reports:
                last_lines.append(line)
            parsed = parse_line(line)
            if isinstance(parsed, Progress):
                curves.train.append((parsed.step, parsed.loss))
                left_s = (parsed.num_steps - parsed.step) * parsed.ms_per_step / 1e3
                report(
                    f"step {parsed.step:4d}/{parsed.num_steps}  loss {parsed.loss:.3f}  "
                    f"lr {parsed.lr:.1e}  {parsed.ms_per_step:.0f} ms/step  {left_s:.0f} s left"
                )
            elif parsed is not None:
                curves.held_out.append(parsed)
                report(f"step {parsed[0]:4d}  held-out loss {parsed[1]:.3f}")
        exit_code = process.wait()
    if exit_code or not curves.train or not curves.held_out:
        reason = f"exit code {exit_code}" if exit_code else "it logged no loss"
        raise RunError(
            f"training failed ({reason}) after {time.monotonic() - start:.0f} s; its last lines:\n"
            f"\n{''.join(last_lines)}\nthe whole log: {log}"
        )
    return curves


def saved_optimizer_bytes(checkpoint: Path) -> dict[str, int]:
    """Add up the optimizer tensors of a torch_dist checkpoint, as its metadata lists them.

    Args:
        checkpoint: what `--save` was given.

    Returns:
        Bytes over all ranks of each kind of optimizer tensor: "exp_avg", "exp_avg_sq", "param" (the
        fp32 copy).
    """
    step = int((checkpoint / "latest_checkpointed_iteration.txt").read_text())
    metadata = FileSystemReader(checkpoint / f"iter_{step:07d}").read_metadata()
    num_bytes: dict[str, int] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and "optimizer" in name:
            kind = next(k for k in ("exp_avg_sq", "exp_avg", "param") if k in name)
            size = entry.size.numel() * entry.properties.dtype.itemsize
            num_bytes[kind] = num_bytes.get(kind, 0) + size
    return num_bytes
