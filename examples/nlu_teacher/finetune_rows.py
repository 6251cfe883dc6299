"""The plan of a fine-tuning study and its files. It imports neither torch nor Megatron.

    rows.csv                           a row a run: settings, and METRICS on the test set
    predictions/RUN/SET.jsonl          the answers to each set of utterances: {words, intent, tags}
    models/RUN/                        the models that are kept
    settings.json                      what the study was begun with

A row is on the disk before the next run starts, so a study that was stopped goes on.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from labels import Tagged
from metrics import METRICS

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared import run_table

OPTIMIZERS = ("adams", "adams-cautious", "adamw")
"""AdamS in the paper's form, with the cautious mask, and PyTorch's AdamW."""

SWEEP = 1000
"""The few-shot subsets and seeds from here on choose the rates, and decide nothing else."""


@dataclass(frozen=True, order=True)
class Run:
    """One fine-tuning.

    Attributes:
        shots: utterances of each intent in the training set; 0 for all.
        subset: which few-shot subset.
        seed: of the heads' first weights, the order of the batches, and the dropout.
    """

    model: str
    optimizer: str
    lr: float
    shots: int
    subset: int
    seed: int

    @property
    def name(self) -> str:
        """The run's folder."""
        shots = self.shots or "full"
        return f"{self.model}-{self.optimizer}-{self.lr:g}-{shots}-{self.subset}-{self.seed}"

    @property
    def setting(self) -> tuple[str, str, int]:
        """What the run's rate is chosen for: model, optimizer and shots."""
        return self.model, self.optimizer, self.shots


class AnyRun(Protocol):
    """What the choice of a rate needs of a study's run."""

    @property
    def lr(self) -> float:
        """The learning rate."""

    @property
    def subset(self) -> int:
        """Which few-shot subset; from SWEEP on, the run chooses a rate."""

    @property
    def setting(self) -> Any:
        """What the rate is chosen for."""


class RunsInOrder[AnyRunT: AnyRun]:
    """A plan whose next run depends on the scores of those that are done."""

    def known_runs(self, scores: dict[AnyRunT, float]) -> list[AnyRunT]:
        """Return the runs that are known by now, in their order.

        Args:
            scores: of the runs that are done, on the validation set; lower is better.
        """
        raise NotImplementedError

    def next_run(self, scores: dict[AnyRunT, float]) -> AnyRunT | None:
        """Return the first run that is not done."""
        return next((run for run in self.known_runs(scores) if run not in scores), None)

    def num_done(self, scores: dict[AnyRunT, float]) -> int:
        """Count the runs of the plan that are done."""
        return sum(run in scores for run in self.known_runs(scores))


@dataclass(frozen=True)
class Plan(RunsInOrder[Run]):
    """Which runs a study has.

    Attributes:
        rates: what each model, optimizer and number of shots is tried with.
        subsets, seeds: how many; all pairs are run at the best rate.
        sweeps: with how many subsets each rate is tried; one score alone is noisy.
    """

    models: tuple[str, ...]
    optimizers: tuple[str, ...]
    rates: tuple[float, ...]
    shots: tuple[int, ...]
    subsets: int
    seeds: int
    sweeps: int = 2

    def settings(self) -> list[tuple[str, str, int]]:
        """Return the model, optimizer and shots of each comparison."""
        return [
            (model, optimizer, shots)
            for shots in self.shots
            for model in self.models
            for optimizer in self.optimizers
        ]

    def sweep(self, model: str, optimizer: str, shots: int) -> list[Run]:
        """Return the runs that choose a rate; none if there is one rate."""
        if len(self.rates) == 1:
            return []
        places = range(SWEEP, SWEEP + self.sweeps)
        return [Run(model, optimizer, lr, shots, i, i) for i in places for lr in self.rates]

    def num_runs(self) -> int:
        """Count the runs."""
        return sum(len(self.sweep(*each)) + self.subsets * self.seeds for each in self.settings())

    def known_runs(self, scores: dict[Run, float]) -> list[Run]:
        """Return the runs that are known by now: of each setting its rates, and then the others."""
        runs = []
        for setting in self.settings():
            sweep = self.sweep(*setting)
            runs += sweep
            if not all(run in scores for run in sweep):
                continue
            lr = best_rate({run: scores[run] for run in sweep}, setting) or self.rates[0]
            model, optimizer, shots = setting
            places = itertools.product(range(self.subsets), range(self.seeds))
            runs += [Run(model, optimizer, lr, shots, *place) for place in places]
        return runs


def sweep_means[AnyRunT: AnyRun](
    scores: Mapping[AnyRunT, float], setting: Any
) -> dict[float, float]:
    """Return the mean score of each rate in the runs that choose it.

    A rate with fewer of these runs than another is left out: its sweep is not complete.
    """
    found: dict[float, list[float]] = {}
    for run, score in scores.items():
        if run.setting == setting and run.subset >= SWEEP:
            found.setdefault(run.lr, []).append(score)
    most = max(map(len, found.values()), default=0)
    return {lr: sum(each) / most for lr, each in found.items() if len(each) == most}


def best_rate[AnyRunT: AnyRun](scores: Mapping[AnyRunT, float], setting: Any) -> float | None:
    """Return the rate with the best mean score; None if none was chosen, as there is one alone."""
    means = sweep_means(scores, setting)
    return min(means, key=lambda lr: (means[lr], lr)) if means else None


def is_at_edge(scores: dict[Run, float], run: Run) -> bool:
    """Whether a run's rate is the lowest or highest that was tried, so a better may lie beyond."""
    tried = sweep_means(scores, run.setting)
    return bool(tried) and run.lr in (min(tried), max(tried))


COLUMNS = (
    "model",
    "optimizer",
    "lr",
    "shots",
    "subset",
    "seed",
    "validation_score",  # intent error plus slot error of the best evaluation
    "best_step",
    "steps",
    *METRICS,  # on the test set
    "num_params",
    "num_train",
    "state_bytes",  # of the optimizer
    "train_loss",  # the mean of the last ten steps
    "wall_seconds",
    "cpu_seconds",
    "torch",
)


def run_of(row: dict[str, str]) -> Run:
    """Return the run that a row is about."""
    names = ("shots", "subset", "seed")
    numbers = (int(row[name]) for name in names)
    return Run(row["model"], row["optimizer"], float(row["lr"]), *numbers)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of rows.csv.

    Raises:
        ValueError: the file has other columns.
    """
    return run_table.read(path, COLUMNS)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a run, whose keys are COLUMNS."""
    run_table.append_row(path, row, COLUMNS)


MODEL = "model "
"""What the key of a model's files begins with, in settings.json."""


def named_path(text: str) -> tuple[str, Path]:
    """Read NAME=PATH.

    Raises:
        ValueError: it is not that.
    """
    name, equals, path = text.partition("=")
    if not (name and equals and path) or "/" in name:
        raise ValueError(f"{text}: must be NAME=PATH; a name has no slash")
    return name, Path(path)


def digest(paths: Iterable[Path]) -> str:
    """Return a hash of files' contents, in the order of their paths."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write a study's settings, or compare them with those that it was begun with.

    A key may be added later, such as a further model.

    Raises:
        ValueError: a setting differs.
    """
    before = json.loads(path.read_text()) if path.exists() else {}
    now = json.loads(json.dumps(settings))
    for key in before.keys() & now.keys():
        if before[key] != now[key]:
            was = f"{key}={now[key]!r}: must be {before[key]!r}, as in {path}"
            raise ValueError(f"{was}; give the same settings and files, or another --out")
    path.write_text(json.dumps(before | now, indent=2) + "\n")


def renew(folder: Path, settings: dict[str, Any]) -> int:
    """Drop the rows that other files or settings gave, and return how many these are.

    Where a model's files have changed, these are its rows; where anything else has, all rows.
    """
    path = folder / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    now = json.loads(json.dumps(settings))
    changed = {key for key in before.keys() & now.keys() if before[key] != now[key]}
    models = {key.removeprefix(MODEL) for key in changed if key.startswith(MODEL)}
    is_all = any(not key.startswith(MODEL) for key in changed)
    rows = read_rows(folder / "rows.csv")
    kept = [row for row in rows if not is_all and row["model"] not in models]
    if len(kept) < len(rows):
        partial = folder / "rows.csv.partial"
        partial.unlink(missing_ok=True)
        for row in kept:
            append_row(partial, row)
        partial.touch()
        partial.replace(folder / "rows.csv")
    # Only now: a process that is killed in between drops the same rows again.
    if changed:
        path.write_text(json.dumps(before | now, indent=2) + "\n")
    return len(rows) - len(kept)


def kept_model(study: Path, model: str, optimizer: str, shots: int) -> Path:
    """Return the folder of the model that a study has kept: subset 0, seed 0, at the best rate.

    Raises:
        ValueError: the study has none.
    """
    scores = {run_of(row): float(row["validation_score"]) for row in read_rows(study / "rows.csv")}
    setting = model, optimizer, shots
    best = best_rate(scores, setting)
    for run in scores:
        if run.setting == setting and run.subset == run.seed == 0 and run.lr == (best or run.lr):
            return study / "models" / run.name
    known = ", ".join(
        sorted({f"{run.model} ({run.optimizer}, {run.shots} shots)" for run in scores})
    )
    what = f"{model} ({optimizer}, {shots} shots): must be one of the study's: {known or 'none'}"
    raise ValueError(f"{study}: {what}")


# --- answers ------------------------------------------------------------------------------------


def write_answers(path: Path, answers: Iterable[Tagged]) -> None:
    """Write answers, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for each in answers:
            entry = {"words": each.words, "intent": each.intent, "tags": each.tags}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_answers(path: Path, labelled: Sequence[Tagged]) -> list[Tagged]:
    """Read the answers to these utterances.

    Raises:
        ValueError: they are the answers to others.
    """
    lines = path.read_text("utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    if [tuple(entry["words"]) for entry in entries] != [each.words for each in labelled]:
        what = "must answer the utterances of the set, one a line and in their order"
        raise ValueError(f"{path}: {what}; fine-tune again with the data as it is now")
    return [
        Tagged(tuple(entry["words"]), tuple(entry["tags"]), entry["intent"], f"{path}:{number}")
        for number, entry in enumerate(entries, 1)
    ]
