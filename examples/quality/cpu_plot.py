"""Draw and tabulate the CPU study or a GPU study but the first: writes quality.png and summary.md.

python cpu_plot.py [FOLDER]"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import cpu_schedule
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import plot
import results
from cpu_schedule import (
    ADAMS,
    ADAMW,
    BATCH_SIZES,
    GPU_3_SETTINGS,
    GPU_SETTINGS,
    MARGIN,
    SETTINGS,
    VARIANTS,
)
from cpu_study import RUNS
from matplotlib.axes import Axes
from schedule import Losses, Paired, Run, Variant, best_rate, is_at_edge, rates_of
from shared.command import exit_code_of


def settings_of(losses: Losses) -> list[str]:
    """Return the settings that have runs: the batch sizes first, by tokens a step."""
    order = (*BATCH_SIZES, *(name for name in SETTINGS if name not in BATCH_SIZES))
    return [name for name in order if any(run.axis == name for run in losses)]


def deciding(losses: Losses) -> tuple[str, ...]:
    """Return the settings that decide in the study that the runs belong to."""
    axes = {run.axis for run in losses}
    for settings in (GPU_SETTINGS, GPU_3_SETTINGS):
        if axes & set(settings):
            return settings
    return BATCH_SIZES


def seeds_at_best(losses: Losses, setting: str, variant: Variant) -> dict[int, float]:
    """Return seed -> loss at the variant's best rate."""
    lr = best_rate(losses, variant, setting)
    if lr is None:
        return {}
    runs = {seed: Run(setting, variant.name, lr, seed) for seed in {run.seed for run in losses}}
    return {seed: losses[run] for seed, run in sorted(runs.items()) if run in losses}


def with_interval(found: Paired | None) -> str:
    """Return a mean difference with half of its 95% interval; "-" if there is none."""
    if found is None:
        return "-"
    if not math.isfinite(found.half_width):
        return f"{found.mean:+.3f} (n=1)"
    return f"{found.mean:+.3f} ± {found.half_width:.3f} (n={len(found.differences)})"


def losses_table(losses: Losses) -> list[str]:
    """Return a row per setting and variant: rates, losses, differences to AdamW and to AdamS."""
    lines = [
        "| setting | variant | best rate | rates tried | loss, seed 0 | mean of other seeds "
        "| lowest, median, highest of them | to AdamW | to the better AdamW | to AdamS |",
        "| --- | --- |" + " ---: |" * 8,
    ]
    for setting in settings_of(losses):
        reference = cpu_schedule.reference(losses, setting)
        for variant in VARIANTS.values():
            lr = best_rate(losses, variant, setting)
            if lr is None:
                continue
            by_seed = seeds_at_best(losses, setting, variant)
            others = [loss for seed, loss in by_seed.items() if seed != 0]
            cells = [
                setting,
                variant.name,
                f"{lr:g}" + (", an edge" if is_at_edge(losses, variant, setting) else ""),
                str(len(rates_of(losses, variant, setting))),
                f"{by_seed[0]:.3f}",
                f"{statistics.fmean(others):.3f}" if others else "-",
                f"{min(others):.3f}, {statistics.median(others):.3f}, {max(others):.3f}"
                if others
                else "-",
            ]
            cells += [
                "-"
                if variant is other
                else with_interval(cpu_schedule.compare(losses, setting, variant, other))
                for other in (ADAMW, reference, ADAMS)
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def rates_table(rows: list[dict[str, str]], losses: Losses) -> list[str]:
    """Return a row per setting: best rates as a part of AdamW's, and the update RMS of matrices."""
    run_names = {run.variant for run in losses}
    ours = [
        variant
        for variant in VARIANTS.values()
        if variant.family == "adams" and variant.name in run_names
    ]
    lines = [
        "| setting | AdamW's best rate | "
        + " | ".join(f"{variant.name} / AdamW" for variant in ours)
        + " | update RMS of AdamS | of AdamW on the same gradients |",
        "| --- |" + " ---: |" * (len(ours) + 3),
    ]
    by_run = {results.run_of(row): row for row in rows}
    for setting in settings_of(losses):
        adamw_lr = best_rate(losses, ADAMW, setting)
        adams_lr = best_rate(losses, ADAMS, setting)
        if adamw_lr is None or adams_lr is None:
            continue
        cells = [setting, f"{adamw_lr:g}"]
        for variant in ours:
            lr = best_rate(losses, variant, setting)
            cells.append("-" if lr is None else f"{lr / adamw_lr:.2f}")
        row = by_run[Run(setting, ADAMS.name, adams_lr, 0)]
        cells += [f"{float(row[f'{name}_half_matrices']):.2f}" for name in ("rms", "adamw_rms")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def summary(rows: list[dict[str, str]], losses: Losses) -> str:
    """Return the results as Markdown: losses, rates, and the verdict by the plan's rule."""
    lines = [
        f"{len(losses)} runs, {sum(map(math.isinf, losses.values()))} of them diverged. Losses are "
        "held-out nats a byte. Differences are paired by seed, without seed 0, which chose the "
        "rates; ± is half of a 95% interval (Student's t). The better AdamW is the one of two "
        "beta2 that has the lower loss with seed 0.",
        "",
        *losses_table(losses),
        "",
        "Best rates as a part of AdamW's, and the RMS of the hidden matrices' update at half of "
        "AdamS's run:",
        "",
        *rates_table(rows, losses),
        "",
        cpu_schedule.decide(losses, deciding(losses)),
        "",
    ]
    return "\n".join(lines)


def with_seeds(losses: Losses, settings: Iterable[str]) -> list[str]:
    """Return the settings in which AdamW has two seeds that count, so that there are intervals."""
    return [name for name in settings if len(seeds_at_best(losses, name, ADAMW)) > 2]


def draw_differences(axes: Axes, losses: Losses, settings: list[str]) -> None:
    """Draw the paired differences to AdamW over the batch size, with 95% intervals."""
    variants = [variant for variant in VARIANTS.values() if variant is not ADAMW]
    for number, variant in enumerate(variants):
        places, means, bars = [], [], []
        for place, setting in enumerate(settings):
            found = cpu_schedule.compare(
                losses, setting, variant, cpu_schedule.reference(losses, setting)
            )
            if found is None or not math.isfinite(found.half_width):
                continue
            # All variants of a setting lie nearer to its place than to the next.
            x = place + 0.8 * ((number + 0.5) / len(variants) - 0.5)
            axes.scatter(
                [x] * len(found.differences),
                list(found.differences.values()),
                s=8,
                color=plot.COLORS[variant.name],
                alpha=0.5,
            )
            places.append(x)
            means.append(found.mean)
            bars.append(found.half_width)
        if places:
            style = plot.style(variant.name)
            marker = "s" if style["linestyle"] == "--" else "o"
            axes.errorbar(
                places,
                means,
                bars,
                fmt=marker,
                markersize=5,
                capsize=3,
                color=style["color"],
                markerfacecolor="none" if marker == "s" else style["color"],
                label=variant.name,
            )
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.axhline(MARGIN, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(settings)), settings, fontsize=8)
    axes.set_xlim(-0.6, max(1, len(settings)) - 0.4)
    axes.set(
        ylabel="held-out loss minus AdamW's (nats a byte)",
        title=f"Paired by seed, with 95% intervals; AdamW: the better beta2; dotted: {MARGIN:+g}",
    )
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=6, ncols=3, loc="lower left")


def label_of(setting: str) -> str:
    """Return what a reader is told about a setting."""
    each = SETTINGS[setting]
    if setting in BATCH_SIZES:
        return f"{each.tokens_per_step:,} tokens a step"
    if len(each.ramp) > 1:
        tokens = ", ".join(f"{factor * each.tokens_per_step:,}" for factor in each.ramp)
        return f"{setting}: {tokens} tokens a step, {each.steps} steps"
    return f"{setting}: {each.tokens_per_step:,} tokens a step, {each.steps} steps"


def draw(losses: Losses, title: str, picture: Path) -> None:
    """Write the differences, if any has an interval, and each setting's loss over the rate."""
    settings = settings_of(losses)
    compared = with_seeds(losses, settings)
    num_panels = len(settings) + bool(compared)
    num_columns = min(2, num_panels)
    num_rows = math.ceil(num_panels / num_columns)
    figure, panels = plt.subplots(
        num_rows,
        num_columns,
        figsize=(6.5 * num_columns, 4.5 * num_rows),
        layout="constrained",
        squeeze=False,
    )
    figure.suptitle(title)
    flat = list(panels.flat)
    if compared:
        draw_differences(flat[0], losses, compared)
    for axes, setting in zip(flat[bool(compared) :], settings, strict=False):
        plot.draw_rates(axes, losses, setting, VARIANTS.values(), label_of(setting), "byte")
    for axes in flat[num_panels:]:
        axes.remove()
    for axes in flat[:num_panels]:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def write(folder: Path) -> str:
    """Write the picture and the summary of the study in a folder, and return the summary.

    Raises:
        ValueError: there is no run.
    """
    rows = results.rows_of_study(folder, "cpu_study.py")
    losses = results.losses_of(rows, results.PER_BYTE)
    sizes = sorted({int(row["num_params"]) for row in rows})
    title = f"A GPT with {' or '.join(f'{size:,}' for size in sizes)} parameters; lines are seed 0"
    draw(losses, title, folder / "quality.png")
    text = summary(rows, losses)
    (folder / "summary.md").write_text(text)
    return text


def main() -> int:
    """Draw from the command line. The exit codes are `exit_code_of`'s."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RUNS / "cpu", help="(%(default)s)")
    args = parser.parse_args()
    return exit_code_of(lambda: print(write(args.folder)))


if __name__ == "__main__":
    sys.exit(main())
