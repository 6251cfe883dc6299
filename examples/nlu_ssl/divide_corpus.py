"""Divide a labelled corpus into few labels and a pool, and mix text of another domain into it.

    divide_corpus.py --data runs/ssl/corpus --per-intent 30 --text runs/ssl/wikipedia.jsonl \\
        --other-share 0.4 --out runs/ssl/divided

Inputs: a folder of labelled.py, and public text, whose short sentences are the other domain.
Outputs, in --out: labelled/, with a training set of --per-intent utterances of each intent, in
which each slot of the corpus is, and the other sets as they are; pool.jsonl, the other utterances
of the training set without their labels, with sentences among them in a random order;
mixed_in.jsonl, which sentences these are; other_domains.jsonl, further sentences, for the domain
filter to learn from; and divided.json, with the numbers of all."""

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

from labelled import SPLITS, Utterance, read_jsonl, write_jsonl
from pool import Repetitions, read_documents, split_sentences
from shared.command import exit_code_of

# As long as utterances are, so that the domain filter cannot go by the length.
_LEAST_WORDS, _MOST_WORDS = 4, 16


@dataclass(frozen=True)
class Settings:
    """What is asked for; see --help."""

    per_intent: int
    other_share: float
    other_for_filter: int
    pool_size: int = 0
    seed: int = 0

    def check(self) -> None:
        """Refuse values that give no pool.

        Raises:
            ValueError: one is out of range.
        """
        for name, least in (("per_intent", 1), ("other_for_filter", 5), ("pool_size", 0)):
            if getattr(self, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} {getattr(self, name)}: must be {least} or more")
        if not 0 <= self.other_share < 1:
            raise ValueError(f"--other-share {self.other_share}: must be from 0 to below 1")


def few_of(
    utterances: Sequence[Utterance], per_intent: int, rng: random.Random
) -> tuple[list[Utterance], list[Utterance]]:
    """Draw utterances of each intent, and return them and the others.

    The first ones are drawn for a slot that none has yet, as no model can answer a slot that it was
    not taught; the others at random.

    Raises:
        ValueError: an intent has too few, or more slots than can be covered.
    """
    by_intent: dict[str, list[int]] = defaultdict(list)
    for index in rng.sample(range(len(utterances)), len(utterances)):
        by_intent[utterances[index].intent].append(index)
    chosen: set[int] = set()
    covered: set[str] = set()
    for intent, indices in sorted(by_intent.items()):
        if len(indices) < per_intent:
            what = f"--per-intent {per_intent}: intent {intent!r} has only {len(indices)}"
            raise ValueError(f"{what}; ask for fewer, or leave the intent out (select_intents.py)")
        mine: list[int] = []
        for index in indices:
            names = {slot.name for slot in utterances[index].slots}
            if len(mine) < per_intent and names - covered:
                mine.append(index)
                covered |= names
        rest = [index for index in indices if index not in mine]
        chosen |= {*mine, *rest[: per_intent - len(mine)]}
    names = {slot.name for each in utterances for slot in each.slots}
    if missing := sorted(names - covered):
        what = f"--per-intent {per_intent}: no utterance for the slots {', '.join(missing)} is left"
        raise ValueError(f"{what}; ask for more")
    few = [each for index, each in enumerate(utterances) if index in chosen]
    return few, [each for index, each in enumerate(utterances) if index not in chosen]


def sentences_of(path: Path) -> list[str]:
    """Return a text's sentences that are as long as utterances, each once."""
    new = Repetitions()
    return [
        line.text
        for document in read_documents(path)
        for line in new.without(split_sentences(document))
        if _LEAST_WORDS <= len(line.text.split()) <= _MOST_WORDS
    ]


def _write_texts(path: Path, texts: Iterable[str]) -> None:
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def divide(data: Path, text: Path, settings: Settings, out: Path) -> dict[str, Any]:
    """Divide a corpus, write what the module's first lines say, and return divided.json.

    Raises:
        ValueError: a set is missing, or there are too few utterances or sentences.
    """
    settings.check()
    rng = random.Random(settings.seed)
    sets = {}
    for name in SPLITS:
        path = data / f"{name}.jsonl"
        if not path.is_file():
            raise ValueError(f"{path}: no such file: must be there; write it with labelled.py")
        sets[name] = read_jsonl(path)
    sets["train"], rest = few_of(sets["train"], settings.per_intent, rng)
    rng.shuffle(rest)
    if len(rest) < max(1, settings.pool_size):
        what = f"--pool-size {settings.pool_size}: {len(rest)} utterances have no labels to keep"
        raise ValueError(f"{what}; ask for fewer, or for fewer --per-intent")
    unlabelled = [each.text for each in rest[: settings.pool_size or None]]
    share = settings.other_share
    num_mixed = round(len(unlabelled) * share / (1 - share))
    sentences = sentences_of(text)
    rng.shuffle(sentences)
    if len(sentences) < num_mixed + settings.other_for_filter:
        what = f"{text}: has {len(sentences):,} short sentences"
        rule = f"must have {num_mixed:,} to mix in and {settings.other_for_filter:,} for the filter"
        raise ValueError(f"{what}: {rule}; give more text, or a lower --other-share or --pool-size")
    mixed = sentences[:num_mixed]
    pool = [*unlabelled, *mixed]
    rng.shuffle(pool)
    (out / "labelled").mkdir(parents=True, exist_ok=True)
    for name, utterances in sets.items():
        write_jsonl(out / "labelled" / f"{name}.jsonl", utterances)
    _write_texts(out / "pool.jsonl", pool)
    _write_texts(out / "mixed_in.jsonl", mixed)
    _write_texts(out / "other_domains.jsonl", sentences[num_mixed:][: settings.other_for_filter])
    record = {
        **{name: len(utterances) for name, utterances in sets.items()},
        "pool": len(pool),
        "mixed_in": num_mixed,
        "other_domains": settings.other_for_filter,
    }
    (out / "divided.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def main() -> int:
    """Divide a corpus from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a folder of labelled.py")
    add("--text", type=Path, required=True, help="of another domain: JSON lines or plain text")
    add("--per-intent", type=int, required=True, help="utterances that keep their labels")
    add("--other-share", type=float, default=0.4, help="of the pool (%(default)s)")
    add("--other-for-filter", type=int, default=300, help="further sentences (%(default)s)")
    add("--pool-size", type=int, default=0, help="utterances of the corpus; 0: all (%(default)s)")
    add("--seed", type=int, default=0, help="of all draws (%(default)s)")
    add("--out", type=Path, required=True)

    def program() -> None:
        args = vars(parser.parse_args())
        data, text, out = (args.pop(name) for name in ("data", "text", "out"))
        record = divide(data, text, Settings(**args), out)
        print(", ".join(f"{number:,} {name}" for name, number in record.items()))

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
