"""Sweep the learning rates of AdamS and AdamW over short runs of the recipe, at its batch size.

    python sweep.py [--lrs 1e-3 2e-3 ...]

Writes lr_sweep.csv, lr_sweep.md and lr_sweep.png to sweep/. Runs that are in the csv file are not
repeated, so a stopped sweep continues, and you can add another learning rate.
"""

import argparse
import csv
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import job
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import prepare_data
from train import COLORS, LABELS

DEFAULT_LRS = (2.5e-4, 5e-4, 1e-3, 2e-3)
DEFAULT_STEPS = 150
RESULTS = job.FOLDER / "sweep"


@dataclass(frozen=True, order=True)
class Point:
    """One run of the sweep, with losses in nats per byte."""

    optimizer: str
    steps: int
    lr: float
    train_loss: float
    held_out_loss: float


def read_points(path: Path) -> list[Point]:
    """Read the finished runs."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Point(
                row["optimizer"],
                int(row["steps"]),
                float(row["lr"]),
                float(row["train_loss"]),
                float(row["held_out_loss"]),
            )
            for row in csv.DictReader(file)
        ]


def write_csv(points: list[Point], path: Path) -> None:
    """Write all runs, sorted by optimizer, length and learning rate."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(point) for point in sorted(points))


def run_point(
    optimizer: str, lr: float, steps: int, recipe: job.Recipe, data: job.Flags, num_gpus: int
) -> Point:
    """Train once; the run's log is kept in a temporary folder if it fails.

    Raises:
        job.RunError: training failed.
    """
    flags = recipe.flags(optimizer, num_gpus) | data | job.length_flags(steps)
    flags |= {"lr": lr, "min-lr": lr / 10}
    label = f"{LABELS[optimizer]} lr {lr:g}"
    log = Path(tempfile.mkdtemp(prefix="lr_sweep-")) / "log.txt"
    curves = job.run(
        job.torchrun_command(flags, num_gpus=num_gpus),
        log,
        lambda line: print(f"{label}  {line}", flush=True),
    )
    log.unlink()
    log.parent.rmdir()
    return Point(optimizer, steps, lr, curves.train[-1][1], curves.held_out[-1][1])


def table(points: list[Point], recipe: job.Recipe, num_gpus: int) -> str:
    """Return the sweep as Markdown: a row per learning rate, a column per optimizer.

    The best loss of each optimizer is bold.
    """
    steps = points[0].steps
    tokens = int(str(recipe.megatron["global-batch-size"])) * int(
        str(recipe.megatron["seq-length"])
    )
    losses = {(point.optimizer, point.lr): point.held_out_loss for point in points}
    best = {
        optimizer: min(loss for (name, _), loss in losses.items() if name == optimizer)
        for optimizer in {point.optimizer for point in points}
    }
    precision = "bf16 on GPUs" if num_gpus else "fp32 on two CPU processes"
    lines = [
        f"# Learning rates: {steps} steps of {tokens:,} tokens",
        "",
        f"Held-out loss in nats a byte after {steps} steps; every run has its own warmup, and",
        f"its own cosine decay to a tenth. One seed, {precision}.",
        "Made by `sweep.py`; the other settings are those of `recipe.toml`.",
        "",
        "| learning rate | " + " | ".join(LABELS.values()) + " |",
        "| --- |" + " --- |" * len(LABELS),
    ]
    for lr in sorted({point.lr for point in points}):
        cells = []
        for optimizer in LABELS:
            loss = losses.get((optimizer, lr))
            text = "" if loss is None else f"{loss:.3f}"
            cells.append(f"**{text}**" if loss == best.get(optimizer) and text else text)
        lines.append(f"| {lr:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(points: list[Point], picture: Path) -> None:
    """Draw held-out loss over learning rate."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for optimizer in LABELS:
        curve = [
            (point.lr, point.held_out_loss) for point in points if point.optimizer == optimizer
        ]
        if curve:
            axes.plot(
                *zip(*sorted(curve), strict=True),
                marker="o",
                color=COLORS[optimizer],
                label=LABELS[optimizer],
            )
    lrs = sorted({point.lr for point in points})
    axes.set_xscale("log")
    axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs], minor=False)
    axes.minorticks_off()
    axes.set(
        xlabel="peak learning rate",
        ylabel="held-out loss (nats a byte)",
        title=f"After {points[0].steps} steps",
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def write_results(
    points: list[Point], steps: int, recipe: job.Recipe, folder: Path, num_gpus: int
) -> None:
    """Write the csv file, and the table and the plot of the runs of one length."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(points, folder / "lr_sweep.csv")
    shown = [point for point in points if point.steps == steps]
    (folder / "lr_sweep.md").write_text(table(shown, recipe, num_gpus))
    plot(shown, folder / "lr_sweep.png")


def sweep(args: argparse.Namespace) -> None:
    """Run what is missing, and write the results after every run.

    Raises:
        ValueError: an argument, the recipe or the text cannot be used.
        job.RunError: training failed.
    """
    recipe = job.Recipe.load(args.recipe)
    bad = [lr for lr in args.lrs if not lr > 0]
    if bad:
        raise ValueError(f"--lrs {bad}: must be positive")
    dataset = prepare_data.prepare(args.text)
    num_gpus = job.num_visible_gpus()
    points = read_points(args.out / "lr_sweep.csv")
    done = {(point.optimizer, point.steps, point.lr) for point in points}
    for lr in args.lrs:
        for optimizer in args.optimizers:
            if (optimizer, args.steps, lr) not in done:
                data = job.data_flags(dataset)
                points.append(run_point(optimizer, lr, args.steps, recipe, data, num_gpus))
                write_results(points, args.steps, recipe, args.out, num_gpus)
    print((args.out / "lr_sweep.md").read_text())


def main() -> int:
    """Sweep from the command line. The exit codes are those of `job.exit_code_of`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--lrs", type=float, nargs="+", default=DEFAULT_LRS, help="%(default)s")
    parser.add_argument(
        "--optimizers", nargs="+", choices=list(LABELS), default=list(LABELS), help="%(default)s"
    )
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, help="of each run (%(default)s)"
    )
    parser.add_argument("--text", type=Path, help="as for train.py")
    parser.add_argument(
        "--recipe", type=Path, default=job.RECIPE, help="the settings (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="results (%(default)s)")
    args = parser.parse_args()
    return job.exit_code_of(lambda: sweep(args))


if __name__ == "__main__":
    sys.exit(main())
