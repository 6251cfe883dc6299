"""Put the records and the files of a stage into words, for run.py.

Each function takes a stage's records and the folder of the stages' files, and returns a Verdict. It
must cope with incomplete files, because a stage can be stopped at any time. A missing number is
"not measured". Imports only the standard library.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tests.gpu.records import read_lines

NOT_MEASURED = "not measured"
# Names as in benchmarks/contestants.py.
ADAMS, TUNED, COPY = "AdamS", "AdamS, tuned", "copy"
FUSED, FOREACH = "torch AdamW, fused", "torch AdamW, foreach"
APEX_SHAPE = "Adam in Apex's launch shape"
# How many entries of a list the table names. The report has all.
_NUM_NAMED = 5


class Verdict(NamedTuple):
    """A text for the table, whether all is as it should be, and the lines for the report."""

    words: str
    is_good: bool
    details: list[str] = []  # noqa: RUF012  (a default, never changed)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    rule = ["---"] * len(columns)
    return [f"| {' | '.join(map(str, cells))} |" for cells in (columns, rule, *rows)]


def number(value: Any, digits: int = 3) -> str:
    """Return a number with that many digits, or "not measured"."""
    return f"{value:.{digits}g}" if isinstance(value, int | float) else NOT_MEASURED


def facts(records: list[dict[str, Any]], folder: Path) -> Verdict:
    known = {record["name"]: record["value"] for record in records}
    named = [f"{known.get('GPU', 'no GPU')}"]
    named += [f"{name} {known[name]}" for name in ("driver", "torch") if name in known]
    lines = [f"- {name}: {value}" for name, value in known.items()]
    return Verdict(", ".join(named), "torch" in known, lines)


def checks(records: list[dict[str, Any]], folder: Path) -> Verdict:
    """Judge a stage whose records have `ok` or only words."""
    made = [record for record in records if "ok" in record]
    wrong = [record for record in made if not record["ok"]]
    words = f"{len(made) - len(wrong)} of {len(made)} checks are right"
    if wrong:
        named = [f"{record['name']}: {record.get('words', '')}" for record in wrong[:_NUM_NAMED]]
        words += "; wrong are " + "; ".join(named)
    said = [record["words"] for record in records if "ok" not in record and record.get("words")]
    details = [
        f"- {record['name']}: {record['words']}" for record in records if record.get("words")
    ]
    return Verdict(". ".join([words, *said]), bool(made) and not wrong, details)


def battery(records: list[dict[str, Any]], folder: Path) -> Verdict:
    """Judge the tests: one record each, and two for a test whose process crashed."""
    results: dict[str, dict[str, Any]] = {}
    for record in records:
        before = results.get(record["name"])
        if before is None or before["result"] != "failed":
            results[record["name"]] = record
    failed = [record for record in results.values() if record["result"] == "failed"]
    skipped = [record for record in results.values() if record["result"] == "skipped"]
    passed = len(results) - len(failed) - len(skipped)
    words = f"tests passed: {passed}, failed: {len(failed)}, not run: {len(skipped)}"
    reasons = {str(record.get("words", "")).removeprefix("not run: ") for record in skipped}
    if reasons:
        words += f" ({'; '.join(sorted(reasons))})"
    if failed:
        names = [record["name"].rpartition("/")[2] for record in failed[:_NUM_NAMED]]
        words += "; failed are " + ", ".join(names) + (", ..." if len(failed) > 5 else "")
    details = [f"- {record['name']}: {record.get('words', '')}" for record in failed[:40]]
    slow = sorted(results.values(), key=lambda record: -record.get("seconds", 0))[:3]
    details += [f"- {record.get('seconds', 0):.1f} s: {record['name']}" for record in slow]
    return Verdict(words, bool(results) and not failed, details)


def speed(records: list[dict[str, Any]], folder: Path) -> Verdict:
    """Judge benchmarks/step.py by its step.json."""
    return _benchmark(folder / "step.json", (FUSED, FOREACH, APEX_SHAPE), ADAMS)


def confirm(records: list[dict[str, Any]], folder: Path) -> Verdict:
    """Judge benchmarks/step.py's confirm.json: the same kernel with two sets of constants."""
    return _benchmark(folder / "confirm.json", (ADAMS,), TUNED)


def _benchmark(path: Path, others: Sequence[str], ours: str) -> Verdict:
    """Report the bandwidth of `ours` relative to a copy's, and others' times relative to its."""
    if not path.exists():
        return Verdict(f"{NOT_MEASURED}: there is no {path.name}", False)
    data = json.loads(path.read_text())
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in data["rows"]:
        groups.setdefault((row["workload"], row["mode"]), {})[row["name"]] = row
    rows, sentences = [], []
    for (workload, mode), group in groups.items():
        own = group.get(ours)
        ratios = [_ratio(group.get(name), own) for name in others]
        part = _part_of_copy(own, group.get(COPY))
        wall_s = own.get("wall_s") if own else None
        rows.append(
            (
                workload,
                mode,
                number(_median_ms(own)),
                number(wall_s * 1e3 if wall_s else None),
                f"{part:.1%}" if part else NOT_MEASURED,
                *(number(ratio) for ratio in ratios),
            )
        )
        named = [
            f"{name} takes {number(ratio)} times as long"
            for name, ratio in zip(others, ratios, strict=True)
            if ratio
        ]
        copied = f"{part:.0%} of a copy" if part else f"its part of a copy is {NOT_MEASURED}"
        size = own["numel"] if own else 0
        sentences.append((mode, size, f"{workload} in {mode}: " + ", ".join([copied, *named])))
    columns = ("tensors", "mode", f"{ours}, ms", "with Python, ms", "% of copy")
    ratios_of = [f"{name} / {ours}" for name in others]
    details = table([*columns, *ratios_of], rows)
    details += [f"- {name}: {NOT_MEASURED}, {why}" for name, why in data["missing"].items()]
    details += [
        f"- {row['name']}, {row['workload']}: holds {row['held'] / row['numel']:.2f} bytes a "
        f"parameter, at most {row['peak'] / row['numel']:.2f} in a step"
        for row in data.get("memory", ())
    ]
    # The table has the largest of each mode, and the report has all.
    modes = dict.fromkeys(mode for mode, _, _ in sentences)
    largest = [max(s for s in sentences if s[0] == mode)[2] for mode in modes]
    words = "; ".join(largest[:_NUM_NAMED]) or NOT_MEASURED
    return Verdict(words, bool(rows), ["", *details])


def _median_ms(row: dict[str, Any] | None) -> float | None:
    return median(row["times_s"]) * 1e3 if row and row["times_s"] else None


def _ratio(top: dict[str, Any] | None, bottom: dict[str, Any] | None) -> float | None:
    """Return the median of the rounds' ratios of times."""
    if not top or not bottom or not top["times_s"] or not bottom["times_s"]:
        return None
    pairs = zip(top["times_s"], bottom["times_s"], strict=False)
    return median(a / b for a, b in pairs)


def _part_of_copy(row: dict[str, Any] | None, copy: dict[str, Any] | None) -> float | None:
    ratio = _ratio(copy, row)
    if ratio is None or row is None or copy is None:
        return None
    return row["num_bytes"] / copy["num_bytes"] * ratio


def sweep(records: list[dict[str, Any]], folder: Path) -> Verdict:
    """Judge benchmarks/tune.py by its sweep.csv and best.json."""
    path = folder / "best.json"
    if not path.exists():
        return Verdict(f"{NOT_MEASURED}: there is no best.json", False)
    best = json.loads(path.read_text())
    num_variants = 0
    if (folder / "sweep.csv").exists():
        with (folder / "sweep.csv").open(newline="") as file:
            num_variants = sum(1 for _ in csv.reader(file)) - 1
    details = [f"- {mode}: {knobs or 'those of the product'}" for mode, knobs in best.items()]
    changed = sum(1 for knobs in best.values() if knobs)
    words = (
        f"{num_variants} variants; {changed} of {len(best)} modes are faster with other constants"
    )
    return Verdict(words, bool(best), details)


def megatron(records: list[dict[str, Any]], folder: Path) -> Verdict:
    """Judge megatron_runs.py by its records, one per run."""
    path = folder / "megatron.json"
    runs = _objects(path)
    if not runs:
        return Verdict(f"{NOT_MEASURED}: there is nothing in {path.name}", False)
    columns = ("run", "first loss", "last loss", "step, ms", "optimizer, ms", "peak, MiB", "")
    rows, wrong = [], []
    for run in runs:
        losses = run.get("losses") or [None]
        rows.append(
            (
                run.get("name", "?"),
                number(losses[0], 5),
                number(losses[-1], 5),
                number(_middle(run.get("step_ms"))),
                number(_middle(run.get("optimizer_ms"))),
                number(run.get("peak_mib"), 5),
                run.get("words", ""),
            )
        )
        if not run.get("ok"):
            wrong.append(f"{run.get('name', '?')}: {run.get('words', '')}")
    sentences = [
        f"{row[0]}: last loss {row[2]}, ms of a step {row[3]}, ms of its optimizer {row[4]}, "
        f"peak MiB {row[5]}"
        for row in rows
    ]
    words = f"{len(runs) - len(wrong)} of {len(runs)} runs are right"
    if wrong:
        words += "; wrong are " + "; ".join(wrong)
    return Verdict(". ".join([words, "; ".join(sentences)]), not wrong, ["", *table(columns, rows)])


def _middle(value: Any) -> Any:
    """Return a number, or the median of a list of numbers."""
    return median(value) if isinstance(value, list) and value else value


def _objects(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that has a list of them, or one object per line."""
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text())
    except ValueError:
        return read_lines(path)
    return data if isinstance(data, list) else [data]


def ncu(records: list[dict[str, Any]], folder: Path) -> Verdict:
    """Judge stages/ncu.py: one record per kernel, with the profiler's counters."""
    kernels = [record for record in records if "counters" in record]
    if not kernels:
        said = [str(record["words"]) for record in records if record.get("words")]
        return Verdict(said[-1] if said else NOT_MEASURED, bool(records) and records[-1].get("ok"))
    names = dict.fromkeys(name for record in kernels for name in record["counters"])
    rows = [
        (name, *(record["counters"].get(name, NOT_MEASURED) for record in kernels))
        for name in names
    ]
    words = f"{len(names)} counters of " + ", ".join(record["name"] for record in kernels)
    columns = ["counter", *(record["name"] for record in kernels)]
    return Verdict(words, True, ["", *table(columns, rows)])


def quality(records: list[dict[str, Any]], folder: Path) -> Verdict:
    """Judge gpu_study.py by its quality.csv, one row per run."""
    path = folder / "quality.csv"
    rows = []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    if not rows:
        return Verdict(f"{NOT_MEASURED}: there is nothing in {path.name}", False)
    best: dict[str, tuple[float, str]] = {}
    for row in rows:
        loss = (float(row["held_out_loss"]), f"lr {row['lr']}")
        best[row["variant"]] = min(best.get(row["variant"], loss), loss)
    named = [f"{name} {loss:.4f} at {lr}" for name, (loss, lr) in sorted(best.items())]
    words = f"{len(rows)} runs; lowest held-out losses: " + ", ".join(named)
    columns = ("axis", "variant", "lr", "seed", "steps", "held_out_loss", "train_loss", "seconds")
    lines = table(columns, ([row.get(name, "") for name in columns] for row in rows))
    log = folder / "log.txt"
    said = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
    # The study's own verdict, if it got that far.
    return Verdict(words, True, ["", *lines, "", *said])
