"""The plan of a study of methods, and its files. It imports neither torch nor Megatron.

    rows.csv                     a row a run: what was run, and METRICS on the test set
    losses/RUN.csv               each loss apart, its mean between two evaluations
    predictions/RUN/test.jsonl   the answers to the test set: {words, intent, tags}
    models/RUN/                  the models that teach, and each setting's of subset 0 and seed 0
    settings.json                what the study was begun with

A row is on the disk before the next run starts, so a study that was stopped goes on.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

from finetune_rows import SWEEP, RunsInOrder, best_rate
from metrics import METRICS

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared import run_table

SUPERVISED = "supervised"
TAUGHT = ("pl", "kd")
"""The methods that need a teacher."""

METHODS = (SUPERVISED, *TAUGHT, "vat", "cvt")

METRICS_OF = {
    "ic": ("intent_error",),
    "ner": ("slot_f1", "slot_error"),
    "both": METRICS,
}
"""The metrics that a task's model is meant to be good at; the others are left empty."""

SCORES = {"ic": ("intent_error",), "ner": ("slot_error",), "both": ("intent_error", "slot_error")}
"""The metrics whose sum, on the validation set, chooses a rate and the time to stop."""


@dataclass(frozen=True, order=True)
class Setting:
    """What a rate is chosen for."""

    method: str
    task: str
    optimizer: str
    shots: int


@dataclass(frozen=True, order=True)
class Run:
    """One training.

    Attributes:
        selection: the name of the pool; "" for supervised runs.
        pool_size: how many of its first utterances; 0 for all.
        shots: labelled utterances of each intent; 0 for all.
        subset: which few-shot subset.
        seed: of the first weights, the order of the batches, the dropout, and VAT's noise.
    """

    method: str
    task: str
    optimizer: str
    lr: float
    shots: int
    subset: int
    seed: int
    selection: str = ""
    pool_size: int = 0

    @property
    def name(self) -> str:
        """The run's folder."""
        shots = self.shots or "full"
        name = f"{self.method}-{self.task}-{self.optimizer}-{self.lr:g}-{shots}-{self.subset}"
        name = f"{name}-{self.seed}"
        if self.selection:
            name = f"{name}-{self.selection}-{self.pool_size or 'all'}"
        return name

    @property
    def setting(self) -> Setting:
        """What the run's rate is chosen for."""
        return Setting(self.method, self.task, self.optimizer, self.shots)


@dataclass(frozen=True)
class Plan(RunsInOrder[Run]):
    """Which runs a study has.

    Attributes:
        rates: what each setting is tried with, on the first selection and pool size.
        selections: names of pools.
        pool_sizes: 0 for a whole pool.
        subsets, seeds: how many; all pairs are run at the best rate.
        sweeps: with how many subsets each rate is tried.
    """

    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    optimizers: tuple[str, ...]
    rates: tuple[float, ...]
    shots: tuple[int, ...]
    selections: tuple[str, ...]
    pool_sizes: tuple[int, ...]
    subsets: int
    seeds: int
    sweeps: int = 2

    def settings(self) -> list[Setting]:
        """Return all settings; the supervised ones, which teach others, come first."""
        methods = sorted(self.methods, key=METHODS.index)
        each = itertools.product(self.shots, self.tasks, self.optimizers, methods)
        return [Setting(method, task, optimizer, shots) for shots, task, optimizer, method in each]

    def pools(self, method: str) -> list[tuple[str, int]]:
        """Return the selections and sizes of a method; none for supervised training."""
        if method == SUPERVISED:
            return [("", 0)]
        return list(itertools.product(self.selections, self.pool_sizes))

    def sweep(self, setting: Setting) -> list[Run]:
        """Return the runs that choose a rate; none if there is one rate."""
        if len(self.rates) == 1:
            return []
        pool = self.pools(setting.method)[0]
        seeds = range(SWEEP, SWEEP + self.sweeps)
        return [_run(setting, lr, i, i, *pool) for i in seeds for lr in self.rates]

    def num_runs(self) -> int:
        """Count the runs."""
        return sum(
            len(self.sweep(each)) + self.subsets * self.seeds * len(self.pools(each.method))
            for each in self.settings()
        )

    def known_runs(self, scores: dict[Run, float]) -> list[Run]:
        """Return the runs that are known by now."""
        runs = []
        for setting in self.settings():
            sweep = self.sweep(setting)
            runs += sweep
            if all(run in scores for run in sweep):
                lr = best_rate({run: scores[run] for run in sweep}, setting) or self.rates[0]
                places = itertools.product(
                    self.pools(setting.method), range(self.subsets), range(self.seeds)
                )
                runs += [_run(setting, lr, i, seed, *pool) for pool, i, seed in places]
        return runs

    def teacher_of(self, run: Run, scores: dict[Run, float]) -> Run:
        """Return the supervised run on the same labelled utterances that teaches a run."""
        setting = Setting(SUPERVISED, run.task, run.optimizer, run.shots)
        lr = best_rate({r: scores[r] for r in self.sweep(setting)}, setting) or self.rates[0]
        return _run(setting, lr, run.subset, run.seed, "", 0)


def _run(
    setting: Setting, lr: float, subset: int, seed: int, selection: str, pool_size: int
) -> Run:
    what = setting.method, setting.task, setting.optimizer, lr, setting.shots
    return Run(*what, subset, seed, selection, pool_size)


COLUMNS = (
    "method",
    "task",
    "model",
    "optimizer",
    "lr",
    "shots",
    "subset",
    "seed",
    "selection",
    "pool_size",
    "validation_score",  # of the best evaluation, see SCORES; inf if the loss was no number
    "best_step",
    "steps",  # each has a labelled batch
    *METRICS,  # on the test set
    "num_params",
    "num_train",
    "num_pool",  # utterances that were learned from, after --min-confidence
    "state_bytes",  # of the optimizer
    "supervised_loss",  # means between the last two evaluations
    "unlabelled_loss",
    "wall_seconds",
    "cpu_seconds",
    "torch",
)


def run_of(row: dict[str, str]) -> Run:
    """Return the run that a row is about."""
    names = ("shots", "subset", "seed")
    numbers = (int(row[name]) for name in names)
    what = row["method"], row["task"], row["optimizer"], float(row["lr"])
    return Run(*what, *numbers, row["selection"], int(row["pool_size"]))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of rows.csv.

    Raises:
        ValueError: the file has other columns.
    """
    return run_table.read(path, COLUMNS)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a run, whose keys are COLUMNS."""
    run_table.append_row(path, row, COLUMNS)
