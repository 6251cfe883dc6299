"""Draw and tabulate the GPU study: writes quality.png and summary.md next to quality.csv.

python plot.py FOLDER"""

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import results
import schedule
from matplotlib.axes import Axes
from schedule import (
    ADAMS,
    ADAMW,
    CANDIDATES,
    CHANGED_ADAMW,
    MARGIN,
    Losses,
    Run,
    Variant,
)
from shared.command import exit_code_of

ORDER = (ADAMW, ADAMS, *CANDIDATES, *CHANGED_ADAMW)
# The colors are from Okabe and Ito's palette. A changed AdamW has the color of the AdamS with the
# same change, but is dashed.
_CANDIDATE_COLORS = ("#009E73", "#CC79A7", "#56B4E9")
COLORS = {ADAMW.name: "#000000", ADAMS.name: "#D55E00"}
COLORS |= {each.name: color for each, color in zip(CANDIDATES, _CANDIDATE_COLORS, strict=True)}
COLORS |= {each.name: color for each, color in zip(CHANGED_ADAMW, _CANDIDATE_COLORS, strict=True)}
_OTHER_CHANGES = {
    "beta1 0.8": "#E69F00",
    "beta1 0.95": "#0072B2",
    "capped": "#999999",
    "matched": "#882255",
}
COLORS |= {
    f"{name} {change}": color
    for name in (ADAMW.name, ADAMS.name)
    for change, color in _OTHER_CHANGES.items()
}


def style(name: str) -> dict[str, Any]:
    """Return how a variant is drawn: each change has a color, and AdamW's line is dashed."""
    is_changed_adamw = name.startswith(f"{ADAMW.name} ")
    return {"color": COLORS[name], "linestyle": "--" if is_changed_adamw else "-"}


def draw_rates(
    axes: Axes,
    losses: Losses,
    axis: str = "A",
    variants: Iterable[Variant] = ORDER,
    title: str = "A: lines are seed 0, points all seeds; diverged runs are left out",
    unit: str = "token",
) -> None:
    """Draw the held-out loss over the peak rate: one point per seed, a line for seed 0.

    Only seed 0 was run at all rates. A bar goes from the lowest to the highest seed at a rate.
    """
    lrs: set[float] = set()
    for variant in variants:
        by_lr: dict[float, list[float]] = {}
        for run, loss in losses.items():
            if (run.axis, run.variant) == (axis, variant.name) and math.isfinite(loss):
                by_lr.setdefault(run.lr, []).append(loss)
        if not by_lr:
            continue
        lrs |= set(by_lr)
        rates = sorted(by_lr)
        chosen = sorted(schedule.rates_of(losses, variant, axis).items())
        axes.plot(*zip(*chosen, strict=True), label=variant.name, **style(variant.name))
        axes.vlines(
            rates,
            [min(by_lr[lr]) for lr in rates],
            [max(by_lr[lr]) for lr in rates],
            color=COLORS[variant.name],
        )
        points = [(lr, loss) for lr in rates for loss in by_lr[lr]]
        axes.scatter(*zip(*points, strict=True), s=14, color=COLORS[variant.name], zorder=3)
    axes.set_xscale("log")
    axes.set_xticks(sorted(lrs), [f"{lr:g}" for lr in sorted(lrs)], minor=False)
    axes.minorticks_off()
    axes.set(
        xlabel="peak learning rate",
        ylabel=f"held-out loss (nats a {unit})",
        title=title,
    )
    axes.legend(frameon=False, fontsize=7, ncols=2)


def draw_differences(axes: Axes, losses: Losses) -> None:
    """Draw paired differences to AdamW: a point per seed, a line at the mean, a bar of spread."""
    ticks: list[str] = []
    for variant in ORDER[1:]:
        for axis in ("A", "B"):
            comparison = schedule.paired(losses, variant, axis)
            if comparison is None:
                continue
            x = len(ticks)
            ticks.append(f"{variant.name}\n{axis}, n={len(comparison.differences)}")
            color = COLORS[variant.name]
            values = list(comparison.differences.values())
            axes.scatter([x] * len(values), values, s=18, color=color, zorder=3)
            axes.hlines(comparison.mean, x - 0.25, x + 0.25, color=color)
            if math.isfinite(comparison.spread):
                axes.errorbar(x, comparison.mean, comparison.spread, color=color, capsize=4)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.axhline(MARGIN, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(ticks)), ticks, fontsize=7)
    axes.set_xlim(-0.6, max(1, len(ticks)) - 0.4)
    axes.set(
        ylabel="held-out loss minus AdamW's (nats a token)",
        title=f"Paired by seed, seeds that chose nothing; dotted: {MARGIN:+g}",
    )


def compared(losses: Losses) -> list[tuple[str, Run]]:
    """Return each variant's runs with seed 0 at its best rate, A before B."""
    runs = []
    for axis in ("A", "B"):
        for variant in ORDER:
            lr = schedule.best_rate(losses, variant)
            if lr is not None and (run := Run(axis, variant.name, lr, 0)) in losses:
                runs.append((f"{variant.name} {lr:g}", run))
    return runs


def draw_curves(axes: Axes, losses: Losses, curves: dict[Run, dict[str, Any]]) -> None:
    """Draw the training loss of axis A at each variant's best rate."""
    for label, run in compared(losses):
        if run.axis == "A" and run in curves:
            axes.plot(
                curves[run]["steps"], curves[run]["loss"], label=label, **style(run.variant), lw=1
            )
    axes.set(xlabel="step", ylabel="training loss (nats a token)", title="A: best rates, seed 0")
    axes.legend(frameon=False, fontsize=7)


def draw_cosines(axes: Axes, losses: Losses, curves: dict[Run, dict[str, Any]]) -> None:
    """Draw the cosine of a matrix's gradients over their distance in steps; B has rings."""
    for label, run in compared(losses):
        cosines = curves.get(run, {}).get("gradient_cosines")
        if cosines:
            axes.plot(
                range(1, len(cosines) + 1),
                cosines,
                marker="o" if run.axis == "B" else "",
                markerfacecolor="none",
                label=f"{run.axis} {label}",
                lw=1,
                **style(run.variant),
            )
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(
        xlabel="steps apart",
        ylabel="cosine",
        title="Gradients of one matrix in the middle of the run; rings: B",
    )
    axes.legend(frameon=False, fontsize=7, ncols=2)


def draw(losses: Losses, curves: dict[Run, dict[str, Any]], title: str, picture: Path) -> None:
    """Write the four panels."""
    figure, panels = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    figure.suptitle(title)
    draw_rates(panels[0, 0], losses)
    draw_differences(panels[0, 1], losses)
    draw_curves(panels[1, 0], losses, curves)
    draw_cosines(panels[1, 1], losses, curves)
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def summary(losses: Losses) -> str:
    """Return the results as Markdown: a row per variant, then the verdict by PLAN.md's rule."""
    lines = [
        f"{len(losses)} runs, {sum(map(math.isinf, losses.values()))} of them diverged. Losses are "
        "held-out nats a token.",
        "",
        "| variant | rates tried | best rate | loss there, A, by seed | to AdamW in A | in B |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for variant in ORDER:
        best = schedule.best_rate(losses, variant)
        if best is None:
            continue
        edge = ", an edge" if schedule.is_at_edge(losses, variant) else ""
        by_seed = {
            run.seed: loss
            for run, loss in losses.items()
            if (run.axis, run.variant, run.lr) == ("A", variant.name, best)
        }
        cells = [
            variant.name,
            ", ".join(f"{lr:g}" for lr in sorted(schedule.rates_of(losses, variant))),
            f"{best:g}{edge}",
            ", ".join(f"{by_seed[seed]:.4f}" for seed in sorted(by_seed)),
        ]
        for axis in ("A", "B"):
            comparison = schedule.paired(losses, variant, axis)
            if variant is ADAMW or comparison is None:
                cells.append("-")
            else:
                spread = "unknown" if math.isnan(comparison.spread) else f"{comparison.spread:.4f}"
                num_pairs = len(comparison.differences)
                cells.append(f"{comparison.mean:+.4f} (n={num_pairs}, sd {spread})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", schedule.decide(losses), ""])


def write(folder: Path) -> None:
    """Write quality.png and summary.md beside the results, and print the summary.

    Raises:
        ValueError: there are no results.
    """
    rows = results.rows_of_study(folder, "gpu_study.py")
    losses = results.losses_of(rows)
    first = rows[0]
    title = (
        f"{int(first['num_params']):,} parameters, {first['steps']} steps of "
        f"{int(first['tokens_per_step']):,} tokens in A; {first['device']}"
    )
    curves = results.read_curves(folder / "curves.jsonl")
    draw(losses, curves, title, folder / "quality.png")
    text = summary(losses)
    (folder / "summary.md").write_text(text)
    print(text)


def main() -> int:
    """Draw from the command line. The exit codes are `exit_code_of`'s."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="--out of gpu_study.py")
    args = parser.parse_args()
    return exit_code_of(lambda: write(args.folder))


if __name__ == "__main__":
    sys.exit(main())
