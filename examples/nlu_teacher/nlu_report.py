"""Write the claims as a table: the paper's figure, ours with its interval, and the verdict.

    python nlu_report.py --study runs/nlu/finetuned --data runs/nlu/snips --out runs/nlu/report \\
        --benchmark S_via=runs/nlu/exported/benchmark.json

Inputs: a study of finetune_nlu.py; the labelled sets that it was done with; what
simulate_assistant.py wrote into the study; claims.toml, or another --claims; and what
predict.py --benchmark printed, if there is any. Outputs, in --out: report.md, claims.csv (a row a
figure) and nlu.png.

A figure is the relative change of a metric between two models: the mean over all pairs of runs with
the same few-shot subset and the same seed. Its interval is the 95% percentile interval of a
bootstrap over utterances (for the assistant: dialogues) and few-shot subsets. A claim holds if the
whole interval is below zero. With fewer than 5 subsets times 2 seeds there is no verdict.
"""

import argparse
import csv
import json
import math
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from finetune_rows import (
    OPTIMIZERS,
    SWEEP,
    Run,
    best_rate,
    is_at_edge,
    read_answers,
    read_rows,
    run_of,
)
from labels import Tagged, load_tagged
from metrics import Counts, Interval, count_all, estimate, metric, relative_change
from simulate_assistant import abandoned_rate, unsatisfied_rate

ASSISTANT = {"unsatisfied": unsatisfied_rate, "abandoned": abandoned_rate}
NAMES = {
    "intent_error": "intent error",
    "slot_error": "slot error (1 - F1)",
    "semer": "SemER",
    "frame_error": "frame error",
    "unsatisfied": "unsatisfied requests",
    "abandoned": "abandoned requests",
}
MIN_SUBSETS, MIN_SEEDS = 5, 2
Pairs = dict[int, list[tuple[Run, Run]]]  # by few-shot subset


@dataclass(frozen=True)
class Claim:
    """A row of claims.toml; see there."""

    text: str
    metrics: tuple[str, ...]
    model: str = ""
    baseline: str = ""
    paper: dict[str, str] = field(default_factory=dict)
    untestable: str = ""


@dataclass(frozen=True)
class Figure:
    """A claim's metric, as it came out.

    Attributes:
        change: relative, such as -0.05 for 5% fewer errors; None where it was not computed.
        num_runs: subsets times seeds that both models have.
    """

    claim: Claim
    metric: str
    shots: int
    change: Interval | None
    num_subsets: int
    num_seeds: int
    verdict: str


def read_claims(path: Path) -> list[Claim]:
    """Read a file of claims.

    Raises:
        ValueError: a claim has other keys, or a metric is unknown.
    """
    try:
        claims = [
            Claim(**entry | {"metrics": tuple(entry["metrics"])})
            for entry in tomllib.loads(path.read_text())["claims"]
        ]
    except (OSError, TypeError, KeyError, tomllib.TOMLDecodeError) as exc:
        what = f"must have [[claims]] with the keys of {Path(__file__).parent.name}/claims.toml"
        raise ValueError(f"{path}: {what} ({type(exc).__name__}: {exc})") from exc
    for claim in claims:
        if unknown := set(claim.metrics) - set(NAMES):
            rule = f"must be of {', '.join(NAMES)}"
            raise ValueError(f"{path}: metric {sorted(unknown)[0]!r}: {rule}")
    return claims


# --- the study ----------------------------------------------------------------------------------


class Study:
    """The deciding runs of a study, and their counts.

    Args:
        folder: finetune_nlu.py's --out.
        data: the folder of the labelled sets.
    Raises:
        ValueError: a file is missing, or answers other utterances.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.rows = read_rows(folder / "rows.csv")
        if not self.rows:
            raise ValueError(f"{folder / 'rows.csv'}: must have runs; run finetune_nlu.py first")
        finished = [row for row in self.rows if math.isfinite(float(row["validation_score"]))]
        self.row_of = {run_of(row): row for row in finished}
        self.scores = {run_of(row): float(row["validation_score"]) for row in self.rows}
        # Where rates were added later, runs at one that is not the best any more are left out.
        self.runs = [
            run
            for run in self.row_of
            if run.subset < SWEEP and run.lr == (best_rate(self.scores, run.setting) or run.lr)
        ]
        self.test: list[Tagged] = load_tagged(data / "test.jsonl")
        self._counts: dict[tuple[Run, bool], Counts] = {}

    def counts(self, run: Run, of_assistant: bool) -> Counts:
        """Return a run's counts: of utterances, or of the assistant's dialogues.

        Raises:
            ValueError: the run has not been replayed.
        """
        key = run, of_assistant
        if key not in self._counts:
            if of_assistant:
                path = self.folder / "dissatisfaction" / f"{run.name}.npy"
                if not path.is_file():
                    what = "no such file: must be there; run simulate_assistant.py run"
                    raise ValueError(f"{path}: {what}")
                self._counts[key] = np.load(path)
            else:
                path = self.folder / "predictions" / run.name / "test.jsonl"
                self._counts[key] = count_all(self.test, read_answers(path, self.test))
        return self._counts[key]

    def has(self, model: str) -> bool:
        """Whether there is a deciding run of a model."""
        return any(run.model == model for run in self.runs)

    def pairs(self, is_mine: Callable[[Run], bool], is_other: Callable[[Run], bool]) -> Pairs:
        """Return the pairs of runs with the same subset and seed, by subset."""
        mine = {(run.subset, run.seed): run for run in self.runs if is_mine(run)}
        other = {(run.subset, run.seed): run for run in self.runs if is_other(run)}
        by_subset: Pairs = {}
        for subset, seed in sorted(mine.keys() & other.keys()):
            pair = mine[subset, seed], other[subset, seed]
            by_subset.setdefault(subset, []).append(pair)
        return by_subset

    def change(self, pairs: Pairs, name: str) -> Interval:
        """Return the relative change of a metric over pairs of runs."""
        of_assistant = name in ASSISTANT
        statistic = ASSISTANT[name] if of_assistant else metric(name)
        groups = [
            [np.stack([self.counts(run, of_assistant) for run in pair]) for pair in group]
            for group in pairs.values()
        ]
        return estimate(groups, relative_change(statistic))

    def value(self, runs: Iterable[Run], name: str) -> Interval:
        """Return a metric over runs."""
        of_assistant = name in ASSISTANT
        statistic = ASSISTANT[name] if of_assistant else metric(name)
        by_subset: dict[int, list[Counts]] = {}
        for run in runs:
            by_subset.setdefault(run.subset, []).append(self.counts(run, of_assistant))
        return estimate(list(by_subset.values()), statistic)

    def is_replayed(self) -> bool:
        """Whether simulate_assistant.py has written into the study."""
        return (self.folder / "dissatisfaction.csv").is_file()


def _of(run: Run, model: str, optimizer: str, shots: int) -> bool:
    return (run.model, run.optimizer, run.shots) == (model, optimizer, shots)


def _seeds(pairs: Pairs) -> int:
    return min((len(group) for group in pairs.values()), default=0)


def verdict(change: Interval, num_subsets: int, num_seeds: int) -> str:
    """Return what an interval says about the claim that errors become fewer."""
    if num_subsets < MIN_SUBSETS or num_seeds < MIN_SEEDS:
        return f"no verdict: fewer than {MIN_SUBSETS} subsets with {MIN_SEEDS} seeds"
    if not math.isfinite(change.low + change.high):
        return "not testable here: the baseline has no errors in some samples"
    if change.high < 0:
        return "holds"
    return "does not hold here: " + ("more errors" if change.low > 0 else "the interval has 0")


def figures_of(study: Study, claims: Iterable[Claim], optimizer: str) -> list[Figure]:
    """Return the figures of all claims, for each number of shots of the study."""
    figures = []
    for claim in claims:
        missing = [name for name in (claim.model, claim.baseline) if name and not study.has(name)]
        if missing or claim.untestable:
            why = claim.untestable or f"the study has no run of {', '.join(missing)}"
            verdict_of = f"not testable here: {why}"
            figures += [Figure(claim, name, 0, None, 0, 0, verdict_of) for name in claim.metrics]
            continue
        for shots in sorted({run.shots for run in study.runs}, key=lambda each: each or math.inf):
            pairs = study.pairs(
                partial(_of, model=claim.model, optimizer=optimizer, shots=shots),
                partial(_of, model=claim.baseline, optimizer=optimizer, shots=shots),
            )
            figures += [_figure(study, claim, name, shots, pairs) for name in claim.metrics]
    return figures


def _figure(study: Study, claim: Claim, name: str, shots: int, pairs: Pairs) -> Figure:
    if not pairs or (name in ASSISTANT and not study.is_replayed()):
        why = "no pair of runs" if not pairs else "run simulate_assistant.py first"
        return Figure(claim, name, shots, None, 0, 0, f"not testable here: {why}")
    change = study.change(pairs, name)
    said = verdict(change, len(pairs), _seeds(pairs))
    return Figure(claim, name, shots, change, len(pairs), _seeds(pairs), said)


# --- the files ----------------------------------------------------------------------------------


def percent(interval: Interval | None) -> str:
    """Return a relative change in percent with its interval."""
    if interval is None:
        return ""
    value, low, high = (
        f"{100 * each:+.1f}" for each in (interval.value, interval.low, interval.high)
    )
    return f"{value} [{low}, {high}]"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def shots_name(shots: int) -> str:
    """Return how many utterances of an intent were trained on."""
    return str(shots) if shots else "all"


def claims_table(figures: Iterable[Figure]) -> str:
    """Return the table of the claims."""
    return table(
        ("claim", "metric", "shots", "paper, %", "here, %", "subsets x seeds", "verdict"),
        [
            (
                each.claim.text,
                NAMES[each.metric],
                shots_name(each.shots) if each.change else "",
                each.claim.paper.get(each.metric, ""),
                percent(each.change),
                f"{each.num_subsets} x {each.num_seeds}" if each.change else "",
                each.verdict,
            )
            for each in figures
        ],
    )


def models_table(study: Study) -> str:
    """Return a table of every model's errors."""
    shown = (
        list(NAMES) if study.is_replayed() else [name for name in NAMES if name not in ASSISTANT]
    )
    groups: dict[tuple[str, str, int], list[Run]] = {}
    for run in study.runs:
        groups.setdefault((run.model, run.optimizer, run.shots), []).append(run)
    rows = []
    for (model, optimizer, shots), runs in groups.items():
        edge = ", an edge" if is_at_edge(study.scores, runs[0]) else ""
        figures = [str(study.value(runs, name)) for name in shown]
        size = f"{int(study.row_of[runs[0]]['num_params']):,}"
        rate = f"{runs[0].lr:g}{edge}"
        rows.append([model, size, optimizer, rate, shots_name(shots), str(len(runs)), *figures])
    header = ("model", "parameters", "optimizer", "rate", "shots", "runs")
    return table((*header, *(NAMES[name] for name in shown)), rows)


def optimizers_table(study: Study) -> str:
    """Return AdamS's forms against AdamW, each at its own best rate; empty without both."""
    rows = []
    settings = dict.fromkeys((run.model, run.optimizer, run.shots) for run in study.runs)
    for model, optimizer, shots in settings:
        if optimizer == "adamw":
            continue
        mine = partial(_of, model=model, optimizer=optimizer, shots=shots)
        other = partial(_of, model=model, optimizer="adamw", shots=shots)
        if pairs := study.pairs(mine, other):
            first = next(iter(pairs.values()))[0]
            states = [f"{int(study.row_of[run]['state_bytes']):,}" for run in first]
            changes = [
                percent(study.change(pairs, name)) for name in ("intent_error", "slot_error")
            ]
            count = f"{len(pairs)} x {_seeds(pairs)}"
            rows.append([model, optimizer, shots_name(shots), count, *changes, *states])
    if not rows:
        return ""
    return table(
        (
            "model",
            "optimizer",
            "shots",
            "subsets x seeds",
            "intent error, %",
            "slot error, %",
            "AdamS state, bytes",
            "AdamW state, bytes",
        ),
        rows,
    )


def benchmarks_table(benchmarks: dict[str, dict[str, float]]) -> str:
    """Return what predict.py measured of each model."""
    return table(
        ("model", "parameters", "file, bytes", "median, ms", "95th percentile, ms", "utterances"),
        [
            (
                name,
                f"{each['parameters']:,}",
                f"{each['file_bytes']:,}",
                f"{each['median_ms']:.2f}",
                f"{each['p95_ms']:.2f}",
                str(each["utterances"]),
            )
            for name, each in benchmarks.items()
        ],
    )


def report_text(
    study: Study, figures: Sequence[Figure], benchmarks: dict[str, dict[str, float]]
) -> str:
    """Return report.md."""
    parts = [
        "# Intents and slots: the claims",
        "A change is relative, in percent, with its 95% interval; below zero is fewer errors.",
        claims_table(figures),
        "![the changes and the errors](nlu.png)",
        "## The models",
        models_table(study),
    ]
    if optimizers := optimizers_table(study):
        parts += ["## AdamS against AdamW in fine-tuning, each at its best rate", optimizers]
    if benchmarks:
        parts += ["## On the CPU, one utterance at a time", benchmarks_table(benchmarks)]
    return "\n\n".join(parts) + "\n"


def write_csv(path: Path, figures: Iterable[Figure]) -> None:
    """Write a row for each figure."""
    columns = ("claim", "metric", "shots", "paper", "change", "low", "high", "subsets", "seeds")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*columns, "verdict"))
        for each in figures:
            change = each.change
            ours = (change.value, change.low, change.high) if change else ("", "", "")
            numbers = [f"{x:.5f}" if isinstance(x, float) else x for x in ours]
            paper = each.claim.paper.get(each.metric, "")
            counts = (each.num_subsets, each.num_seeds)
            head = (each.claim.text, each.metric, each.shots, paper)
            writer.writerow((*head, *numbers, *counts, each.verdict))


def draw(path: Path, study: Study, figures: Sequence[Figure]) -> None:
    """Draw the changes with their intervals, and every run's errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [each for each in figures if each.change and math.isfinite(each.change.value)]
    height = max(3.5, 0.45 * len(shown) + 1)
    picture, (left, right) = plt.subplots(1, 2, figsize=(14, height), width_ratios=(2, 1))
    left.axvline(0, color="#999999", linewidth=1)
    for place, each in enumerate(reversed(shown)):
        change = each.change
        assert change is not None
        color = "#D55E00" if each.verdict == "holds" else "#0072B2"
        left.plot([100 * change.low, 100 * change.high], [place, place], color=color)
        left.plot([100 * change.value], [place], "o", color=color)
    labels = [
        f"{each.claim.model} / {each.claim.baseline}: "
        f"{NAMES[each.metric]}, {shots_name(each.shots)}"
        for each in reversed(shown)
    ]
    left.set_yticks(range(len(shown)), labels)
    left.set_xlabel("change of the errors in percent, 95% interval (orange: the claim holds)")
    models = list(dict.fromkeys(run.model for run in study.runs))
    markers = {
        "adams": ("o", "#D55E00"),
        "adams-cautious": ("^", "#009E73"),
        "adamw": ("x", "#000000"),
    }
    for run in study.runs:
        marker, color = markers[run.optimizer]
        error = 100 * float(study.row_of[run]["slot_error"])
        offset = 0.12 if run.optimizer == "adamw" else -0.12
        right.plot([models.index(run.model) + offset], [error], marker, color=color, alpha=0.6)
    right.set_xticks(range(len(models)), models, rotation=30)
    right.set_ylabel(
        "slot error in percent, a run a point\n(circles AdamS, triangles cautious, crosses AdamW)"
    )
    picture.tight_layout()
    picture.savefig(path, dpi=110)
    plt.close(picture)


def write(
    study: Study,
    claims: Sequence[Claim],
    optimizer: str,
    benchmarks: dict[str, dict[str, float]],
    out: Path,
) -> str:
    """Write all files, and return report.md."""
    figures = figures_of(study, claims, optimizer)
    out.mkdir(parents=True, exist_ok=True)
    text = report_text(study, figures, benchmarks)
    (out / "report.md").write_text(text)
    write_csv(out / "claims.csv", figures)
    draw(out / "nlu.png", study, figures)
    return text


def read_benchmarks(given: Iterable[str]) -> dict[str, dict[str, float]]:
    """Read what --benchmark names.

    Raises:
        ValueError: it is not NAME=FILE, or the file is not what predict.py printed.
    """
    benchmarks = {}
    for text in given:
        name, _, path = text.partition("=")
        try:
            benchmarks[name] = json.loads(Path(path).read_text())
        except (OSError, json.JSONDecodeError) as exc:
            rule = "must be NAME=FILE, with a file that predict.py --benchmark printed"
            raise ValueError(f"--benchmark {text}: {rule} ({exc})") from exc
    return benchmarks


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line. Returns 2 if the user has to change something."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--study", type=Path, required=True, help="finetune_nlu.py's --out")
    add("--data", type=Path, required=True, help="the folder of the labelled sets")
    add("--out", type=Path, required=True)
    default = Path(__file__).with_name("claims.toml")
    add("--claims", type=Path, default=default, help="(this example's claims.toml)")
    add("--optimizer", choices=OPTIMIZERS, default="adams", help="(%(default)s)")
    add("--benchmark", action="append", default=[], metavar="MODEL=FILE")
    args = parser.parse_args(argv)
    try:
        benchmarks = read_benchmarks(args.benchmark)
        study = Study(args.study, args.data)
        print(write(study, read_claims(args.claims), args.optimizer, benchmarks, args.out))
    except ValueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
