"""BIO labels on spoken words, aligned to sub-words, and back again.

Words are those of the spoken form of the whole text, so that they do not depend on where the labels
are: an assistant has the words alone. A written word belongs to the slot that its first character
in any slot is in. A slot that ends inside a word is therefore moved to the word's end, and one
whose words are not spoken is lost; `Alignment` counts both.

The first sub-word of a word carries its label; the others have IGNORED, which no loss reads.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from labelled import Malformed, Utterance, read_jsonl
from spoken import spoken_form

OUTSIDE = "O"
IGNORED = -100  # what torch's cross-entropy leaves out by default

Span = tuple[str, int, int]  # a slot's name, its first word, and the word after its last


@dataclass(frozen=True)
class Tagged:
    """An utterance as a model reads and answers it: a BIO tag for each spoken word."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    intent: str
    place: str = ""

    @property
    def spans(self) -> tuple[Span, ...]:
        """The slots."""
        return spans_of(self.tags)


@dataclass
class Alignment:
    """What the step from characters to words did not keep."""

    moved: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    repeated: int = 0
    num_slots: int = 0

    def __str__(self) -> str:
        moved = f"{len(self.moved):,} of {self.num_slots:,} slots begin or end inside a word and"
        return f"{moved} are moved to its end; {len(self.lost):,} have no spoken word and are lost"


def spoken_words(text: str) -> list[str]:
    """Return the words of a text as they are spoken."""
    return spoken_form(text).split()


def tag(utterance: Utterance, alignment: Alignment | None = None) -> Tagged:
    """Turn an utterance with slots on characters into one with tags on spoken words.

    Args:
        alignment: counts what is moved or lost.
    """
    alignment = alignment if alignment is not None else Alignment()
    words: list[str] = []
    owners: list[int | None] = []
    for written in re.finditer(r"\S+", utterance.text):
        inside = [
            index
            for index, slot in enumerate(utterance.slots)
            if slot.start < written.end() and slot.end > written.start()
        ]
        spoken = spoken_words(written[0])
        words += spoken
        owners += [inside[0] if inside else None] * len(spoken)
        _count_moved(utterance, written, inside, alignment)
    tags, last = [], None
    for owner in owners:
        name = "" if owner is None else utterance.slots[owner].name
        tags.append(OUTSIDE if owner is None else ("I-" if owner == last else "B-") + name)
        last = owner
    alignment.num_slots += len(utterance.slots)
    lost = set(range(len(utterance.slots))) - set(owners)
    alignment.lost += [f"{utterance.place}: {utterance.slots[index].name}" for index in lost]
    return Tagged(tuple(words), tuple(tags), utterance.intent, utterance.place)


def _count_moved(
    utterance: Utterance, written: re.Match[str], inside: Sequence[int], alignment: Alignment
) -> None:
    """Count the slots that end or begin between two spoken characters of a written word."""
    whole = "".join(spoken_words(written[0]))
    for index in inside:
        slot = utterance.slots[index]
        part = utterance.text[max(slot.start, written.start()) : min(slot.end, written.end())]
        if "".join(spoken_words(part)) != whole:
            alignment.moved.append(f"{utterance.place}: {slot.name} in {written[0]!r}")


def spans_of(tags: Sequence[str]) -> tuple[Span, ...]:
    """Return the slots that BIO tags say.

    An I that continues no slot of its name begins one, as conlleval and seqeval take it.
    """
    spans: list[Span] = []
    for index, each in enumerate([*tags, OUTSIDE]):
        prefix, _, name = each.partition("-")
        if prefix == "I" and spans and spans[-1][2] == index and spans[-1][0] == name:
            spans[-1] = (name, spans[-1][1], index + 1)
        elif prefix != OUTSIDE:
            spans.append((name, index, index + 1))
    return tuple(spans)


def tags_of(spans: Iterable[Span], num_words: int) -> tuple[str, ...]:
    """Return the BIO tags of slots, which must lie apart."""
    tags = [OUTSIDE] * num_words
    for name, start, end in spans:
        tags[start:end] = [f"B-{name}"] + [f"I-{name}"] * (end - start - 1)
    return tuple(tags)


def load_tagged(path: Path, alignment: Alignment | None = None) -> list[Tagged]:
    """Read a jsonl file of labelled utterances, and check that their tags round-trip.

    Raises:
        Malformed: a line is not in the format, or nothing of it is spoken.
    """
    tagged = []
    for utterance in read_jsonl(path):
        each = tag(utterance, alignment)
        if not each.words:
            rule = "must have a word in its spoken form"
            raise Malformed(each.place, f"text={utterance.text!r}", rule, "remove the line")
        assert list(each.words) == spoken_words(utterance.text), each.place
        assert tags_of(each.spans, len(each.words)) == each.tags, each.place
        tagged.append(each)
    return tagged


# --- the sets of labels -------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelSet:
    """The intents and the tags that a model can answer; a number is a place in them."""

    intents: tuple[str, ...]
    tags: tuple[str, ...]

    @classmethod
    def of(cls, utterances: Iterable[Tagged]) -> "LabelSet":
        """Collect the labels of utterances; each slot has both its tags."""
        utterances = list(utterances)
        names = sorted({span[0] for each in utterances for span in each.spans})
        tags = (OUTSIDE, *(f"{prefix}-{name}" for name in names for prefix in "BI"))
        return cls(tuple(sorted({each.intent for each in utterances})), tags)

    def check(self, utterances: Iterable[Tagged], source: str) -> None:
        """Refuse utterances with labels that are not among these.

        Args:
            source: where these labels come from, for the message.
        Raises:
            Malformed: an intent or a slot is unknown.
        """
        for each in utterances:
            unknown = {f"intent {each.intent!r}"} - {f"intent {name!r}" for name in self.intents}
            unknown |= {f"slot {name!r}" for name, *_ in each.spans if f"B-{name}" not in self.tags}
            if unknown:
                rule = f"must be in {source}, as no model can answer what it was not taught"
                remedy = "remove the line, or add utterances with this label there"
                raise Malformed(each.place, ", ".join(sorted(unknown)), rule, remedy)

    def write(self, path: Path) -> None:
        """Write the labels as JSON."""
        path.write_text(json.dumps({"intents": self.intents, "tags": self.tags}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "LabelSet":
        """Read what `write` wrote."""
        entry = json.loads(path.read_text())
        return cls(tuple(entry["intents"]), tuple(entry["tags"]))


# --- sub-words ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """The sub-words of an utterance.

    Attributes:
        ids: with [CLS] in front and [SEP] behind.
        firsts: the place in `ids` of each word's first sub-word.
    """

    ids: tuple[int, ...]
    firsts: tuple[int, ...]

    def spread(self, tag_ids: Sequence[int]) -> list[int]:
        """Return a label for each sub-word: those of the words at their first ones."""
        labels = [IGNORED] * len(self.ids)
        for place, label in zip(self.firsts, tag_ids, strict=True):
            labels[place] = label
        return labels

    def gather(self, labels: Sequence[int]) -> list[int]:
        """Return the labels of the words from those of the sub-words."""
        return [labels[place] for place in self.firsts]


def encode(
    words: Sequence[str], tokenizer: tokenizers.Tokenizer, max_length: int, place: str
) -> Encoded:
    """Turn words into sub-words.

    Raises:
        Malformed: they are more than max_length, or a word has no sub-word.
    """
    encoding = tokenizer.encode(list(words), is_pretokenized=True)
    if len(encoding.ids) > max_length:
        what = f"{len(encoding.ids)} sub-words with [CLS] and [SEP]"
        remedy = "shorten or remove it, or take an encoder with a larger max_length"
        raise Malformed(place, what, f"the encoder reads {max_length} at most", remedy)
    places = encoding.word_ids
    missing = set(range(len(words))) - {each for each in places if each is not None}
    if missing:
        what = f"word {words[min(missing)]!r}"
        raise Malformed(place, what, "must have a sub-word", "train the vocabulary on such text")
    firsts = [places.index(index) for index in range(len(words))]
    return Encoded(tuple(encoding.ids), tuple(firsts))
