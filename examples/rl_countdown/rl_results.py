"""The plan of the study and the files that it leaves: which run is next, runs.csv, curves.jsonl.

A row is on the disk before the next run starts. This module imports neither torch nor TRL.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared import run_table

SWEEP_SEED = 0
RATES = {
    "AdamS": (5e-5, 1e-4, 2e-4, 4e-4),
    "AdamW": (5e-5, 1e-4, 2e-4, 4e-4),
}
DECIDING_SEEDS = (1, 2, 3)


@dataclass(frozen=True, order=True)
class Run:
    """One run of GRPO."""

    optimizer: str
    lr: float
    seed: int


Results = dict[Run, float]  # the held-out accuracy at the end


# --- which runs ---------------------------------------------------------------------------------


def best_rate(results: Results, optimizer: str) -> float:
    """Return the rate with the highest held-out accuracy at the sweep's seed."""
    swept = {
        run.lr: accuracy
        for run, accuracy in results.items()
        if (run.optimizer, run.seed) == (optimizer, SWEEP_SEED)
    }
    if not swept:  # a study without a sweep has one rate
        return next(run.lr for run in results if run.optimizer == optimizer)
    return max(swept, key=lambda lr: (swept[lr], -lr))


def is_at_edge(results: Results, optimizer: str) -> bool:
    """Whether the best rate is the lowest or the highest one, so that a better may lie beyond."""
    rates = RATES[optimizer]
    return best_rate(results, optimizer) in (rates[0], rates[-1])


def next_run(results: Results) -> Run | None:
    """Return the first run of the plan that is not done: the sweep, then the deciding seeds."""
    sweep = [
        Run(optimizer, rates[index], SWEEP_SEED)
        for index in range(max(map(len, RATES.values())))
        for optimizer, rates in RATES.items()
    ]
    if missing := [run for run in sweep if run not in results]:
        return missing[0]
    best = {optimizer: best_rate(results, optimizer) for optimizer in RATES}
    deciding = [Run(name, lr, seed) for seed in DECIDING_SEEDS for name, lr in best.items()]
    return next((run for run in deciding if run not in results), None)


@dataclass(frozen=True)
class Comparison:
    """Held-out accuracies of the deciding seeds, at each optimizer's best rate."""

    adams: list[float]
    adamw: list[float]

    @property
    def differences(self) -> list[float]:
        """AdamS minus AdamW, seed by seed."""
        return [mine - theirs for mine, theirs in zip(self.adams, self.adamw, strict=True)]


def compare(results: Results) -> Comparison | None:
    """Compare the deciding seeds that both optimizers have; None if there is none."""
    if not all(any(run.optimizer == name for run in results) for name in RATES):
        return None
    best = {name: best_rate(results, name) for name in RATES}
    pairs = [
        (results[mine], results[theirs])
        for seed in DECIDING_SEEDS
        if (mine := Run("AdamS", best["AdamS"], seed)) in results
        and (theirs := Run("AdamW", best["AdamW"], seed)) in results
    ]
    return Comparison(*map(list, zip(*pairs, strict=True))) if pairs else None


# --- the files ----------------------------------------------------------------------------------

COLUMNS = (
    "optimizer",
    "lr",
    "seed",
    "held_out_before",  # the share of held-out problems that the taught model solves
    "held_out",  # the share after GRPO
    "reward_last_tenth",  # the mean reward of the last tenth of the steps
    "steps",
    "answers_per_step",
    "num_params",
    "num_held_out",
    "wall_seconds",
    "cpu_seconds",
    "torch",
    "transformers",
    "trl",
)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of runs.csv.

    Raises:
        ValueError: the file has other columns.
    """
    return run_table.read(path, COLUMNS)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a run, whose keys are COLUMNS."""
    run_table.append_row(path, row, COLUMNS)


def results_of(rows: Iterable[dict[str, str]]) -> Results:
    """Return the held-out accuracies of the rows' runs."""
    return {
        Run(row["optimizer"], float(row["lr"]), int(row["seed"])): float(row["held_out"])
        for row in rows
    }


def read_curves(path: Path) -> dict[Run, dict[str, Any]]:
    """Read each run's last line of curves.jsonl."""
    entries = [json.loads(line) for line in run_table.whole_lines(path)]
    return {Run(entry["optimizer"], entry["lr"], entry["seed"]): entry for entry in entries}


def append_curves(path: Path, entry: dict[str, Any]) -> None:
    """Append a line of JSON with a run's optimizer, lr, seed and curves."""
    run_table.whole_lines(path)  # cuts off a line without its end
    run_table.append(path, json.dumps(entry) + "\n")


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write a study's settings, or compare them with those that it was begun with.

    Raises:
        ValueError: they differ.
    """
    text = json.dumps(settings, indent=2) + "\n"
    if not path.exists():
        path.write_text(text)
    elif path.read_text() != text:
        raise ValueError(f"{path}: has other settings than this study; give another --out")
