"""examples/nlu_ssl: METHODS.md says what the packed studies in results/study give."""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

for package in ("num2words", "tokenizers", "safetensors", "matplotlib", "datasets"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'megatron-adams[nlu]'")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nlu_ssl"
for example in (EXAMPLE, EXAMPLE.parent / "nlu_teacher"):
    sys.path.append(str(example))

import method_report  # noqa: E402  (the example's files import each other by name)
from labels import Tagged  # noqa: E402
from method_report import BASELINE, ERROR_OF, Candidate, Results  # noqa: E402
from method_rows import METHODS  # noqa: E402
from metrics import COLUMNS  # noqa: E402

STUDIES = EXAMPLE / "results" / "study"
NAMES = dict(zip(METHODS, ("supervised", "PL", "KD", "VAT", "CVT"), strict=True))
OF_OPTIMIZERS = ("ic-random", "ner", "adamw", "cautious")
TASKS = {"ic": "intents", "ner": "slots"}


def utterances_of(study: str) -> list[Tagged]:
    """Return utterances with as many slots as those of a packed study, whose words are not kept."""
    with np.load(STUDIES / study / method_report.PACKED) as packed:
        num_slots = packed["counts"][0, :, COLUMNS.index("slots_labelled")].tolist()
    return [Tagged(("w",) * (num or 1), ("B-s",) * num or ("O",), "", "") for num in num_slots]


@cache
def results_of(*studies: str) -> Results:
    return Results([STUDIES / study for study in studies], utterances_of(studies[0]))


def name_of(candidate: Candidate) -> str:
    method, selection, size = candidate
    return NAMES[method] + (f", {selection} {size:,}" if selection else "")


def method_rows(results: Results, task: str, optimizer: str = "adams") -> list[str]:
    """Return the rows of a table of a task: each method's error, with all numbers of shots."""
    keys = [key for key in results.groups() if key[:2] == (task, optimizer)]
    rows = []
    for candidate in results.candidates(keys[0]):
        cells = [name_of(candidate)]
        for key in keys:
            runs, error = results.of(key, candidate[0], candidate[1:]), ERROR_OF[task]
            against = results.compare(results.paired(key, candidate, BASELINE), error)
            cells += [str(results.estimate(runs, error)), str(against)]
            if candidate == BASELINE:
                cells[-1] = ""
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def optimizer_rows(results: Results) -> list[str]:
    """Return the rows of the table that compares optimizers, each at its own best rate."""
    compared = method_report.optimizers(results)
    points = {(each.optimizer, each.task, each.shots, each.candidate): each for each in compared}
    rows = []
    for _, task, shots, candidate in (key for key in points if key[0] == "adams"):
        cells = [f"{TASKS[task]}, {shots} shots: {name_of(candidate)}"]
        for optimizer in ("adams", "adams-cautious", "adamw"):
            runs = results.of((task, optimizer, shots), candidate[0], candidate[1:])
            error = results.estimate(runs, ERROR_OF[task]).value if runs else None
            cells.append("" if error is None else f"{error:.3f}")
        for optimizer in ("adams", "adams-cautious"):
            found = points.get((optimizer, task, shots, candidate))
            cells.append(str(found.comparison).replace("%", "") if found else "")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def rows_of_methods_md() -> set[str]:
    return set((EXAMPLE / "METHODS.md").read_text().splitlines())


def test_the_table_of_slots_is_that_of_the_study() -> None:
    rows = method_rows(results_of("ner"), "ner")
    assert len(rows) == 25 and not set(rows) - rows_of_methods_md()


@pytest.mark.full
def test_the_guidelines_are_those_of_the_studies() -> None:
    found = method_report.guidelines(results_of(*OF_OPTIMIZERS))
    known = json.loads((EXAMPLE / "results" / "guidelines.json").read_text())

    def is_of_them(guideline: dict[str, str]) -> bool:
        # Those of intents with AdamS are of all three selections, whose counts are not kept.
        return (guideline["task"], guideline["optimizer"]) != ("ic", "adams")

    assert list(filter(is_of_them, found)) == list(filter(is_of_them, known))


def test_the_table_of_optimizers_is_that_of_the_studies() -> None:
    rows = optimizer_rows(results_of(*OF_OPTIMIZERS))
    assert len(rows) >= 10 and not set(rows) - rows_of_methods_md()


@pytest.mark.full
def test_the_table_of_the_encoder_is_that_of_its_study() -> None:
    results = results_of("encoder")
    rows = [row for task in TASKS for row in method_rows(results, task, "adams-cautious")]
    assert len(rows) >= 5 + 1 and not set(rows) - rows_of_methods_md()
