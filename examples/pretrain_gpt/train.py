"""Train a small GPT with AdamS, then with AdamW at the same settings, and compare the two.

    python train.py [--text FILE_OR_FOLDER] [--optimizers adams adams-paper adamw]

Prepares the data if they are missing. Trains on all GPUs, or on two CPU processes if there is none.
Writes logs, checkpoints, summary.json and summary.png to a folder in runs/. The settings are in
recipe.toml.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import job
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import prepare_data

# The recipe's optimizers. Color-blind readers can tell the colors apart.
LABELS = {"adams": "AdamS cautious", "adams-paper": "AdamS", "adamw": "AdamW"}
COLORS = {"adams": "#0072B2", "adams-paper": "#009E73", "adamw": "#D55E00"}
COMPARED = ("adams", "adamw")
STATE_COLORS = {"exp_avg": "#56B4E9", "exp_avg_sq": "#E69F00"}
MIB = 2**20


@dataclass(frozen=True)
class Result:
    """The results of a run."""

    curves: job.Curves
    optimizer_bytes: dict[str, int]
    wall_s: float

    @property
    def held_out_loss(self) -> float:
        """The last held-out loss, in nats per byte."""
        return self.curves.held_out[-1][1]

    @property
    def state_bytes(self) -> dict[str, int]:
        """The bytes of the moments alone. The parameters are the same in both runs."""
        return {kind: size for kind, size in self.optimizer_bytes.items() if kind != "param"}


def train(
    optimizer: str, recipe: job.Recipe, overrides: job.Flags, folder: Path, num_gpus: int
) -> Result:
    """Train with one optimizer, and show progress.

    Raises:
        job.RunError: training failed.
    """
    label = LABELS[optimizer]
    checkpoint = folder / optimizer / "checkpoint"
    checkpoint.mkdir(parents=True)
    flags = recipe.flags(optimizer, num_gpus) | {"save": checkpoint} | overrides
    command = job.torchrun_command(flags, num_gpus=num_gpus)
    (folder / optimizer / "command.sh").write_text(shlex.join(command) + "\n")
    ranks = job.num_ranks(flags, num_gpus)
    print(f"\n{label}: starting {ranks} {'GPU' if num_gpus else 'CPU'} ranks", flush=True)
    start = time.monotonic()
    curves = job.run(
        command, folder / optimizer / "log.txt", lambda line: print(f"{label}  {line}", flush=True)
    )
    return Result(curves, job.saved_optimizer_bytes(checkpoint), time.monotonic() - start)


def summary_lines(results: dict[str, Result], statistics: prepare_data.TextStatistics) -> list[str]:
    """Return the summary that the terminal shows."""
    lines = [
        f"{'':15}{'held-out loss':>15}{'optimizer state':>19}   {'of which':40}{'wall time':>9}"
    ]
    for optimizer, result in results.items():
        parts = ", ".join(
            f"{kind} {size / MIB:.2f} MiB" for kind, size in result.state_bytes.items()
        )
        lines.append(
            f"{LABELS[optimizer]:15}{result.held_out_loss:10.3f} nats"
            f"{sum(result.state_bytes.values()) / MIB:15.2f} MiB   {parts:40}{result.wall_s:7.0f} s"
        )
    lines.append(
        f"for comparison, in nats a byte: bigram entropy of the held-out text "
        f"{statistics.bigram_entropy:.3f}, loss of a bigram table fitted to the training text "
        f"{statistics.bigram_cross_entropy:.3f}"
    )
    return lines


def plot_summary(
    results: dict[str, Result], statistics: prepare_data.TextStatistics, picture: Path
) -> None:
    """Draw both runs' losses and the bytes of their optimizer state."""
    figure, (losses, memory) = plt.subplots(
        1, 2, figsize=(11, 4.5), width_ratios=[2.4, 1], layout="constrained"
    )
    for optimizer, result in results.items():
        color, label = COLORS[optimizer], LABELS[optimizer]
        losses.plot(*zip(*result.curves.train, strict=True), color=color, alpha=0.45, linewidth=1.2)
        losses.plot(
            *zip(*result.curves.held_out, strict=True),
            color=color,
            marker="o",
            linewidth=1.8,
            label=f"{label}, held-out ({result.held_out_loss:.3f} at the end)",
        )
    losses.plot([], [], color="gray", alpha=0.6, linewidth=1.2, label="thin: training batches")
    losses.axhline(
        statistics.bigram_entropy,
        color="black",
        linestyle="--",
        linewidth=1,
        label=f"bigram entropy of the held-out text ({statistics.bigram_entropy:.3f})",
    )
    top = max(loss for result in results.values() for _, loss in result.curves.train)
    losses.set_ylim(top=min(top, statistics.unigram_entropy + 0.3))
    losses.set(xlabel="step", ylabel="loss (nats a byte)", title="Loss")
    losses.legend(frameon=False, fontsize=9)
    losses.grid(alpha=0.25)

    for position, result in enumerate(results.values()):
        bottom = 0.0
        for kind, size in result.state_bytes.items():
            memory.bar(position, size / MIB, 0.6, bottom=bottom, color=STATE_COLORS[kind])
            memory.text(position, bottom + size / MIB / 2, kind, ha="center", va="center")
            bottom += size / MIB
        memory.text(position, bottom, f"{bottom:.2f} MiB", ha="center", va="bottom")
    memory.set_xticks(range(len(results)), [LABELS[optimizer] for optimizer in results])
    memory.set(ylabel="MiB over all ranks", title="Optimizer state in the checkpoint")
    memory.margins(y=0.12)
    for axes in (losses, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def write_summary(
    results: dict[str, Result], statistics: prepare_data.TextStatistics, folder: Path
) -> None:
    """Write summary.json and summary.png."""
    record = {
        "text": asdict(statistics),
        "runs": {
            optimizer: {**asdict(result), "held_out_loss": result.held_out_loss}
            for optimizer, result in results.items()
        },
    }
    (folder / "summary.json").write_text(json.dumps(record, indent=2) + "\n")
    plot_summary(results, statistics, folder / "summary.png")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small GPT with AdamS, then with AdamW at the same settings, and "
        "compare the two. Uses all GPUs, or two CPU processes where there is none."
    )
    parser.add_argument(
        "--text",
        type=Path,
        help="a text file, or a folder of them; default: this Python's standard library",
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=list(LABELS),
        default=COMPARED,
        help="of the recipe, in this order; default: %(default)s",
    )
    parser.add_argument(
        "--steps", type=int, help="training steps of each run; default: train-iters of the recipe"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="a new folder for logs, checkpoints and summary; default: runs/pretrain_gpt/<time>",
    )
    parser.add_argument(
        "--recipe", type=Path, default=job.RECIPE, help="the settings (%(default)s)"
    )
    return parser.parse_args()


def run_job(args: argparse.Namespace) -> Path:
    """Prepare, train with each optimizer, summarize.

    Returns:
        The folder of the results.

    Raises:
        ValueError: an argument, the recipe or the text cannot be used.
        job.RunError: training failed.
    """
    start = time.monotonic()
    recipe = job.Recipe.load(args.recipe)
    overrides: job.Flags = {} if args.steps is None else job.length_flags(args.steps)
    folder = args.out or job.REPOSITORY / "runs" / "pretrain_gpt" / time.strftime("%Y%m%d-%H%M%S")
    if folder.exists():
        raise ValueError(f"--out {folder}: exists already; give a new folder or remove this one")

    print("Preparing the data (some seconds the first time) ...", flush=True)
    dataset = prepare_data.prepare(args.text)
    print(prepare_data.describe(dataset), flush=True)
    overrides |= job.data_flags(dataset)

    num_gpus = job.num_visible_gpus()
    results = {
        optimizer: train(optimizer, recipe, overrides, folder.resolve(), num_gpus)
        for optimizer in args.optimizers
    }
    write_summary(results, dataset.statistics, folder)
    print()
    print("\n".join(summary_lines(results, dataset.statistics)))
    print(f"{time.monotonic() - start:.0f} s in all; picture: {folder / 'summary.png'}")
    return folder


def main() -> int:
    """Run the job from the command line. The exit codes are those of `job.exit_code_of`."""
    args = parse_arguments()
    return job.exit_code_of(lambda: run_job(args))


if __name__ == "__main__":
    sys.exit(main())
