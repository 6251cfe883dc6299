"""Write what a study of methods says: tables, a picture, the paper's questions, and guidelines.

    python method_report.py --study runs/ssl/study --labelled runs/nlu/snips --out runs/ssl/report

Inputs: folders of studies of train_ssl.py, and the labelled sets that they were done with. With
--prepared, --selection and --mixed-in, the report also says what was selected. Outputs, in --out:
report.md, table.csv (a row for each method, selection and size), guidelines.json, and methods.png.
Runs that chose a rate, runs at other rates, and runs that diverged are left out.

--pack writes each study's rows.csv and counts.npz to a folder of its name: what was wrong in each
utterance of the test set, in the place of the answers. Such a folder is a --study, too, and gives
the same report; results/study has those of the example.

A comparison pairs runs on the same labelled utterances and with the same seed, and gives the
relative change of an error, with the 95% percentile interval of a bootstrap over test utterances
and few-shot subsets. It holds if the whole interval is on one side of zero, and is open otherwise.
With fewer than 5 subsets nothing is said to hold. The error is the intent error for "ic", the slot
error (1 - F1) for "ner", and the frame error for "both".

The guidelines follow one rule, for each task, optimizer and number of shots. It reads every second
utterance of the test set. How much the recommended method changes the error is said of the others,
which have decided nothing.

    1. A candidate is a method with a selection and a pool size. It is kept if its error is below
       that of supervised training, by the whole interval.
    2. Of those kept, the best one has the lowest mean score on the validation sets.
    3. Each one kept whose error is at most 10% above the best one's, by the whole interval, is as
       good. Of these, the one that takes the least CPU time is recommended; PL and KD take their
       teacher's as well.
    4. If none is kept, supervised training is recommended, and the pool left alone.
"""

import argparse
import copy
import csv
import json
import math
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

import numpy as np
from finetune_rows import SWEEP, best_rate, named_path, read_answers
from labels import Tagged, load_tagged
from method_rows import METHODS, SUPERVISED, TAUGHT, Run, read_rows, run_of
from metrics import (
    COLUMNS,
    Counts,
    Interval,
    count_all,
    estimate,
    metric,
    rates,
    relative_change,
)
from pool_report import pool_section

ERROR_OF = {"ic": "intent_error", "ner": "slot_error", "both": "frame_error"}
MIN_SUBSETS = 5
TOLERATED = 0.005  # half a point, by which AdamS may be worse than AdamW
PACKED = "counts.npz"
AS_GOOD = 0.10  # by which a cheaper method's error may be above the best one's

Key = tuple[str, str, int]  # task, optimizer, shots
Pool = tuple[str, int]  # selection, pool size
Candidate = tuple[str, str, int]  # method, selection, pool size


def difference(
    statistic: Callable[[Counts], np.ndarray],
) -> Callable[[Counts], np.ndarray]:
    """Return first - second of a statistic; its counts are (..., 2, columns)."""

    def subtract(sums: Counts) -> np.ndarray:
        first, second = np.moveaxis(statistic(sums), -1, 0)
        return np.asarray(first - second)

    return subtract


@dataclass(frozen=True)
class Comparison:
    """Two groups of runs, as pairs.

    Attributes:
        change: of the first against the second; None without a pair.
    """

    change: Interval | None
    num_subsets: int

    @property
    def verdict(self) -> str:
        """What may be said."""
        if self.change is None:
            return "no runs"
        if self.num_subsets < MIN_SUBSETS:
            return f"open: fewer than {MIN_SUBSETS} subsets"
        if self.change.high < 0:
            return "better"
        return "worse" if self.change.low > 0 else "open"

    def __str__(self) -> str:
        if self.change is None:
            return "-"
        low, high = 100 * self.change.low, 100 * self.change.high
        return f"{100 * self.change.value:+.1f}% [{low:+.1f}, {high:+.1f}]"


class Results:
    """The rows of studies that are compared, and the answers behind them.

    Raises:
        ValueError: there is no run to compare, or two studies have the same one.
    """

    def __init__(self, studies: Sequence[Path], test: Sequence[Tagged]) -> None:
        self.test = test
        self.places = slice(None)
        rows: dict[Run, dict[str, str]] = {}
        self.study_of: dict[Run, Path] = {}
        for study in studies:
            mine = {run_of(row): row for row in read_rows(study / "rows.csv")}
            if both := sorted(mine.keys() & rows.keys()):
                what = f"{study}: has {both[0].name}, as has {self.study_of[both[0]]}"
                raise ValueError(f"{what}: each run must be in one study; give one of the two")
            rows |= mine
            self.study_of |= dict.fromkeys(mine, study)
        scores = {run: float(row["validation_score"]) for run, row in rows.items()}
        compared = {run: row for run, row in rows.items() if run.subset < SWEEP}
        compared = {
            run: row
            for run, row in compared.items()
            if run.lr == (best_rate(scores, run.setting) or run.lr)
        }
        self.rows = {run: row for run, row in compared.items() if math.isfinite(scores[run])}
        self.num_diverged = len(compared) - len(self.rows)
        if not self.rows:
            what = "no run that is done has a subset to compare: there must be some"
            names = ", ".join(f"{study}/rows.csv" for study in studies)
            raise ValueError(f"{names}: {what}; train with train_ssl.py first")
        self._counts: dict[Run, Counts] = {}
        for study in studies:
            self._unpack(study)

    def of_every_second(self, first: int) -> "Results":
        """Return the same runs, judged by the utterances `first`, `first` + 2, and so on."""
        half = copy.copy(self)
        half.places = slice(first, None, 2)
        return half

    def counts(self, run: Run) -> Counts:
        """Return the counts of a run's answers to the test set, (utterances, columns)."""
        if run not in self._counts:
            path = self.study_of[run] / "predictions" / run.name / "test.jsonl"
            self._counts[run] = count_all(self.test, read_answers(path, self.test))
        return self._counts[run][self.places]

    def _unpack(self, study: Path) -> None:
        """Take the counts that `pack` has written for a study, if there are any."""
        path = study / PACKED
        if not path.is_file():
            return
        with np.load(path) as packed:
            names, counts = packed["names"], packed["counts"].astype(np.float64)
        labelled = count_all(self.test, self.test)
        of_labels = [COLUMNS.index(name) for name in ("slots_labelled", "utterances")]
        if counts.shape[1:] != labelled.shape or np.any(
            counts[..., of_labels] != labelled[..., of_labels]
        ):
            what = f"{path}: is of another test set: must be of {len(self.test)} utterances with"
            raise ValueError(f"{what} the slots of --labelled; name the one that it was made with")
        by_name = dict(zip(names.tolist(), counts, strict=True))
        mine = [run for run, folder in self.study_of.items() if folder == study]
        self._counts |= {run: by_name[run.name] for run in mine if run.name in by_name}

    def pack(self, study: Path, out: Path) -> None:
        """Write a study's rows, and the counts of all its runs that are compared.

        Raises:
            ValueError: it has none, or an utterance has too many slots.
        """
        runs = [run for run in self.rows if self.study_of[run] == study]
        if not runs:
            raise ValueError(f"{study}: has no run to compare: must have some; leave it out")
        counts = np.stack([self.counts(run) for run in runs])
        if counts.max() > np.iinfo(np.uint8).max:
            raise ValueError(f"{study}: an utterance has over 255 slots; leave --pack out")
        out.mkdir(parents=True, exist_ok=True)
        names = np.array([run.name for run in runs])
        np.savez_compressed(out / PACKED, names=names, counts=counts.astype(np.uint8))
        if out.resolve() != study.resolve():
            shutil.copy(study / "rows.csv", out / "rows.csv")

    def groups(self) -> list[Key]:
        """Return the tasks, optimizers and shots that have runs."""
        return sorted({(run.task, run.optimizer, run.shots) for run in self.rows})

    def of(self, key: Key, method: str, pool: Pool) -> list[Run]:
        """Return the runs of a candidate."""
        return sorted(
            run
            for run in self.rows
            if (run.task, run.optimizer, run.shots) == key
            and (run.method, run.selection, run.pool_size) == (method, *pool)
        )

    def candidates(self, key: Key) -> list[Candidate]:
        """Return what was run for a key, supervised training first."""
        found = {
            (run.method, run.selection, run.pool_size)
            for run in self.rows
            if (run.task, run.optimizer, run.shots) == key
        }
        return sorted(found, key=lambda each: (METHODS.index(each[0]), each[1:]))

    def estimate(self, runs: Iterable[Run], name: str) -> Interval:
        """Return a metric's mean over runs, with its interval."""
        groups = defaultdict(list)
        for run in runs:
            groups[run.subset].append(self.counts(run))
        return estimate(list(groups.values()), metric(name))

    def compare(
        self,
        pairs: Iterable[tuple[Sequence[Run], Sequence[Run]]],
        name: str,
        statistic: Callable[..., Any] = relative_change,
    ) -> Comparison:
        """Compare a metric of the first runs of each pair with that of its second ones.

        Args:
            pairs: of runs with the same subset and seed; a side may have several methods.
        """
        groups: dict[int, list[Counts]] = defaultdict(list)
        for sides in pairs:
            sums = [np.mean([self.counts(run) for run in side], axis=0) for side in sides]
            groups[sides[0][0].subset].append(np.stack(sums))
        if not groups:
            return Comparison(None, 0)
        change = estimate(list(groups.values()), statistic(metric(name)))
        return Comparison(change, len(groups))

    def paired(
        self, key: Key, first: Candidate, second: Candidate, other: Key | None = None
    ) -> list[tuple[list[Run], list[Run]]]:
        """Pair the runs of two candidates by subset and seed; the second may have another key."""
        partners = {
            (run.subset, run.seed): run for run in self.of(other or key, second[0], second[1:])
        }
        return [
            ([run], [partners[run.subset, run.seed]])
            for run in self.of(key, first[0], first[1:])
            if (run.subset, run.seed) in partners
        ]

    def mean(self, runs: Sequence[Run], column: str) -> float:
        """Return the mean of a column of the rows."""
        return float(np.mean([float(self.rows[run][column]) for run in runs]))


BASELINE: Candidate = (SUPERVISED, "", 0)


@dataclass(frozen=True)
class Line:
    """A candidate's line of the table."""

    key: Key
    candidate: Candidate
    num_runs: int
    error: Interval
    f1: float
    validation: float
    cpu_seconds: float
    against: Comparison  # supervised training

    @property
    def name(self) -> str:
        """The method, with its pool."""
        return name_of(self.candidate)


def name_of(candidate: Candidate) -> str:
    """Return a candidate in words."""
    method, selection, size = candidate
    return f"{method}, {selection} {size or 'all'}" if selection else method


def lines_of(results: Results) -> list[Line]:
    """Return the table's lines."""
    lines = []
    for key in results.groups():
        error = ERROR_OF[key[0]]
        taught_by = results.of(key, SUPERVISED, ("", 0))
        teacher = results.mean(taught_by, "cpu_seconds") if taught_by else 0.0
        for candidate in results.candidates(key):
            runs = results.of(key, candidate[0], candidate[1:])
            cpu = results.mean(runs, "cpu_seconds")
            found = rates(np.sum([results.counts(run) for run in runs], axis=(0, 1)))
            lines.append(
                Line(
                    key,
                    candidate,
                    len(runs),
                    results.estimate(runs, error),
                    float(found["slot_f1"]) if key[0] != "ic" else math.nan,
                    results.mean(runs, "validation_score"),
                    cpu + (teacher if candidate[0] in TAUGHT else 0.0),
                    results.compare(results.paired(key, candidate, BASELINE), error),
                )
            )
    return lines


# --- the guidelines -----------------------------------------------------------------------------


def guidelines(results: Results) -> list[dict[str, Any]]:
    """Apply the rule of the module's first lines to each task, optimizer and number of shots."""
    read, others = (results.of_every_second(first) for first in (0, 1))
    lines = lines_of(read)
    return [guideline(read, others, key, lines) for key in results.groups()]


def guideline(results: Results, others: Results, key: Key, lines: Sequence[Line]) -> dict[str, Any]:
    """Apply the rule to one of them.

    Args:
        results: what the rule reads.
        others: of the utterances that it does not read.
        lines: of the results.
    """
    task, optimizer, shots = key
    mine = [line for line in lines if line.key == key]
    answer: dict[str, Any] = {"task": task, "optimizer": optimizer, "shots": shots}
    error = ERROR_OF[task].replace("_", " ")

    def recommend(candidate: Candidate, why: str) -> dict[str, Any]:
        names = ("method", "selection", "pool_size")
        return answer | dict(zip(names, candidate, strict=True)) | {"why": why}

    if all(line.against.num_subsets < MIN_SUBSETS for line in mine):
        return answer | {"method": None, "why": f"fewer than {MIN_SUBSETS} subsets were run"}
    kept = [line for line in mine if line.against.verdict == "better"]
    if not kept:
        why = f"no method's {error} is below supervised training's by a whole interval"
        return recommend(BASELINE, why)
    best = min(kept, key=lambda line: line.validation)
    as_good = [line for line in kept if _is_as_good(results, line, best)]
    chosen = min(as_good, key=lambda line: line.cpu_seconds)
    pairs = others.paired(key, chosen.candidate, BASELINE)
    found = others.compare(pairs, ERROR_OF[task])
    why = f"its {error} changes by {found} against supervised training, on utterances that did not "
    why += "decide"
    if chosen is best:
        why += "; it has the best validation score"
        if len(as_good) > 1:
            why += f", and takes the least CPU time of {len(as_good)} that are as good"
    else:
        why += f"; it is as good as {best.name}, and takes less CPU time"
    return recommend(chosen.candidate, why)


def _is_as_good(results: Results, line: Line, best: Line) -> bool:
    if line is best:
        return True
    pairs = results.paired(line.key, line.candidate, best.candidate)
    change = results.compare(pairs, ERROR_OF[line.key[0]]).change
    return change is not None and change.high <= AS_GOOD


# --- the findings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """A question, for a task, an optimizer and a number of shots."""

    question: str
    key: Key
    comparison: Comparison


def _match(
    results: Results, key: Key, firsts: Sequence[Candidate], seconds: Sequence[Candidate]
) -> list[tuple[list[Run], list[Run]]]:
    """Pair several candidates with several, on the subsets and seeds that all of them have."""
    sides = [[results.of(key, each[0], each[1:]) for each in side] for side in (firsts, seconds)]
    tables = [[{(r.subset, r.seed): r for r in runs} for runs in side] for side in sides]
    whole = [set(table) for side in tables for table in side]
    places = sorted(set.intersection(*whole)) if whole else []
    return [
        ([table[place] for table in tables[0]], [table[place] for table in tables[1]])
        for place in places
    ]


def findings(results: Results, random_name: str) -> list[Finding]:
    """Put the paper's questions to the rows.

    Args:
        random_name: of the selection that the others are compared with.
    """
    found = []
    for key in results.groups():
        error, candidates = ERROR_OF[key[0]], results.candidates(key)
        pools = sorted({each[1:] for each in candidates if each[1]})
        methods = {each[0] for each in candidates}
        pairs = []
        if {"vat", "cvt", *TAUGHT} <= methods:
            for pool in pools:
                first, second = ([(m, *pool) for m in side] for side in (("vat", "cvt"), TAUGHT))
                pairs += _match(results, key, first, second)
            question = "VAT and CVT against PL and KD"
            found.append(Finding(question, key, results.compare(pairs, error)))
        names = sorted({name for name, _ in pools})
        for first, second in _selections(names, random_name):
            pairs = [
                pair
                for method, selection, size in candidates
                if selection == first
                for pair in results.paired(key, (method, first, size), (method, second, size))
            ]
            question = f"selection {first} against {second}"
            found.append(Finding(question, key, results.compare(pairs, error)))
    return found


def _selections(names: Sequence[str], random_name: str) -> list[tuple[str, str]]:
    """Return which selections are compared: each with the random one, and then with each other."""
    others = [name for name in names if name != random_name]
    pairs = [(name, random_name) for name in others] if random_name in names else []
    return pairs + [(b, a) for i, a in enumerate(others) for b in others[i + 1 :]]


@dataclass(frozen=True)
class Optimizers:
    """A form of AdamS against AdamW for a candidate: the error's difference, as a share of 1."""

    optimizer: str
    task: str
    shots: int
    candidate: Candidate
    comparison: Comparison

    @property
    def verdict(self) -> str:
        """Whether AdamS is worse by more than TOLERATED."""
        change = self.comparison.change
        assert change is not None
        if self.comparison.num_subsets < MIN_SUBSETS:
            return self.comparison.verdict
        if change.high <= TOLERATED:
            return "no worse than 0.5 points"
        return "worse by more than 0.5 points" if change.low > TOLERATED else "open"


def optimizers(results: Results) -> list[Optimizers]:
    """Compare AdamS's forms with AdamW, each at its own rate, wherever both were run."""
    found = []
    for task, optimizer, shots in results.groups():
        mine, other = (task, optimizer, shots), (task, "adamw", shots)
        if optimizer == "adamw":
            continue
        for candidate in results.candidates(mine):
            pairs = results.paired(mine, candidate, candidate, other)
            if pairs:
                comparison = results.compare(pairs, ERROR_OF[task], difference)
                found.append(Optimizers(optimizer, task, shots, candidate, comparison))
    return found


# --- the files ----------------------------------------------------------------------------------


def _key_name(key: Key) -> str:
    return f"{key[0]}, {key[1]}, {key[2] or 'all'} shots"


def write_report(
    results: Results, lines: Sequence[Line], answers: Sequence[dict[str, Any]], args: Any
) -> str:
    """Return report.md."""
    text = ["# Semi-supervised methods", "", f"{len(results.rows)} runs, {len(results.test)} test "]
    text[-1] += f"utterances; {results.num_diverged} runs diverged and are left out. Errors and "
    text[-1] += "changes have 95% intervals."
    if args.prepared is not None:
        selections = dict(map(named_path, args.selection))
        text += pool_section(args.prepared, selections, args.mixed_in)
    for key in results.groups():
        error = ERROR_OF[key[0]].replace("_", " ")
        text += ["", f"## {_key_name(key)}", ""]
        text.append(f"| method, pool | runs | {error} | slot F1 | against supervised | | CPU s |")
        text.append("| --- | ---: | --- | ---: | --- | --- | ---: |")
        for line in lines:
            if line.key != key:
                continue
            f1 = "-" if math.isnan(line.f1) else f"{line.f1:.3f}"
            is_baseline = line.candidate == BASELINE
            change = ("", "") if is_baseline else (str(line.against), line.against.verdict)
            cells = (line.name, line.num_runs, line.error, f1, *change, f"{line.cpu_seconds:.0f}")
            text.append(f"| {' | '.join(map(str, cells))} |")
    text += ["", "## Findings", "", "| question | where | change of the error | verdict |"]
    text.append("| --- | --- | --- | --- |")
    for each in findings(results, args.random):
        where = _key_name(each.key)
        text.append(
            f"| {each.question} | {where} | {each.comparison} | {each.comparison.verdict} |"
        )
    if compared := optimizers(results):
        text += ["", "## AdamS minus AdamW, in points of the error", ""]
        text += ["| optimizer | method, pool | task, shots | points | verdict |"]
        text += ["| --- | --- | --- | --- | --- |"]
        for row in compared:
            points = str(row.comparison).replace("%", "")
            where = f"{row.task}, {row.shots or 'all'}"
            cells = (row.optimizer, name_of(row.candidate), where, points, row.verdict)
            text.append(f"| {' | '.join(cells)} |")
    text += ["", "## Guidelines", ""]
    for answer in answers:
        where = _key_name((answer["task"], answer["optimizer"], answer["shots"]))
        what = "no guideline"
        if answer["method"] is not None:
            what = name_of((answer["method"], answer["selection"], answer["pool_size"]))
        text.append(f"- **{where}: {what}.** Why: {answer['why']}.")
    return "\n".join(text) + "\n"


def write_table(path: Path, lines: Sequence[Line]) -> None:
    """Write table.csv."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = ("task", "optimizer", "shots", "method", "selection", "pool_size", "runs", "error")
        more = ("low", "high", "slot_f1", "validation_score", "cpu_seconds")
        changes = ("change", "change_low", "change_high", "verdict")
        writer.writerow((*names, *more, *changes))
        for line in lines:
            change = line.against.change
            values = (line.error.value, line.error.low, line.error.high, line.f1)
            values += (line.validation, line.cpu_seconds)
            values += (change.value, change.low, change.high) if change else (math.nan,) * 3
            figures = ["" if math.isnan(value) else f"{value:.5f}" for value in values]
            verdict = line.against.verdict
            writer.writerow((*line.key, *line.candidate, line.num_runs, *figures, verdict))


def draw(path: Path, results: Results, lines: Sequence[Line]) -> None:
    """Draw each candidate's error with its interval, a panel for each key."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = results.groups()
    most = max(sum(line.key == key for line in lines) for key in keys)
    size = (6.5 * len(keys), max(2.5, 0.35 * most + 1.2))
    picture, panels = plt.subplots(1, len(keys), figsize=size, squeeze=False)
    for key, panel in zip(keys, panels[0], strict=True):
        mine = [line for line in lines if line.key == key][::-1]
        for place, line in enumerate(mine):
            color = "#000000" if line.candidate == BASELINE else "#0072B2"
            panel.plot([line.error.low, line.error.high], [place, place], color=color)
            panel.plot([line.error.value], [place], "o", color=color)
            if line.candidate == BASELINE:
                panel.axvline(line.error.value, color="#999999", linewidth=1)
        panel.set_yticks(range(len(mine)), [line.name for line in mine])
        panel.set_xlabel(f"{ERROR_OF[key[0]].replace('_', ' ')}, 95% interval")
        panel.set_title(_key_name(key))
    picture.tight_layout()
    picture.savefig(path, dpi=120)
    plt.close(picture)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line. Returns 2 if the user has to change something."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--study", type=Path, nargs="+", required=True, help="folders of train_ssl.py"
    )
    parser.add_argument("--labelled", type=Path, required=True, help="the folder of test.jsonl")
    parser.add_argument("--random", default="random", help="the random selection (%(default)s)")
    pools = parser.add_argument_group("what was selected")
    pools.add_argument("--prepared", type=Path, help="a folder of pool_prepare.py")
    pools.add_argument(
        "--selection",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="of select_pool.py",
    )
    pools.add_argument("--mixed-in", type=Path, help="of divide_corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="results")
    parser.add_argument(
        "--pack", type=Path, metavar="FOLDER", help="of the studies without answers"
    )
    args = parser.parse_args(argv)
    try:
        path = args.labelled / "test.jsonl"
        if not path.is_file():
            raise ValueError(
                f"{path}: no such file: must be the study's; write it with labelled.py"
            )
        names = [study.resolve().name for study in args.study]
        if args.pack is not None and len(set(names)) < len(names):
            what = f"--pack: the studies {', '.join(names)}: must have names of their own"
            raise ValueError(f"{what}; rename a folder")
        results = Results(args.study, load_tagged(path))
        lines = lines_of(results)
        answers = guidelines(results)
        report = write_report(results, lines, answers, args)
        if args.pack is not None:
            for study, name in zip(args.study, names, strict=True):
                results.pack(study, args.pack / name)
    except ValueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.md").write_text(report)
    (args.out / "guidelines.json").write_text(json.dumps(answers, indent=2) + "\n")
    write_table(args.out / "table.csv", lines)
    draw(args.out / "methods.png", results, lines)
    print(f"{args.out / 'report.md'}: {len(results.rows)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
