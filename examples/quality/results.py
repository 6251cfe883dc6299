"""The files that a study writes: quality.csv, one row per run, and curves.jsonl.

A row is on the disk before the next run starts. If the process was killed in the middle of a line,
the reader drops that line. This module does not import torch.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from schedule import Losses, Run

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared import run_table

_KINDS = ("matrices", "embedding", "head", "norms")
COLUMNS = (
    "model",  # a name of lab.PRESETS
    "axis",
    "variant",
    "lr",
    "seed",
    "beta1",
    "beta2",
    "weight_decay",
    "num_params",
    "steps",
    "tokens_per_step",
    "tokens",
    "held_out_loss",  # nats per token after the last step; inf: the run diverged
    "held_out_loss_per_byte",
    "train_loss",  # nats per token, the mean of the last ten steps
    # The RMS of the update before lr and weight decay, at half of the steps and at the last step.
    *(f"rms_half_{kind}" for kind in _KINDS),
    *(f"rms_end_{kind}" for kind in _KINDS),
    # Only for runs of AdamS: what AdamW's RMS would be for the same gradients.
    *(f"adamw_rms_half_{kind}" for kind in _KINDS),
    *(f"adamw_rms_end_{kind}" for kind in _KINDS),
    "seconds",
    "tokens_per_second",
    "compiled",  # "yes", or why not
    "device",
    "torch",
)


PER_BYTE = "held_out_loss_per_byte"


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of quality.csv. An incomplete last line is removed from the file.

    Raises:
        ValueError: the file has other columns.
    """
    return run_table.read(path, COLUMNS)


def rows_of_study(folder: Path, script: str) -> list[dict[str, str]]:
    """Read the rows of a study's folder.

    Args:
        script: what makes them, for the message.
    Raises:
        ValueError: there is none, or the file has other columns.
    """
    rows = read_rows(folder / "quality.csv")
    if not rows:
        raise ValueError(f"{folder}: must hold quality.csv with a run; run {script}")
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a run, whose keys are COLUMNS."""
    run_table.append_row(path, row, COLUMNS)


def append_curves(path: Path, run: Run, curves: dict[str, Any]) -> None:
    """Append a line of JSON that identifies a run and has its curves."""
    run_table.whole_lines(path)  # cuts off what a killed process has left
    place = {"axis": run.axis, "variant": run.variant, "lr": run.lr, "seed": run.seed}
    run_table.append(path, json.dumps(place | curves) + "\n")


def read_curves(path: Path) -> dict[Run, dict[str, Any]]:
    """Read each run's last line in curves.jsonl. An incomplete line is left out."""
    curves = {}
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                entry = json.loads(line)
                run = Run(entry["axis"], entry["variant"], entry["lr"], entry["seed"])
                curves[run] = entry
    return curves


def run_of(row: dict[str, str]) -> Run:
    """Return the run that a row is about."""
    return Run(row["axis"], row["variant"], float(row["lr"]), int(row["seed"]))


def losses_of(rows: list[dict[str, str]], column: str = "held_out_loss") -> Losses:
    """Return the held-out losses, nats per token or those of a column; infinite: it diverged."""
    losses = {run_of(row): float(row[column]) for row in rows}
    return {run: math.inf if math.isnan(loss) else loss for run, loss in losses.items()}
