"""Pretrain or distil one small encoder on this machine: a step of the pipeline.

    run_training.py --model small --data DATA --steps 3000 --out OUT
    run_training.py --model tiny --data DATA --steps 2000 --out OUT --teacher TEACHER -- \\
        --kl-weight 0.5

It takes all GPUs, or as many CPU processes as there are cores, up to 2 (--processes). With
--teacher it distils, otherwise it pretrains. Outputs, in --out: the model's folder `model`,
log.txt, command.sh, and curve.json: the training's and the held-out text's losses by step, the
held-out text's loss by the frequencies of tokens alone, the bytes of the optimizer's state and the
last run's seconds. It goes on from the last checkpoint of a run that was stopped, if Megatron can:
without TransformerEngine and Apex, a run with AdamW begins from nothing, and says so.

A model that is no better than those frequencies makes worse students and fine-tunes than random
weights do. So the run then fails, or says it: --gate."""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "pretrain_gpt"))

import encoder
import job
import train_encoder
from shared.command import (
    WITHOUT_TRANSFORMER_ENGINE,
    Flags,
    RunError,
    command_line_flags,
    exit_code_of,
    num_visible_gpus,
)
from shared.recipe import OPTIMIZERS, Recipe, parse_flags

MODEL = "model"
CURVE = "curve.json"
LOG, EARLIER_LOGS = "log.txt", "earlier-logs.txt"
GATES = ("stop", "say")

# They are for a job on a cluster; a small one on this machine has no use for them.
_LEFT_OUT = ("log-throughput", "log-memory-to-tensorboard", "manual-gc", "manual-gc-interval")


@dataclass(frozen=True)
class Training:
    """What is asked for.

    Attributes:
        data: the dataset whose held-out text is the validation set.
        blend: more datasets with their shares; data has the rest.
        start: a model whose weights are gone on from, or None.
        teacher: a model that is distilled, or None.
        batch: sequences of a step.
        processes: 1 or 2, on a CPU; each takes its part of the batch.
        gate: what happens where the model is no better than the frequencies of tokens.
    """

    model: str
    optimizer: str
    data: Path
    blend: tuple[tuple[Path, float], ...]
    steps: int
    batch: int
    start: Path | None
    teacher: Path | None
    seed: int
    out: Path
    extra: Flags
    processes: int = 2
    gate: str = "stop"

    def script(self) -> Path:
        """Return the Megatron script."""
        name = "pretrain_encoder.py" if self.teacher is None else "distil_encoder.py"
        return train_encoder.FOLDER / name

    def flags(self, num_gpus: int, max_length: int) -> Flags:
        """Return the script's flags.

        Args:
            max_length: tokens of the longest sequence that the data may hold.
        """
        recipe = Recipe.load(train_encoder.RECIPE)
        flags = recipe.flags(self.model, self.optimizer, "bf16", transformer_engine=False)
        flags = {name: value for name, value in flags.items() if name not in _LEFT_OUT}
        flags |= WITHOUT_TRANSFORMER_ENGINE | train_encoder.dataset_flags(self.data)
        flags |= {
            "train-iters": self.steps,
            "global-batch-size": self.batch,
            "lr-warmup-iters": max(1, self.steps // 20),
            "seq-length": max_length,
            "max-position-embeddings": max_length,
            "seed": self.seed,
            "eval-interval": max(1, self.steps // 4) + 1,
            "eval-iters": 16,
            "log-interval": max(1, self.steps // 50),
            "save-interval": max(1, self.steps // 3),
            "save": self.out / MODEL,
            "load": self.out / MODEL,
            "data-cache-path": self.out / "index",
        }
        if self.blend:
            flags["train-data-path"] = self._blend()
        if self.start is not None:
            flags["pretrained-checkpoint"] = self.start
        if self.teacher is not None:
            flags["teacher"] = self.teacher
        del flags["micro-batch-size"]  # a rank takes its part of the batch at once
        if not num_gpus:
            del flags["bf16"]
            flags |= {"num-workers": 0, "distributed-backend": "gloo"}
        return flags | self.extra

    def _blend(self) -> list[object]:
        rest = 1 - sum(share for _, share in self.blend)
        parts = [(self.data, rest), *self.blend]
        return [word for path, share in parts for word in (share, path.resolve() / "train")]


def command(training: Training, flags: Flags, num_gpus: int) -> list[str]:
    """Return the torchrun command."""
    if not num_gpus and training.processes == 1:
        flags = {"micro-batch-size": training.batch} | flags
    ranks = job.num_ranks(flags, num_gpus)
    flags = {"micro-batch-size": training.batch // ranks} | flags
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "-m", "megatron_adams.launch"),
        *([] if num_gpus else ["--cpu-rehearsal"]),
        str(training.script()),
        *command_line_flags(flags),
    ]


def check(training: Training) -> None:
    """Raise ValueError for values out of range."""
    if training.steps < 4:
        raise ValueError(f"--steps {training.steps}: must be at least 4")
    shares = [share for _, share in training.blend]
    if any(not share > 0 for share in shares) or sum(shares) >= 1:
        raise ValueError(f"--blend {shares}: shares must be above 0, and together below 1")
    if training.processes not in range(1, job.CPU_RANKS + 1):
        raise ValueError(f"--processes {training.processes}: must be from 1 to {job.CPU_RANKS}")
    if training.start is not None and training.teacher is not None:
        raise ValueError("--start and --teacher: give one; a student begins with random weights")


def unigram_loss(training: Training) -> float:
    """Return the held-out text's loss by the frequencies of tokens alone, in nats.

    Raises:
        ValueError: the dataset does not say it.
    """
    record = train_encoder.prepare_text.read_record(training.data)
    if "unigram_loss" not in record:
        raise ValueError(
            f"--data {training.data}: its dataset.json must have unigram_loss, which the model is "
            "compared with; make the dataset again with prepare_text.py"
        )
    return float(record["unigram_loss"])


def gate(training: Training, curve: dict[str, Any]) -> str:
    """Compare the model with the frequencies of tokens, and return what came out.

    Raises:
        RunError: it is no better, and the training's gate is "stop".
    """
    loss, limit = curve["held_out"][-1][1], curve["unigram_loss"]
    if loss < limit:
        return f"{limit - loss:.3f} nats better than the frequencies of tokens ({limit:.3f})"
    said = (
        f"the held-out loss of {training.out / MODEL} is {loss:.3f} nats after {training.steps} "
        f"steps: must be below {limit:.3f}, which the frequencies of the training text's tokens "
        f"alone give on {training.data}; train for more steps (--steps), or at another rate "
        "(-- --lr)"
    )
    if training.gate == "stop":
        raise RunError(f"{said}; with --gate say, it is said and passed")
    return f"passed, as --gate is say: {said}"


def cannot_resume(training: Training) -> bool:
    """Say whether a checkpoint of this training cannot be gone on from.

    Without TransformerEngine and Apex, Megatron's distributed optimizer takes torch's AdamW, whose
    step it asks for before it has loaded any (distrib_optimizer.py, state_dict, 0.19).
    """
    has_fused_adam = any(find_spec(name) for name in ("transformer_engine", "apex"))
    return (
        training.optimizer == "adamw"
        and not has_fused_adam
        and encoder.has_checkpoint(training.out / MODEL)
    )


def keep_log(out: Path) -> None:
    """Put the log of a stopped run behind those before it; drop them if nothing is resumed."""
    log, earlier = out / LOG, out / EARLIER_LOGS
    if not encoder.has_checkpoint(out / MODEL):
        earlier.unlink(missing_ok=True)
    elif log.is_file():
        with earlier.open("a") as file:
            file.write(log.read_text(errors="replace"))


def whole_curves(curves: job.Curves, earlier: Path) -> job.Curves:
    """Put the points of earlier logs before those of a resumed run; a step repeated counts once."""
    lines = earlier.read_text().splitlines() if earlier.is_file() else []
    train: dict[int, float] = {}
    held_out: dict[int, float] = {}
    for parsed in map(job.parse_line, lines):
        if isinstance(parsed, job.Progress):
            train[parsed.step] = parsed.loss
        elif parsed is not None:
            held_out[parsed[0]] = parsed[1]
    train |= dict(curves.train)
    held_out |= dict(curves.held_out)
    return job.Curves(sorted(train.items()), sorted(held_out.items()))


def run(training: Training) -> dict[str, Any]:
    """Train, and return the contents of curve.json.

    Raises:
        ValueError: a setting or the data cannot be used.
        RunError: training failed, or the model does not pass the gate.
    """
    check(training)
    limit = unigram_loss(training)
    record = train_encoder.prepare_text.read_record(training.data)
    num_gpus = num_visible_gpus()
    flags = training.flags(num_gpus, record["settings"]["max_length"])
    if cannot_resume(training):
        print(
            f"{training.out / MODEL}: begins from nothing, as Megatron cannot go on with torch's "
            "AdamW (it could with TransformerEngine or Apex)",
            flush=True,
        )
        shutil.rmtree(training.out / MODEL)
    training.out.mkdir(parents=True, exist_ok=True)
    words = command(training, flags, num_gpus)
    (training.out / "command.sh").write_text(shlex.join(words) + "\n")
    keep_log(training.out)
    start = time.monotonic()
    curves = job.run(words, training.out / LOG, lambda line: print(line, flush=True))
    curves = whole_curves(curves, training.out / EARLIER_LOGS)
    curve = {
        "model": training.model,
        "optimizer": training.optimizer,
        "train": curves.train,
        "held_out": curves.held_out,
        "unigram_loss": limit,
        "optimizer_bytes": job.saved_optimizer_bytes(training.out / MODEL),
        "seconds": time.monotonic() - start,
    }
    (training.out / CURVE).write_text(json.dumps(curve, indent=2) + "\n")
    print(gate(training, curve), flush=True)
    return curve


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], epilog="Flags of Megatron after -- win."
    )
    add = parser.add_argument
    add("--model", required=True, choices=list(Recipe.load(train_encoder.RECIPE).models))
    add("--optimizer", default="adams", choices=OPTIMIZERS, help="(%(default)s)")
    add("--data", type=Path, required=True, help="a dataset of prepare_text.py")
    add("--blend", nargs=2, action="append", default=[], metavar=("DATA", "SHARE"), help="more")
    add("--steps", type=int, required=True)
    add("--batch", type=int, default=24, help="sequences of a step (%(default)s)")
    add("--start", type=Path, help="a model's folder to go on from: Stage 2")
    add("--teacher", type=Path, help="a model's folder to distil")
    add("--seed", type=int, default=1234, help="(%(default)s)")
    add("--processes", type=int, help="on a CPU (1 or 2, as many as there are cores)")
    add("--gate", choices=GATES, default="stop", help="see above (%(default)s)")
    add("--out", type=Path, required=True)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train from the command line; 2 for what the user has to change, 1 for a failed run."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, extra = words, []
    if "--" in words:
        own, extra = words[: words.index("--")], words[words.index("--") + 1 :]

    def program() -> None:
        args = vars(_parser().parse_args(own))
        blend = tuple((Path(path), float(share)) for path, share in args.pop("blend"))
        out = args.pop("out").resolve()
        if args["processes"] is None:
            args["processes"] = min(job.CPU_RANKS, len(os.sched_getaffinity(0)))
        curve = run(Training(**args, blend=blend, out=out, extra=parse_flags(extra)))
        print(f"held-out loss {curve['held_out'][-1][1]:.3f}; {curve['seconds']:.0f} s")

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
