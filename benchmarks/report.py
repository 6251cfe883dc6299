"""Write tables and a picture of what step.py and tune.py measured.

    python benchmarks/report.py gpu FOLDER [--out DIR]

writes gpu-DEVICE.md and gpu-DEVICE.png from the step.json in a folder, and from its confirm.json,
sweep.csv and best.json if they are there.
"""

import argparse
import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from workloads import size_name

REFERENCE = "AdamS, fp32"
"""AdamS on fp32 tensors, which the time of a mode is compared with."""
_ADAMS, _STREAM, _COPY = "AdamS", "stream", "copy"


@dataclass(frozen=True)
class Row:
    """One contestant on one workload in one mode.

    Attributes:
        workload: the name of its tensors.
        numel: the number of parameters in all tensors together.
        mode: `Mode.name`.
        name: the name of the contestant.
        num_bytes: see `contestants.Contestant`.
        times_s: the times of one step in seconds, one per round.
        wall_s: the time of one step among many without a pause, Python included.
    """

    workload: str
    numel: int
    mode: str
    name: str
    num_bytes: float
    times_s: list[float]
    wall_s: float

    @property
    def median_s(self) -> float:
        return median(self.times_s)

    @property
    def spread(self) -> float:
        """The distance between the quartiles, divided by the median."""
        return spread(self.times_s)

    @property
    def gb_per_s(self) -> float:
        return self.num_bytes / self.median_s / 1e9


@dataclass(frozen=True)
class Memory:
    """The bytes that an optimizer needs in addition to parameters and gradients.

    Attributes:
        held: the bytes between steps.
        peak: the most bytes during a step.
    """

    workload: str
    numel: int
    name: str
    held: int
    peak: int


@dataclass(frozen=True)
class Results:
    """What a run has measured.

    Attributes:
        facts: what the numbers depend on.
        missing: for each name of something that was not measured, the reason.
        rows: the times.
        memory: the memory of each optimizer.
    """

    facts: dict[str, str]
    missing: dict[str, str]
    rows: list[Row]
    memory: list[Memory]

    def groups(self) -> Iterator[dict[str, Row]]:
        """Yield what was measured together, as a dict by the contestant's name."""
        groups: dict[tuple[str, str], dict[str, Row]] = {}
        for row in self.rows:
            groups.setdefault((row.workload, row.mode), {})[row.name] = row
        yield from groups.values()


def spread(times: Sequence[float]) -> float:
    """Return the distance between the quartiles, divided by the median."""
    if len(times) < 2:
        return 0.0
    low, _, high = quantiles(times, n=4, method="inclusive")
    return (high - low) / median(times)


def ratio(top: Row, bottom: Row) -> float:
    """Return the median of the rounds' ratios: in one round both met the same load."""
    return median(a / b for a, b in zip(top.times_s, bottom.times_s, strict=True))


def part_of_copy(row: Row, group: dict[str, Row]) -> float:
    """Return a bandwidth divided by that of the copy in the same group."""
    copy = group[_COPY]
    return row.num_bytes / copy.num_bytes / ratio(row, copy)


COLUMNS = (
    "parameters",
    "mode",
    "contestant",
    "bytes/param",
    "ms",
    "quartiles",
    "GB/s",
    "% of copy",
    "back to back, ms",
    "time / AdamS",
    "time / stream",
    "time / fp32 AdamS",
    "bytes / fp32 AdamS",
)


def table(results: Results) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table as texts, in the order of COLUMNS."""
    for group in results.groups():
        fp32, stream = group.get(REFERENCE), group.get(_STREAM)
        for row in group.values():
            of_mode = row.name == _ADAMS and fp32 is not None
            is_copy = row.name == _COPY
            yield (
                row.workload,
                row.mode,
                row.name,
                "" if is_copy else f"{row.num_bytes / row.numel:g}",
                f"{row.median_s * 1e3:.3f}",
                f"{row.spread:.1%}",
                f"{row.gb_per_s:.1f}",
                f"{part_of_copy(row, group):.1%}",
                f"{row.wall_s * 1e3:.3f}",
                "" if is_copy else f"{ratio(row, group[_ADAMS]):.3f}",
                "" if is_copy or stream is None else f"{ratio(row, stream):.3f}",
                f"{ratio(row, fp32):.3f}" if of_mode else "",
                f"{row.num_bytes / fp32.num_bytes:.3f}" if of_mode else "",
            )


def markdown(results: Results) -> str:
    lines = [f"- {name}: {value}" for name, value in results.facts.items()]
    lines += [f"- {name}: not measured, {why}" for name, why in results.missing.items()]
    rows = list(table(results))
    # Columns that are empty for these results are left out.
    kept = [i for i in range(len(COLUMNS)) if i < 3 or any(cells[i] for cells in rows)]
    columns, *rows = ([cells[i] for i in kept] for cells in (COLUMNS, *rows))
    text = "\n".join(lines) + "\n\n" + text_table(columns, rows, num_words=3)
    if results.memory:
        text += "\n" + _memory_table(results)
    return text


def _memory_table(results: Results) -> str:
    """Return the table of memory, in bytes per parameter and in all."""
    rows = (
        (
            row.workload,
            row.name,
            f"{row.held / row.numel:.2f}",
            f"{row.peak / row.numel:.2f}",
            f"{row.peak / 1e6:.1f}",
        )
        for row in results.memory
    )
    columns = (
        *("parameters", "optimizer", "state, bytes/param"),
        *("peak of a step, bytes/param", "peak, MB"),
    )
    return (
        "GPU memory beside fp32 parameters and gradients, as torch's allocator counts it:\n\n"
        + text_table(columns, rows, num_words=2)
    )


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, num_words: int) -> str:
    """Return a table in Markdown. All columns after the first num_words are numbers."""
    rules = ["---"] * num_words + ["---:"] * (len(columns) - num_words)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, rules, *rows))


def write_json(results: Results, folder: Path, stem: str = "step") -> None:
    """Write what there is so far. If the process is killed, the old or the new file is left."""
    folder.mkdir(parents=True, exist_ok=True)
    partly = folder / f".{stem}.json"
    partly.write_text(json.dumps(asdict(results), indent=1) + "\n")
    partly.replace(folder / f"{stem}.json")


def write(results: Results, folder: Path, stem: str = "step") -> None:
    """Write step.json, step.csv, step.md and, if matplotlib is installed, step.png."""
    write_json(results, folder, stem)
    with (folder / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(table(results))
    (folder / f"{stem}.md").write_text(markdown(results))
    plot(results, folder / f"{stem}.png")


def read(path: Path) -> Results:
    """Read a step.json that `write` has written."""
    data = json.loads(path.read_text())
    rows = [Row(**row) for row in data["rows"]]
    return Results(data["facts"], data["missing"], rows, [Memory(**m) for m in data["memory"]])


def plot(results: Results, path: Path) -> None:
    """Draw every contestant's bandwidth as a percentage of the copy's."""
    groups = _shown(results)
    if not groups:
        print(f"nothing was measured: no {path.name}")
        return
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed: no {path.name} (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = _in_columns(groups)
    num_lines = max(sum(map(_num_lines, column)) for column in columns)
    figure, axes = plt.subplots(
        1,
        len(columns),
        figsize=(8.5 * len(columns), 1.4 + 0.22 * num_lines),
        layout="constrained",
        squeeze=False,
    )
    names = dict.fromkeys(row.name for row in results.rows if row.name != _COPY)
    colors = {name: f"C{index}" for index, name in enumerate(n for n in names if n != _STREAM)}
    colors[_STREAM] = "0.6"
    largest = max(100 * part_of_copy(row, g) for g in groups for row in g.values())
    for column, one in zip(columns, axes[0], strict=True):
        _draw_bars(one, column, colors)
        one.set_ylim(num_lines, -0.8)
        one.set_xlim(0, 1.3 * largest)
    figure.suptitle(
        f"One optimizer step on {results.facts['device']}: bytes that the algorithm moves / time, "
        "as % of a copy"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _shown(results: Results) -> list[dict[str, Row]]:
    """Order the groups: each mode's largest tensor, the lists, other sizes of the first modes."""
    groups = list(results.groups())
    first = [next(iter(group.values())) for group in groups]
    largest: dict[str, int] = {}
    for index, row in enumerate(first):
        known = largest.get(row.mode)
        if not _is_list(row) and (known is None or first[known].numel < row.numel):
            largest[row.mode] = index
    lists = [index for index, row in enumerate(first) if _is_list(row)]
    modes = [*dict.fromkeys(row.mode for row in first)][:2]
    others = sorted(
        {i for i, row in enumerate(first) if row.mode in modes} - {*largest.values(), *lists},
        key=lambda index: (-first[index].numel, index),
    )
    return [groups[index] for index in (*largest.values(), *lists, *others)]


def _is_list(row: Row) -> bool:
    return row.workload != size_name(row.numel)


def _num_lines(group: dict[str, Row]) -> float:
    # A heading, and a bar for each contestant except the copy.
    return len(group) + 0.5


def _in_columns(groups: list[dict[str, Row]]) -> list[list[dict[str, Row]]]:
    """Put a few groups into one column, and more into two columns of about the same length."""
    total = sum(map(_num_lines, groups))
    if total < 20:
        return [groups]
    left: list[dict[str, Row]] = []
    while sum(map(_num_lines, left)) + _num_lines(groups[len(left)]) / 2 < total / 2:
        left.append(groups[len(left)])
    return [left, groups[len(left) :]]


def _draw_bars(axes: Any, groups: list[dict[str, Row]], colors: dict[str, str]) -> None:
    ticks, labels, y = [], [], 0.0
    axes.axvline(100, color="0.8", linewidth=1, zorder=0)
    words = {"va": "center", "bbox": {"color": "white", "pad": 1}}
    for group in groups:
        copy = group[_COPY]
        axes.text(0.5, y, f"{copy.workload}, {copy.mode}", fontweight="bold", fontsize=9, **words)
        bars = [row for row in group.values() if row.name != _COPY]
        for line, row in enumerate(bars, 1):
            percent = 100 * part_of_copy(row, group)
            axes.barh(y + line, percent, height=0.8, color=colors[row.name])
            result = f"{percent:.0f}%, {_duration(row.median_s)}"
            axes.text(percent + 1, y + line, result, fontsize=8, **words)
            ticks.append(y + line)
            labels.append(f"{row.name}, {row.num_bytes / row.numel:g} bytes/param")
        y += _num_lines(group)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_xlabel("% of the copy's bandwidth; then the time of a step")


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def write_gpu(folder: Path, out: Path) -> Path:
    """Write the page and the picture of a GPU from the results in a folder; return the page."""
    results = read(folder / "step.json")
    confirmed = folder / "confirm.json"
    stem = "gpu-" + re.sub("[^a-z0-9]+", "-", results.facts["device"].lower()).strip("-")
    stem = stem.replace("gpu-nvidia-", "gpu-")
    lines = [
        f"# One optimizer step on {results.facts['device']}",
        "",
        "Written by `python benchmarks/report.py gpu` from the results of `benchmarks/step.py` and",
        "`benchmarks/tune.py`; [the README](../README.md) says how to read the tables.",
        "",
        f"![bandwidths as parts of a copy's]({stem}.png)",
        "",
    ]
    text = "\n".join(lines) + "\n" + markdown(results)
    if confirmed.exists():
        text += "\n## The constants that the sweep chose, beside those of the product\n\n"
        text += _confirmation(read(confirmed))
        if (folder / "best.json").exists():
            text += "\n" + _best_constants(folder / "best.json")
    if (folder / "sweep.csv").exists():
        text += "\n## The sweep: the best of each mode\n\n" + sweep_table(
            list(csv.DictReader((folder / "sweep.csv").open()))
        )
    out.mkdir(parents=True, exist_ok=True)
    page = out / f"{stem}.md"
    page.write_text(text)
    plot(results, out / f"{stem}.png")
    return page


def _confirmation(results: Results) -> str:
    columns = (
        *("parameters", "mode", "AdamS, ms", "tuned, ms", "quartiles"),
        *("% of copy", "tuned, % of copy", "tuned / AdamS"),
    )
    rows = []
    for group in results.groups():
        adams, tuned = group[_ADAMS], group["AdamS, tuned"]
        rows.append(
            (
                adams.workload,
                adams.mode,
                f"{adams.median_s * 1e3:.3f}",
                f"{tuned.median_s * 1e3:.3f}",
                f"{adams.spread:.1%}",
                f"{part_of_copy(adams, group):.1%}",
                f"{part_of_copy(tuned, group):.1%}",
                f"{ratio(tuned, adams):.3f}",
            )
        )
    return text_table(columns, rows, num_words=2)


def _best_constants(path: Path) -> str:
    best: dict[str, dict[str, Any]] = json.loads(path.read_text())
    lines = [
        f"- {key}: {', '.join(f'{k} {v}' for k, v in knobs.items()) or 'as they are'}\n"
        for key, knobs in best.items()
    ]
    return "".join(lines)


SWEEP_COLUMNS = (
    *("mode", "parameters", "knobs", "registers", "spilled bytes"),
    *("ms", "quartiles", "% of copy", "ratio to default", "bits"),
)


def sweep_table(rows: list[dict[str, str]], num_rows: int = 5) -> str:
    """Return a table of the best few variants of each mode and size, and the default."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["parameters"]), []).append(row)
    shown = []
    for group in groups.values():
        timed = sorted((r for r in group if r["ms"]), key=lambda r: float(r["ratio to default"]))
        shown += timed[:num_rows]
        shown += [row for row in timed[num_rows:] if row["knobs"] == "default"]
        shown += [row for row in group if row["bits"] not in ("equal", "")]
    return text_table(SWEEP_COLUMNS, ([r[c] for c in SWEEP_COLUMNS] for r in shown), num_words=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("gpu",))
    parser.add_argument("folder", type=Path, help="with step.json")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="default: %(default)s"
    )
    args = parser.parse_args()
    print(f"written: {write_gpu(args.folder, args.out)}")


if __name__ == "__main__":
    main()
