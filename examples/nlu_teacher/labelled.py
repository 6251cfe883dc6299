"""Read labelled utterances: SNIPS, MASSIVE, Home Assistant's templates, or jsonl of one's own.

    python labelled.py --format snips --source FOLDER --out FOLDER
    python labelled.py --format massive --source en-US.jsonl --out FOLDER
    python labelled.py --format home-assistant --source en --per-intent 400 --out FOLDER
    python labelled.py --format jsonl --source FOLDER --out FOLDER      # of three sets
    python labelled.py --format jsonl --source train.jsonl --out FOLDER # the sets are split off

Inputs: the corpus, as its authors give it. Outputs, in --out: train.jsonl, validation.jsonl,
test.jsonl (one utterance a line, see below) and split.json (what was counted and left out). No
utterance of the test or validation set is in the training set, neither as it is written nor in its
spoken form: those are taken out of the training set, and counted.

A line of jsonl is an utterance. `start` and `end` count characters of the text, `end` is exclusive,
and `value` may be left out:

    {"text": "play Thriller", "intent": "PlayMusic",
     "slots": [{"name": "album", "start": 5, "end": 13, "value": "Thriller"}]}
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")


class Malformed(ValueError):
    """Something in a file of the user cannot be read."""

    def __init__(self, place: str, what: str, rule: str, remedy: str) -> None:
        super().__init__(f"{place}: {what}: {rule}; {remedy}")


@dataclass(frozen=True)
class Slot:
    """A slot's name and its characters in the text; `end` is exclusive."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Utterance:
    """A labelled utterance.

    Attributes:
        slots: in the order of the text; they do not overlap.
        place: `file:line`, for messages.
    """

    text: str
    intent: str
    slots: tuple[Slot, ...]
    place: str = ""


def check(utterance: Utterance) -> Utterance:
    """Return an utterance whose slots are sorted and lie apart, inside its text.

    Raises:
        Malformed: the text or the intent is empty, or a slot is impossible.
    """

    def refuse(what: str, rule: str, remedy: str = "correct the line") -> Malformed:
        return Malformed(utterance.place, what, rule, remedy)

    if not utterance.text.strip():
        raise refuse(f"text={utterance.text!r}", "must have a word")
    if not utterance.intent:
        raise refuse("intent=''", "must have a name")
    slots = sorted(utterance.slots, key=lambda slot: slot.start)
    last_end = 0
    for slot in slots:
        what = f"slot {slot.name!r} from {slot.start} to {slot.end}"
        if not slot.name or re.search(r"\s", slot.name):
            raise refuse(what, "its name must be a word without spaces")
        if not 0 <= slot.start < slot.end <= len(utterance.text):
            raise refuse(what, f"must lie within the text's {len(utterance.text)} characters")
        if slot.start < last_end:
            raise refuse(what, f"must not overlap the slot before it, which ends at {last_end}")
        if not utterance.text[slot.start : slot.end].strip():
            raise refuse(what, "must have more than spaces")
        last_end = slot.end
    return Utterance(utterance.text, utterance.intent, tuple(slots), utterance.place)


def from_chunks(chunks: Iterable[tuple[str, str | None]], intent: str, place: str) -> Utterance:
    """Make an utterance of pieces of text, each with its slot's name or None."""
    text, slots = "", []
    for piece, name in chunks:
        if name is not None:
            lead = len(piece) - len(piece.lstrip())
            slots.append(Slot(name, len(text) + lead, len(text) + len(piece.rstrip())))
        text += piece
    return check(Utterance(text, intent, tuple(slots), place))


# --- the formats --------------------------------------------------------------------------------


def _decode(path: Path) -> str:
    """Read a text file; SNIPS has one in latin-1 among those in UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _json_elements(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Yield the elements of SNIPS's `{intent: [...]}`: the intent, the line, the element."""
    text = _decode(path)
    begin = re.match(r'\s*\{\s*"([^"]+)"\s*:\s*\[', text)
    rule = 'must be {"<intent>": [{"data": [...]}, ...]}'
    if begin is None:
        raise Malformed(f"{path}:1", repr(text[:20]), rule, "give SNIPS's files as they are")
    decoder, position = json.JSONDecoder(), begin.end()
    while (match := re.compile(r"[\s,]*").match(text, position)) is not None:
        position = match.end()
        if text[position : position + 1] == "]":
            return
        line = text.count("\n", 0, position) + 1
        try:
            element, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as exc:
            place = f"{path}:{exc.lineno}"
            raise Malformed(place, exc.msg, rule, "download the file again") from exc
        yield begin[1], line, element


def read_snips(path: Path) -> list[Utterance]:
    """Read a file of SNIPS: `train_<Intent>_full.json` or `validate_<Intent>.json`.

    Raises:
        Malformed: it is not in SNIPS's format.
    """
    utterances = []
    for intent, line, element in _json_elements(path):
        place = f"{path}:{line}"
        try:
            chunks = [(chunk["text"], chunk.get("entity")) for chunk in element["data"]]
            whole = "".join(text for text, _ in chunks)
        except (AttributeError, KeyError, TypeError) as exc:
            rule = 'must be {"data": [{"text": ..., "entity": ...}]}'
            raise Malformed(place, str(element)[:60], rule, "correct the element") from exc
        if whole.strip():
            utterances.append(from_chunks(chunks, intent, place))
    return utterances


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a jsonl file with their places."""
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        place = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as exc:
            raise Malformed(place, exc.msg, "must be a JSON object", "correct the line") from exc
        if not isinstance(entry, dict):
            raise Malformed(place, line[:40], "must be a JSON object", "correct the line")
        yield place, entry


def _field(entry: dict[str, Any], name: str, kind: type, place: str) -> Any:
    value = entry.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        rule = f"must be of JSON's type for {kind.__name__}"
        raise Malformed(place, f"{name}={value!r}", rule, "see the module's first lines")
    return value


def read_jsonl(path: Path) -> list[Utterance]:
    """Read the format of this module's first lines.

    Raises:
        Malformed: a line is not in this format.
    """
    utterances = []
    for place, entry in _lines(path):
        text = _field(entry, "text", str, place)
        slots = []
        for slot in _field(entry, "slots", list, place):
            if not isinstance(slot, dict):
                raise Malformed(place, f"slot {slot!r}", "must be an object", "correct the line")
            name, start, end = (
                _field(slot, key, kind, place)
                for key, kind in (("name", str), ("start", int), ("end", int))
            )
            slots.append(Slot(name, start, end))
            if "value" in slot and slot["value"] != text[start:end]:
                rule = f"the text has {text[start:end]!r} from {start} to {end}"
                raise Malformed(place, f"value={slot['value']!r}", rule, "correct either")
        intent = _field(entry, "intent", str, place)
        utterances.append(check(Utterance(text, intent, tuple(slots), place)))
    return utterances


def write_jsonl(path: Path, utterances: Iterable[Utterance]) -> None:
    """Write utterances in the format of this module's first lines."""
    with path.open("w", encoding="utf-8") as file:
        for each in utterances:
            slots = [
                {
                    "name": slot.name,
                    "start": slot.start,
                    "end": slot.end,
                    "value": each.text[slot.start : slot.end],
                }
                for slot in each.slots
            ]
            entry = {"text": each.text, "intent": each.intent, "slots": slots}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def parse_brackets(annotated: str, intent: str, place: str) -> Utterance:
    """Read MASSIVE's annotation, such as `wake me at [time : five am]`.

    Raises:
        Malformed: a bracket is open, nested, or has no ` : `.
    """
    chunks: list[tuple[str, str | None]] = []
    for piece in re.split(r"(\[[^\[\]]*\])", annotated):
        if piece.startswith("[") and piece.endswith("]"):
            name, colon, value = piece[1:-1].partition(" : ")
            if not colon:
                raise Malformed(place, piece, "must be [slot : words]", "correct the line")
            chunks.append((value, name.strip()))
        elif "[" in piece or "]" in piece:
            raise Malformed(place, piece, "must have pairs of brackets", "correct the line")
        elif piece:
            chunks.append((piece, None))
    return from_chunks(chunks, intent, place)


def read_massive(path: Path) -> dict[str, list[Utterance]]:
    """Read a language's file of MASSIVE (Amazon, CC BY 4.0): its three partitions.

    Raises:
        Malformed: a line lacks a field, or has another partition.
    """
    names = {"train": "train", "dev": "validation", "test": "test"}
    splits: dict[str, list[Utterance]] = {name: [] for name in SPLITS}
    for place, entry in _lines(path):
        partition = _field(entry, "partition", str, place)
        if partition not in names:
            rule = f"must be one of {', '.join(names)}"
            raise Malformed(place, f"partition={partition!r}", rule, "correct the line")
        intent, text = (_field(entry, key, str, place) for key in ("intent", "annot_utt"))
        splits[names[partition]].append(parse_brackets(text, intent, place))
    return splits


# --- the split ----------------------------------------------------------------------------------


def held_out(
    utterances: Sequence[Utterance], per_intent: int, seed: int
) -> tuple[list[Utterance], list[Utterance]]:
    """Split off up to `per_intent` utterances of each intent: the rest, and those.

    At most a fifth of an intent's utterances is split off.
    """
    order = list(range(len(utterances)))
    random.Random(seed).shuffle(order)
    available = Counter(each.intent for each in utterances)
    taken: Counter[str] = Counter()
    chosen = set()
    for index in order:
        intent = utterances[index].intent
        if taken[intent] < min(per_intent, available[intent] // 5):
            taken[intent] += 1
            chosen.add(index)
    rest = [each for index, each in enumerate(utterances) if index not in chosen]
    return rest, [utterances[index] for index in sorted(chosen)]


def make_disjoint(
    splits: dict[str, list[Utterance]],
) -> tuple[dict[str, list[Utterance]], dict[str, int]]:
    """Keep each spoken form once: in the test set, else in validation, else in training.

    Returns:
        The three sets, and for each how many utterances were left out of it.
    """
    from labels import spoken_words

    seen: set[tuple[str, ...]] = set()
    kept: dict[str, list[Utterance]] = {}
    left_out = {}
    for name in reversed(SPLITS):
        kept[name] = []
        for each in splits[name]:
            form = tuple(spoken_words(each.text))
            if form and form not in seen:
                seen.add(form)
                kept[name].append(each)
        left_out[name] = len(splits[name]) - len(kept[name])
    return kept, left_out


def read_corpus(args: argparse.Namespace) -> dict[str, list[Utterance]]:
    """Read what --format and --source name into the three sets.

    Raises:
        ValueError: files are missing or malformed.
    """
    source = Path(args.source)
    if args.format == "massive":
        return read_massive(_existing(source))
    if args.format == "jsonl" and source.is_file():
        train, test = held_out(read_jsonl(source), args.validation_per_intent, args.seed + 1)
    elif args.format == "jsonl":
        return {name: read_jsonl(_existing(source / f"{name}.jsonl")) for name in SPLITS}
    elif args.format == "snips":
        files = {kind: sorted(source.glob(f"*/{kind}_*.json")) for kind in ("train", "validate")}
        # Beside train_<Intent>_full.json, some copies have a shorter train_<Intent>.json.
        files["train"] = [path for path in files["train"] if path.stem.endswith("_full")]
        if not all(files.values()):
            what = "no <Intent>/train_<Intent>_full.json or no <Intent>/validate_<Intent>.json"
            raise ValueError(f"{source}: {what}: both must be there; give the folder of SNIPS")
        train, test = (
            [each for path in files[kind] for each in read_snips(path)]
            for kind in ("train", "validate")
        )
    else:
        from templates import read_home_assistant

        whole = read_home_assistant(args.source, args.per_intent, args.seed)
        train, test = held_out(whole, args.per_intent // 5, args.seed + 1)
    train, validation = held_out(train, args.validation_per_intent, args.seed)
    return {"train": train, "validation": validation, "test": test}


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path}: no such file: it must be there; see labelled.py --help")
    return path


def write_splits(splits: dict[str, list[Utterance]], out: Path) -> dict[str, Any]:
    """Make the sets disjoint, write them, and return what split.json says.

    Raises:
        ValueError: no utterance is left in a set.
    """
    kept, left_out = make_disjoint(splits)
    if empty := [name for name in SPLITS if not kept[name]]:
        what = f"no utterance is left in {', '.join(empty)}: each set must have some"
        raise ValueError(f"{what}, apart from those of the test set; give more utterances")
    out.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        write_jsonl(out / f"{name}.jsonl", kept[name])
    summary = {
        name: {
            "utterances": len(kept[name]),
            "left_out_as_repeated": left_out[name],
            "intents": len({each.intent for each in kept[name]}),
            "slot_names": len({slot.name for each in kept[name] for slot in each.slots}),
        }
        for name in SPLITS
    }
    (out / "split.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line. Returns 2 if the user has to change something."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    formats = ("snips", "massive", "home-assistant", "jsonl")
    parser.add_argument("--format", required=True, choices=formats)
    parser.add_argument(
        "--source", required=True, help="a file or folder; of home-assistant, the language"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the splits (%(default)s)")
    parser.add_argument(
        "--validation-per-intent",
        type=int,
        default=100,
        help="how many are taken from the training set of a corpus without one (%(default)s)",
    )
    parser.add_argument(
        "--per-intent", type=int, default=400, help="draws from the templates (%(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        summary = write_splits(read_corpus(args), args.out)
    except ValueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    for name, counts in summary.items():
        print(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
