"""Draw and tabulate a study: rl_countdown.png and summary.md beside runs.csv.

python rl_plot.py FOLDER
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rl_results import (
    DECIDING_SEEDS,
    RATES,
    SWEEP_SEED,
    Results,
    Run,
    best_rate,
    compare,
    is_at_edge,
    read_curves,
    read_rows,
    results_of,
)
from shared.command import exit_code_of

COLORS = {"AdamS": "#D55E00", "AdamW": "#000000"}
# A step's reward is the mean over its few problems, so the curve is the mean of this many steps.
SMOOTHED_STEPS = 10


def smoothed(values: list[float]) -> list[float]:
    """Return each value's mean with up to nine that precede it."""
    return [
        statistics.mean(values[max(0, index + 1 - SMOOTHED_STEPS) : index + 1])
        for index in range(len(values))
    ]


def shown_runs(results: Results) -> list[Run]:
    """Return the deciding seeds at the best rates; before there are any, the sweep's best."""
    best = {name: best_rate(results, name) for name in RATES if _has(results, name)}
    runs = [Run(name, lr, seed) for name, lr in best.items() for seed in DECIDING_SEEDS]
    deciding = [run for run in runs if run in results]
    return deciding or [Run(name, lr, SWEEP_SEED) for name, lr in best.items()]


def _has(results: Results, optimizer: str) -> bool:
    return any(run.optimizer == optimizer for run in results)


def draw_curves(
    axes: Axes, runs: list[Run], curves: dict[Run, dict[str, Any]], x: str, y: str
) -> None:
    """Draw a curve for each run, in its optimizer's color."""
    labeled = set()
    for run in runs:
        values = curves[run][y]
        axes.plot(
            curves[run][x],
            smoothed(values) if y == "reward" else values,
            color=COLORS[run.optimizer],
            alpha=0.8,
            linewidth=1.3,
            label=None if run.optimizer in labeled else f"{run.optimizer}, lr {run.lr:g}",
        )
        labeled.add(run.optimizer)
    axes.set(xlabel="step of GRPO")
    axes.legend(frameon=False)


def draw_rates(axes: Axes, results: Results) -> None:
    """Draw the sweep: held-out accuracy over the rate."""
    lrs = set()
    for name in RATES:
        swept = sorted(
            (run.lr, accuracy)
            for run, accuracy in results.items()
            if (run.optimizer, run.seed) == (name, SWEEP_SEED)
        )
        if swept:
            axes.plot(*zip(*swept, strict=True), marker="o", color=COLORS[name], label=name)
            lrs |= {lr for lr, _ in swept}
    axes.set_xscale("log")
    axes.set_xticks(sorted(lrs), [f"{lr:g}" for lr in sorted(lrs)], minor=False)
    axes.minorticks_off()
    axes.set(xlabel="learning rate", title=f"Sweep, seed {SWEEP_SEED}: held-out")
    if lrs:
        axes.legend(frameon=False)


def draw(results: Results, curves: dict[Run, dict[str, Any]], title: str, picture: Path) -> None:
    """Write the three panels."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.3), layout="constrained")
    figure.suptitle(title, fontsize=11)
    runs = shown_runs(results)
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
    draw_curves(panels[0], runs, curves, "steps", "reward")
    panels[0].set(
        title=f"Reward, mean of {SMOOTHED_STEPS} steps, seeds {seeds}", ylabel="share right"
    )
    draw_curves(panels[1], runs, curves, "held_out_steps", "held_out")
    panels[1].set(title=f"Held-out problems solved, seeds {seeds}")
    draw_rates(panels[2], results)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def spread(values: list[float]) -> str:
    """Return the mean and the standard deviation in percent."""
    deviation = percent(statistics.stdev(values)) if len(values) > 1 else "unknown"
    return f"{percent(statistics.mean(values))} (sd {deviation})"


def summary(rows: list[dict[str, str]]) -> str:
    """Return the results as Markdown: the sweep, and the seeds that decide."""
    results = results_of(rows)
    lines = [
        f"{len(rows)} runs of {rows[0]['steps']} steps. Numbers are the percentage of the "
        f"{rows[0]['num_held_out']} held-out problems that the model solves, greedily; before "
        f"GRPO it solves {percent(float(rows[0]['held_out_before']))}.",
        "",
        f"| optimizer | sweep, seed {SWEEP_SEED} | best rate | seeds that decide | mean |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in RATES:
        if not _has(results, name):
            continue
        swept = [
            f"{lr:g}: {percent(results[run])}"
            for lr in RATES[name]
            if (run := Run(name, lr, SWEEP_SEED)) in results
        ]
        best = best_rate(results, name)
        edge = " (an edge)" if swept and is_at_edge(results, name) else ""
        seeds = {
            seed: results[run]
            for seed in DECIDING_SEEDS
            if (run := Run(name, best, seed)) in results
        }
        by_seed = ", ".join(f"{seed}: {percent(each)}" for seed, each in seeds.items()) or "-"
        mean = spread(list(seeds.values())) if seeds else "-"
        lines.append(
            f"| {name} | {'; '.join(swept) or '-'} | {best:g}{edge} | {by_seed} | {mean} |"
        )
    comparison = compare(results)
    if comparison is not None:
        differences = ", ".join(f"{100 * each:+.1f}" for each in comparison.differences)
        lines += [
            "",
            f"AdamS minus AdamW, seed by seed: {differences} points; the mean is "
            f"{100 * statistics.mean(comparison.differences):+.1f}.",
        ]
    return "\n".join([*lines, ""])


def write(folder: Path) -> None:
    """Draw and tabulate the study in a folder.

    Raises:
        ValueError: it holds no run.
    """
    rows = read_rows(folder / "runs.csv")
    if not rows:
        raise ValueError(f"{folder}: must hold runs.csv with a run; run rl_study.py")
    first = rows[0]
    title = (
        f"GRPO on Countdown: a Llama of {int(first['num_params']):,} parameters, "
        f"{first['answers_per_step']} answers a step"
    )
    curves = read_curves(folder / "curves.jsonl")
    draw(results_of(rows), curves, title, folder / "rl_countdown.png")
    (folder / "summary.md").write_text(summary(rows))


def main() -> int:
    """Draw from the command line. The exit codes are `exit_code_of`'s."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="--out of rl_study.py")
    args = parser.parse_args()

    def program() -> None:
        write(args.folder)
        print((args.folder / "summary.md").read_text())

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
