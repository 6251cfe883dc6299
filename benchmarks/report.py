"""Tables and a plot of what step.py measured."""

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

REFERENCE = "AdamS, fp32"
"""AdamS on fp32 tensors takes part in every mode: what the mode's time is compared with."""


@dataclass(frozen=True)
class Row:
    """One contestant at one size in one mode.

    Attributes:
        numel: parameters.
        mode: `Mode.name`.
        name: the contestant's.
        bytes_per_param: see `contestants.Contestant`.
        times_s: of one step, in seconds, a round each.
    """

    numel: int
    mode: str
    name: str
    bytes_per_param: float
    times_s: list[float]

    @property
    def median_s(self) -> float:
        return median(self.times_s)

    @property
    def spread(self) -> float:
        """The distance of the quartiles, as a part of the median."""
        if len(self.times_s) < 2:
            return 0.0
        low, _, high = quantiles(self.times_s, n=4, method="inclusive")
        return (high - low) / self.median_s

    @property
    def gb_per_s(self) -> float:
        return self.bytes_per_param * self.numel / self.median_s / 1e9


@dataclass(frozen=True)
class Results:
    """Attributes: what the numbers depend on; why a peer was not measured, by name; the rows."""

    facts: dict[str, str]
    missing: dict[str, str]
    rows: list[Row]

    def groups(self) -> Iterator[dict[str, Row]]:
        """What was measured side by side, by the contestant's name."""
        keys = dict.fromkeys((row.numel, row.mode) for row in self.rows)
        for numel, mode in keys:
            yield {row.name: row for row in self.rows if (row.numel, row.mode) == (numel, mode)}


def ratio(top: Row, bottom: Row) -> float:
    """The median over the rounds of time over time: both met the same neighbours on the machine."""
    return median(a / b for a, b in zip(top.times_s, bottom.times_s, strict=True))


COLUMNS = (
    "parameters",
    "mode",
    "contestant",
    "bytes/param",
    "ms",
    "quartiles",
    "GB/s",
    "time / AdamS",
    "time / stream",
    "time / fp32 AdamS",
    "bytes / fp32 AdamS",
)


def table(results: Results) -> Iterator[tuple[str, ...]]:
    """Rows of text, as COLUMNS."""
    for group in results.groups():
        fp32 = group.get(REFERENCE)
        for row in group.values():
            of_mode = row.name == "AdamS" and fp32 is not None
            yield (
                f"{row.numel / 1e6:g}M",
                row.mode,
                row.name,
                f"{row.bytes_per_param:g}",
                f"{row.median_s * 1e3:.3f}",
                f"{row.spread:.1%}",
                f"{row.gb_per_s:.1f}",
                f"{ratio(row, group['AdamS']):.3f}",
                f"{ratio(row, group['stream']):.3f}",
                f"{ratio(row, fp32):.3f}" if of_mode else "",
                f"{row.bytes_per_param / fp32.bytes_per_param:.3f}" if of_mode else "",
            )


def markdown(results: Results) -> str:
    lines = [f"- {name}: {value}" for name, value in results.facts.items()]
    lines += [f"- {name}: not measured, {why}" for name, why in results.missing.items()]
    lines += ["", _line(COLUMNS), _line(["---"] * 3 + ["---:"] * (len(COLUMNS) - 3))]
    return "\n".join([*lines, *map(_line, table(results))]) + "\n"


def _line(cells: Iterator[str] | tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(results: Results, folder: Path) -> None:
    """Write step.json, step.csv, step.md and, where matplotlib is installed, step.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.json").write_text(json.dumps(asdict(results), indent=1) + "\n")
    with (folder / "step.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(table(results))
    (folder / "step.md").write_text(markdown(results))
    plot(results, folder / "step.png")


def read(path: Path) -> Results:
    """Read what `write` left in step.json."""
    data = json.loads(path.read_text())
    return Results(data["facts"], data["missing"], [Row(**row) for row in data["rows"]])


def plot(results: Results, path: Path) -> None:
    """Draw time over the stream's for each mode, and the time of an element over the size."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no step.png (pip install 'megatron-adams[recipes]')")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(results.groups())
    sizes = sorted({row.numel for row in results.rows})
    shown_size = 50_000_000 if 50_000_000 in sizes else sizes[-1]
    figure, (bars, lines) = plt.subplots(
        1, 2, figsize=(13, 7), layout="constrained", width_ratios=(3, 2)
    )
    names = dict.fromkeys(row.name for row in results.rows)
    colors = {name: f"C{index}" for index, name in enumerate(n for n in names if n != "stream")}
    _draw_bars(bars, [g for g in groups if next(iter(g.values())).numel == shown_size], colors)
    bars.set_title(f"{shown_size / 1e6:g}M parameters, by mode")
    first_mode = results.rows[0].mode
    _draw_lines(lines, [row for row in results.rows if row.mode == first_mode], colors)
    lines.set_title(f"mode {first_mode}")
    figure.suptitle(f"One optimizer step on {results.facts['device']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_bars(axes: Any, groups: list[dict[str, Row]], colors: dict[str, str]) -> None:
    y, ticks, labels = 0.0, [], []
    for group in groups:
        stream = group["stream"]
        axes.text(1.0, y, stream.mode, va="center", fontweight="bold", fontsize=9)
        y += 1
        for row in group.values():
            if row.name in ("stream", REFERENCE):
                continue
            relative = ratio(row, stream)
            # From 1 on, the stream itself; a measurement below it is a bar to the left.
            axes.barh(y, relative - 1, left=1, height=0.8, color=colors[row.name])
            axes.text(max(relative, 1.0) * 1.02, y, f"{relative:.2f}", va="center", fontsize=8)
            ticks.append(y)
            labels.append(f"{row.name}, {row.bytes_per_param:g} bytes/param")
            y += 1
        y += 0.4
    axes.set_xscale("log")
    axes.set_xlim(0.9, 1.25 * max(ratio(row, g["stream"]) for g in groups for row in g.values()))
    marks = [mark for mark in (1, 1.5, 2, 3, 5, 10, 20) if mark < axes.get_xlim()[1]]
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_ylim(y - 0.4, -0.8)
    axes.set_xlabel("time / time of a stream with AdamS's reads and writes in the mode")


def _draw_lines(axes: Any, rows: list[Row], colors: dict[str, str]) -> None:
    for name in dict.fromkeys(row.name for row in rows):
        own = sorted((row for row in rows if row.name == name), key=lambda row: row.numel)
        axes.plot(
            [row.numel / 1e6 for row in own],
            [row.median_s / row.numel * 1e9 for row in own],
            marker="o",
            label=name,
            color=colors.get(name, "black"),
            linestyle="--" if name == "stream" else "-",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({row.numel / 1e6 for row in rows})
    axes.set_xticks(sizes, [f"{size:g}M" for size in sizes])
    axes.minorticks_off()
    low, high = (pick(r.median_s / r.numel * 1e9 for r in rows) for pick in (min, max))
    marks = [
        m for m in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low / 2 < m < high * 2
    ]
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.set_xlabel("parameters")
    axes.set_ylabel("ns / parameter")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
