"""Keep the intents that have enough utterances for a few-shot study.

    select_intents.py --data runs/nlu/labelled --train 20 --validation 20 --out runs/nlu/selected

Inputs: a folder of labelled.py. Outputs: train.jsonl, validation.jsonl and test.jsonl with the
utterances of the other intents left out, and selected.json, which says how many these are."""

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared.command import exit_code_of

SETS = ("train", "validation", "test")


def read(folder: Path) -> dict[str, list[str]]:
    """Return the lines of each set.

    Raises:
        ValueError: a set is missing.
    """
    try:
        return {name: (folder / f"{name}.jsonl").read_text().splitlines() for name in SETS}
    except OSError as exc:
        raise ValueError(
            f"--data {folder}: has no {exc.filename}; make it with labelled.py"
        ) from exc


def select(lines: dict[str, list[str]], at_least: dict[str, int]) -> set[str]:
    """Return the intents that have enough utterances in every set.

    Args:
        lines: of each set.
        at_least: utterances of an intent in a set; the test set must have one.

    Raises:
        ValueError: fewer than two intents have.
    """
    counts = {name: Counter(json.loads(line)["intent"] for line in lines[name]) for name in SETS}
    kept = {
        intent
        for intent in counts["train"]
        if all(counts[name][intent] >= at_least[name] for name in SETS)
    }
    if len(kept) < 2:
        raise ValueError(
            f"{len(kept)} intents have {at_least['train']} utterances for training and "
            f"{at_least['validation']} for validation; ask for fewer"
        )
    return kept


def write(folder: Path, at_least: dict[str, int], out: Path) -> dict[str, Any]:
    """Write the sets without the intents that have too few utterances; return selected.json.

    Raises:
        ValueError: see `read` and `select`.
    """
    lines = read(folder)
    kept = select(lines, at_least)
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    left_out: Counter[str] = Counter()
    for name in SETS:
        of_kept = [line for line in lines[name] if json.loads(line)["intent"] in kept]
        left_out[name] = len(lines[name]) - len(of_kept)
        (unfinished / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in of_kept))
    intents = {json.loads(line)["intent"] for name in SETS for line in lines[name]}
    record = {
        "intents": sorted(kept),
        "dropped": sorted(intents - kept),
        "left_out": dict(left_out),
    }
    (unfinished / "selected.json").write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)
    return record


def main() -> int:
    """Select from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of labelled.py")
    parser.add_argument("--train", type=int, default=20, help="of an intent (%(default)s)")
    parser.add_argument("--validation", type=int, default=20, help="of an intent (%(default)s)")
    parser.add_argument("--out", type=Path, required=True)

    def program() -> None:
        args = parser.parse_args()
        at_least = {"train": args.train, "validation": args.validation, "test": 1}
        record = write(args.data, at_least, args.out)
        print(f"kept {len(record['intents'])} intents; left out: {', '.join(record['dropped'])}")
        print(f"utterances left out: {record['left_out']}")

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
