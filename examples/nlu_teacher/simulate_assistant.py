"""Measure how often a whole assistant does something else than what was asked for.

    python simulate_assistant.py make --data runs/nlu/snips --out runs/nlu/assistant
    python finetune_nlu.py ... --also requests=runs/nlu/assistant/requests.jsonl --out STUDY
    python simulate_assistant.py run --assistant runs/nlu/assistant --study STUDY

`make` reads labelled sets (labelled.py), and writes a catalogue of the things that the utterances
ask for (catalogue.sqlite) and the users' requests (requests.jsonl). A dialogue has three requests
of the test set. Behind each request stands what the user says if it is not satisfied: the wording
of an utterance of the validation set that has the same intent and the same slots, with the values
of the request. Where no such utterance exists, the user does not try again.

`run` takes the answers of each fine-tuned model to the requests, does the action that they stand
for, and the action that the labels stand for. A request is unsatisfied if these are not the same
one at the first try. It is abandoned if they are not the same at the second try either, or there is
none. Outputs, in STUDY: dissatisfaction.csv, a row a run, and dissatisfaction/RUN.npy, the counts
of each dialogue: unsatisfied, abandoned, requests.

What this stands in for: the paper measures user dissatisfaction automatically on live traffic. Here
are no users, no speech recognition, and no ranking of several assistants' answers; the requests are
independent, a user tries again at most once, and the catalogue has exactly what is asked for. It
tells which errors of a model change what is done, and no more.
"""

import argparse
import csv
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from assistant import Assistant
from finetune_rows import read_answers, read_rows, run_of
from labelled import Slot, Utterance, read_jsonl, write_jsonl
from labels import Tagged, load_tagged
from metrics import Counts

REQUESTS_PER_DIALOGUE = 3
COUNTS = ("unsatisfied", "abandoned", "requests")
COLUMNS = ("run", "unsatisfied_rate", "abandoned_rate", "requests")
SET = "requests"


def unsatisfied_rate(sums: Counts) -> Any:
    """Return the share of unsatisfied requests; (..., 3) gives (...)."""
    return sums[..., 0] / sums[..., 2]


def abandoned_rate(sums: Counts) -> Any:
    """Return the share of abandoned requests; (..., 3) gives (...)."""
    return sums[..., 1] / sums[..., 2]


# --- make ---------------------------------------------------------------------------------------


def _names(utterance: Utterance) -> tuple[str, ...]:
    return tuple(sorted(slot.name for slot in utterance.slots))


def rephrase(request: Utterance, wording: Utterance) -> Utterance:
    """Return the wording with the request's values; both have the same names of slots."""
    values = defaultdict(list)
    for slot in request.slots:
        values[slot.name].append(request.text[slot.start : slot.end])
    text, slots, end = "", [], 0
    for slot in wording.slots:
        text += wording.text[end : slot.start]
        value = values[slot.name].pop(0)
        slots.append(Slot(slot.name, len(text), len(text) + len(value)))
        text += value
        end = slot.end
    return Utterance(text + wording.text[end:], request.intent, tuple(slots), request.place)


def requests_of(
    test: Sequence[Utterance], wordings: Sequence[Utterance], seed: int
) -> list[tuple[Utterance, Utterance | None]]:
    """Return the requests, in the order of the dialogues, each with its second try or None."""
    rng = random.Random(seed)
    by_slots: dict[tuple[str, tuple[str, ...]], list[Utterance]] = defaultdict(list)
    for each in wordings:
        by_slots[each.intent, _names(each)].append(each)
    order = list(test)
    rng.shuffle(order)
    pairs: list[tuple[Utterance, Utterance | None]] = []
    for each in order:
        candidates = by_slots[each.intent, _names(each)]
        pairs.append((each, rephrase(each, rng.choice(candidates)) if candidates else None))
    return pairs


def make(data: Path, out: Path, seed: int) -> dict[str, int]:
    """Write the catalogue and the requests, and return what was counted.

    Raises:
        ValueError: a set is missing or malformed.
    """
    out.mkdir(parents=True, exist_ok=True)
    sets = {name: data / f"{name}.jsonl" for name in ("train", "validation", "test")}
    for path in sets.values():
        if not path.is_file():
            raise ValueError(f"{path}: no such file: write it with labelled.py")
    utterances = [each for path in sets.values() for each in load_tagged(path)]
    pairs = requests_of(read_jsonl(sets["test"]), read_jsonl(sets["validation"]), seed)
    write_jsonl(out / "requests.jsonl", [each for pair in pairs for each in pair if each])
    turns = [2 if second else 1 for _, second in pairs]
    (out / "turns.json").write_text(json.dumps(turns) + "\n")
    assistant = Assistant.create(out / "catalogue.sqlite", utterances)
    things = assistant.database.execute("SELECT COUNT(*) FROM things").fetchone()[0]
    return {
        "requests": len(pairs),
        "with a second try": sum(turn == 2 for turn in turns),
        "things in the catalogue": things,
    }


# --- run ----------------------------------------------------------------------------------------


def is_satisfied(assistant: Assistant, labelled: Tagged, answer: Tagged) -> bool:
    """Whether the answer leads to the action that the labels lead to."""
    return assistant.do(labelled) == assistant.do(answer)


def replay(
    assistant: Assistant,
    turns: Sequence[int],
    labelled: Sequence[Tagged],
    answers: Sequence[Tagged],
) -> Counts:
    """Return the counts of each dialogue, (dialogues, COUNTS).

    Args:
        turns: how many tries each request has; the utterances follow each other.
    """
    rows, place = [], 0
    for count in turns:
        tries = [
            is_satisfied(assistant, labelled[index], answers[index])
            for index in range(place, place + count)
        ]
        rows.append((not tries[0], not any(tries), 1))
        place += count
    assert place == len(labelled), (place, len(labelled))
    begins = range(0, len(rows), REQUESTS_PER_DIALOGUE)
    sums = [np.sum(rows[i : i + REQUESTS_PER_DIALOGUE], axis=0) for i in begins]
    return np.array(sums, dtype=np.float64)


def replay_study(folder: Path, study: Path) -> list[dict[str, Any]]:
    """Write dissatisfaction.csv and dissatisfaction/ of a study, and return the rows.

    Raises:
        ValueError: the requests are missing, or a run has not answered them.
    """
    for path in (folder / "requests.jsonl", folder / "turns.json", folder / "catalogue.sqlite"):
        if not path.is_file():
            raise ValueError(f"{path}: no such file: write it with simulate_assistant.py make")
    labelled = load_tagged(folder / "requests.jsonl")
    turns = json.loads((folder / "turns.json").read_text())
    assistant = Assistant(folder / "catalogue.sqlite")
    rows = []
    (study / "dissatisfaction").mkdir(exist_ok=True)
    for run in map(run_of, read_rows(study / "rows.csv")):
        path = study / "predictions" / run.name / f"{SET}.jsonl"
        if not path.parent.exists():  # the run diverged
            continue
        if not path.is_file():
            what = f"must be there; give finetune_nlu.py --also {SET}={folder / 'requests.jsonl'}"
            raise ValueError(f"{path}: {what}")
        counts = replay(assistant, turns, labelled, read_answers(path, labelled))
        assistant.database.rollback()
        np.save(study / "dissatisfaction" / f"{run.name}.npy", counts)
        sums = counts.sum(0)
        rates = (round(float(rate(sums)), 5) for rate in (unsatisfied_rate, abandoned_rate))
        rows.append(dict(zip(COLUMNS, (run.name, *rates, int(sums[2])), strict=True)))
    write_csv(study / "dissatisfaction.csv", rows)
    return rows


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a row a run."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line. Returns 2 if the user has to change something."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write the catalogue and the requests")
    making.add_argument("--data", type=Path, required=True, help="the folder of the labelled sets")
    making.add_argument("--out", type=Path, required=True)
    making.add_argument("--seed", type=int, default=0, help="of the dialogues (%(default)s)")
    running = commands.add_parser("run", help="replay the requests with each model's answers")
    running.add_argument("--assistant", type=Path, required=True, help="what `make` wrote")
    running.add_argument("--study", type=Path, required=True, help="finetune_nlu.py's --out")
    args = parser.parse_args(argv)
    try:
        if args.command == "make":
            for what, number in make(args.data, args.out, args.seed).items():
                print(f"{number:,} {what}")
        else:
            for row in replay_study(args.assistant, args.study):
                print(*(f"{name} {value}" for name, value in row.items()))
    except ValueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
