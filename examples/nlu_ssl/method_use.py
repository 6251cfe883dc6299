"""What a user has of a study: which method its guidelines say, and a card for a trained model."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from method_rows import METHODS, METRICS_OF, TAUGHT

AUTO = "auto"
_FIELDS = {"task": str, "optimizer": str, "shots": int, "why": str}


def read_guidelines(path: Path) -> list[dict[str, Any]]:
    """Read the guidelines.json of method_report.py.

    Raises:
        ValueError: it is another file.
    """
    try:
        entries = json.loads(path.read_text())
        for entry in entries:
            for name, kind in _FIELDS.items():
                if not isinstance(entry[name], kind):
                    raise ValueError(f"{name}={entry[name]!r}")
            if entry["method"] not in (None, *METHODS):
                raise ValueError(f"method={entry['method']!r}")
    except (OSError, ValueError, KeyError, TypeError) as exc:
        what = "must be a guidelines.json that method_report.py wrote"
        raise ValueError(f"{path}: {what} ({type(exc).__name__}: {exc})") from exc
    return list(entries)


def choose(
    guidelines: Sequence[dict[str, Any]],
    task: str,
    optimizer: str,
    shots: int,
    per_intent: float = 1.0,
) -> dict[str, Any]:
    """Return the guideline to follow; its "why" says which one that is, too.

    It is of the same task and optimizer. Among several it is the one whose number of shots has the
    least ratio to the asked one. All utterances (0) go by a guideline of all, and where there is
    none, by their number.

    Args:
        per_intent: labelled utterances of an intent, if shots is 0.
    Raises:
        ValueError: there is none.
    """
    fitting = [
        entry
        for entry in guidelines
        if (entry["task"], entry["optimizer"]) == (task, optimizer) and entry["method"] is not None
    ]
    is_of_all = not shots and any(not entry["shots"] for entry in fitting)
    fitting = [entry for entry in fitting if (not entry["shots"]) == is_of_all]
    if not fitting:
        known = ", ".join(
            f"{entry['task']} with {entry['optimizer']} and {entry['shots'] or 'all'} shots"
            for entry in guidelines
            if entry["method"] is not None
        )
        what = f"no guideline for {task} with {optimizer} and {shots or 'all'} shots"
        remedy = "name a --method, or run a study of this"
        raise ValueError(f"{what}: must be among those of the study: {known or 'none'}; {remedy}")
    # Each is over 0, or all are 0.
    asked = 1.0 if is_of_all else shots or per_intent
    nearest = min(fitting, key=lambda entry: abs(math.log((entry["shots"] or 1) / asked)))
    pool = f" on {nearest['selection']} {nearest['pool_size'] or 'all'}"
    pool = pool if nearest["selection"] else ""
    where = f"with {nearest['shots'] or 'all'} shots, {nearest['method']}{pool} was recommended"
    return nearest | {"why": f"{where}: {nearest['why']}"}


def model_card(
    row: dict[str, Any],
    *,
    why: str,
    labels: tuple[int, int],
    digests: dict[str, str],
    settings: dict[str, Any],
    num_test: int,
) -> str:
    """Return the README.md of a trained model.

    Args:
        row: of rows.csv.
        why: the method was taken.
        labels: how many intents and tags it knows.
        digests: of the files that it was made of, by name.
        settings: of all runs of the study.
        num_test: utterances that it was evaluated on.
    """
    shots = row["shots"] or "all"
    lines = [f"# {row['model']}, {row['method']}, for {row['task']}", ""]
    lines.append(f"It knows {labels[0]} intents and {labels[1]} tags, and has")
    lines[-1] += f" {row['num_params']:,} parameters."
    lines.append(f"It was trained by `train_ssl.py` with {row['optimizer']} at {row['lr']:g},")
    lines[-1] += f" on {row['num_train']} labelled utterances ({shots} an intent;"
    lines[-1] += f" subset {row['subset']}, seed {row['seed']})."
    if row["selection"]:
        size = f"{row['num_pool']} unlabelled utterances of the pool {row['selection']}"
        teacher = ", labelled by a teacher" if row["method"] in TAUGHT else ""
        lines.append(f"It also learned from {size}{teacher}.")
    lines += ["", f"Why {row['method']}: {why}.", "", "## Evaluation", ""]
    lines.append(f"On {num_test} test utterances, after {row['best_step']} steps:")
    lines += ["", "| metric | value |", "| --- | ---: |"]
    lines += [f"| {name.replace('_', ' ')} | {row[name]} |" for name in METRICS_OF[row["task"]]]
    lines.append("")
    lines.append("One run says little: see the study's report for intervals. The model answers any")
    lines.append("text with one of its intents; it was not taught to refuse one of another domain.")
    lines += ["", "## Files it was made of", "", "| file | hash |", "| --- | --- |"]
    lines += [f"| {name} | `{value}` |" for name, value in sorted(digests.items())]
    lines += ["", "## Settings", "", "```json", json.dumps(settings, indent=2), "```"]
    return "\n".join(lines) + "\n"
