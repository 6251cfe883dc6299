"""The picture of a plan: the fullest rank's bytes by optimizer, and its state by dp size."""

from pathlib import Path
from typing import Any

from megatron_adams.planning.gpus import GIB, Gpu
from megatron_adams.planning.results import Plan

_PARTS = (
    ("weights", "#4c78a8"),
    ("gradients", "#9ecae9"),
    ("main params, remainders", "#f58518"),
    ("exp_avg", "#54a24b"),
    ("exp_avg_sq", "#e45756"),
    ("activations (estimate)", "#d9d9d9"),
)
_LINES = {
    "adamw": "#e45756",
    "adams": "#54a24b",
    "adams_precision_aware_bf16": "#4c78a8",
}


class NoMatplotlibError(ValueError):
    """matplotlib is not installed."""


def draw(plan: Plan, gpu: Gpu | None, path: Path) -> None:
    """Write the picture; the file's ending says which format.

    Raises:
        NoMatplotlibError: matplotlib is not installed.
        ValueError: a format that matplotlib does not write.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise NoMatplotlibError(
            "--chart needs matplotlib, which is not installed: pip install "
            "'megatron-adams[recipes]', or leave --chart out"
        ) from exc
    has_lines = bool(plan.data["by_dp_size"])
    figure = Figure(figsize=(13, 5.2) if has_lines else (8, 5.2), layout="constrained")
    axes = figure.subplots(1, 2 if has_lines else 1, squeeze=False)[0]
    _draw_bars(axes[0], plan, gpu)
    if has_lines:
        _draw_lines(axes[1], plan)
    layout, model = plan.data["layout"], plan.data["model"]
    figure.suptitle(
        f"{model['num_params'] / 1e9:.3g} billion params, {plan.data['num_ranks']:,} GPUs: "
        + ", ".join(f"{name.upper()} {size}" for name, size in layout.items() if size > 1)
    )
    figure.savefig(path, dpi=120)


def _draw_bars(axes: Any, plan: Plan, gpu: Gpu | None) -> None:
    names = [mode.title.replace(", precision-aware", "\nprecision-aware") for mode in plan.modes]
    places = range(len(names))
    left = [0.0] * len(names)
    for part, color in _PARTS:
        widths = [_bytes_of(plan, mode.name, part) / GIB for mode in plan.modes]
        axes.barh(places, widths, left=left, color=color, label=part, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in zip(places, left, strict=True):
        axes.text(total, place, f" {total:.1f}", va="center", fontsize=9)
    limit = max(left)
    if gpu:
        limit = max(limit, gpu.memory_gib)
        axes.axvline(gpu.memory_gib, color="black", linestyle="--", linewidth=1)
        axes.text(gpu.memory_gib, -0.75, f"{gpu.name} ", ha="right", va="center", fontsize=9)
    axes.set_yticks(places, names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -1.1)
    axes.set_xlim(0, 1.12 * limit)
    axes.set_xlabel("GiB on the fullest GPU")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.13), frameon=False)


def _bytes_of(plan: Plan, mode: str, part: str) -> int:
    kind = plan.fullest(mode)
    state = kind.optimizer[mode]
    match part:
        case "weights":
            return kind.weights
        case "gradients":
            return kind.gradients[mode]
        case "main params, remainders":
            return sum(state.get(name, 0) for name in ("main_params", "remainders", "scales"))
        case "activations (estimate)":
            return plan.activations
    return state.get(part, 0)


def _draw_lines(axes: Any, plan: Plan) -> None:
    rows = plan.data["by_dp_size"]
    sizes = [row["dp_size"] for row in rows]
    for mode in plan.modes:
        if mode.name in _LINES:
            state = [row["optimizer"][mode.name] / GIB for row in rows]
            axes.plot(sizes, state, "o-", color=_LINES[mode.name], label=mode.title, markersize=4)
    own = plan.data["layout"]["dp"]
    axes.axvline(own, color="#888888", linestyle=":", linewidth=1)
    axes.annotate(
        f"this job: DP {own}",
        (own, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(5, 0),
        textcoords="offset points",
        fontsize=9,
        va="top",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("data-parallel size")
    axes.set_ylabel("optimizer state of a GPU, GiB")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, loc="lower left")
