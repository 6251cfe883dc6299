"""examples/nlu_teacher/labels.py: tags on spoken words, sub-words, and the way back."""

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nlu_teacher"
sys.path.append(str(EXAMPLE))

pytest.importorskip("num2words", reason="needs num2words: pip install 'megatron-adams[nlu]'")
pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'megatron-adams[nlu]'")
import labelled  # noqa: E402  (the example's files import each other by name)
import labels  # noqa: E402
import vocabulary  # noqa: E402
from labelled import Malformed, Utterance  # noqa: E402
from labels import IGNORED, Alignment, LabelSet, Tagged  # noqa: E402


def marked(text: str) -> Utterance:
    """Read `play [album : Thriller]`."""
    return labelled.parse_brackets(text, "Play", "x:1")


def tagged(text: str, alignment: Alignment | None = None) -> tuple[list[str], list[str]]:
    each = labels.tag(marked(text), alignment)
    return list(each.words), list(each.tags)


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words", "tags"),
    [
        ("play [album : Thriller]", "play thriller", "O B-album"),
        (
            "from [year : 1959], please",
            "from nineteen fifty nine please",
            "O B-year I-year I-year O",
        ),
        ("add [a : The  Who] !", "add the who", "O B-a I-a"),
        ("[a : x]  [a : y]", "x y", "B-a B-a"),  # two slots side by side
        ("[a : x] - [a : y]", "x y", "B-a B-a"),
        ("is [a : it]?", "is it", "O B-a"),
    ],
)
def test_words_of_the_spoken_form_carry_the_slots(text: str, words: str, tags: str) -> None:
    alignment = Alignment()
    assert tagged(text, alignment) == (words.split(), tags.split())
    assert not alignment.moved and not alignment.lost and alignment.num_slots


def test_words_do_not_depend_on_where_the_slots_are() -> None:
    text = "what's [artist : Björk]'s album of [year : 1995]?"
    assert tagged(text)[0] == labels.spoken_words(marked(text).text)


def test_what_is_moved_or_lost_is_counted() -> None:
    alignment = Alignment()
    assert tagged("to [artist : Ann]'s list", alignment) == (
        ["to", "ann's", "list"],
        ["O", "B-artist", "O"],
    )
    assert alignment.moved == ['x:1: artist in "Ann\'s"'] and not alignment.lost
    alignment = Alignment()
    words, tags = tagged("[a : L.A][b : Joseph] [c : ?!]", alignment)
    assert len(words) == len(tags) and tags[0] == "B-a" and "B-b" not in tags
    assert alignment.lost == ["x:1: b", "x:1: c"] or alignment.lost == ["x:1: c", "x:1: b"]
    assert "2 have no spoken word and are lost" in str(alignment)


NAMES = st.sampled_from(["a", "b"])


@given(st.lists(st.tuples(st.sampled_from(["B", "I", "O"]), NAMES), max_size=8))
def test_spans_and_tags_round_trip(drawn: list[tuple[str, str]]) -> None:
    tags = [prefix if prefix == "O" else f"{prefix}-{name}" for prefix, name in drawn]
    spans = labels.spans_of(tags)
    again = labels.tags_of(spans, len(tags))
    assert labels.spans_of(again) == spans
    # Of well-formed tags, nothing changes.
    assert labels.tags_of(labels.spans_of(again), len(tags)) == again


@given(st.lists(st.tuples(NAMES | st.none(), st.integers(1, 3)), min_size=1, max_size=5))
def test_an_utterances_slots_come_back_from_its_tags(pieces: list[tuple[str | None, int]]) -> None:
    chunks, spans, place = [], [], 0
    for index, (name, length) in enumerate(pieces):
        chunks += [(" ".join(f"w{'x' * index}" for _ in range(length)), name), (" ", None)]
        if name is not None:
            spans.append((name, place, place + length))
        place += length
    each = labels.tag(labelled.from_chunks(chunks, "Play", "x:1"))
    assert each.spans == tuple(spans) and len(each.words) == place


def test_an_inside_tag_alone_begins_a_slot() -> None:
    assert labels.spans_of(["I-a", "I-a", "I-b", "O", "I-b", "B-b"]) == (
        ("a", 0, 2),
        ("b", 2, 3),
        ("b", 4, 5),
        ("b", 5, 6),
    )


def test_a_line_of_which_nothing_is_spoken_is_refused(tmp_path: Path) -> None:
    labelled.write_jsonl(tmp_path / "a.jsonl", [Utterance("??", "Play", ())])
    with pytest.raises(Malformed, match=r"a\.jsonl:1: text='\?\?': must have a word"):
        labels.load_tagged(tmp_path / "a.jsonl")


# --- the sets of labels -------------------------------------------------------------------------


def test_unknown_labels_are_refused_with_their_line(tmp_path: Path) -> None:
    known = LabelSet.of([labels.tag(marked("play [album : Thriller]"))])
    assert known.tags == ("O", "B-album", "I-album") and known.intents == ("Play",)
    known.check([labels.tag(marked("[album : bad]"))], "train.jsonl")
    with pytest.raises(Malformed, match=r"x:1: slot 'artist': must be in train\.jsonl"):
        known.check([labels.tag(marked("[artist : Prince]"))], "train.jsonl")
    with pytest.raises(Malformed, match="y:7: intent 'Stop': must be in"):
        known.check([Tagged(("stop",), ("O",), "Stop", "y:7")], "train.jsonl")
    known.write(tmp_path / "labels.json")
    assert LabelSet.read(tmp_path / "labels.json") == known


# --- sub-words ----------------------------------------------------------------------------------

TEXT = [
    "play thriller by michael jackson",
    "what's ann's list",
    "add bjork to my list of songs",
    "reserve somewhere quiet for yesterday evening",
    "however nobody knows which forecast mentions thunder",
]


@pytest.fixture(scope="module", params=vocabulary.KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    # Too small for whole words, so that most have several sub-words.
    vocabulary.train(TEXT, {"wordpiece": 110, "bpe": 290}[request.param], request.param).save(
        str(path)
    )
    return vocabulary.load(path)


def test_first_sub_words_carry_the_labels_and_give_them_back(tokenizer) -> None:
    rng = random.Random(0)
    num_parts = 0
    for text in TEXT:
        words = text.split()
        encoded = labels.encode(words, tokenizer, 64, "x:1")
        tags = [rng.randrange(5) for _ in words]
        spread = encoded.spread(tags)
        assert encoded.gather(spread) == tags and len(spread) == len(encoded.ids)
        assert [label for label in spread if label != IGNORED] == tags
        # What a masked-LM was trained on: the same sub-words as those of the running text.
        assert list(encoded.ids) == tokenizer.encode(text).ids
        assert encoded.ids[0] == vocabulary.FIRST and encoded.ids[-1] == vocabulary.LAST
        assert spread[0] == spread[-1] == IGNORED
        num_parts += len(encoded.ids) - len(words) - 2
        for index, first in enumerate(encoded.firsts):
            last = encoded.firsts[index + 1] if index + 1 < len(words) else len(encoded.ids) - 1
            decoded = tokenizer.decode(list(encoded.ids[first:last]))
            assert decoded.replace(" ", "") == words[index]
    assert num_parts > 10


def test_too_long_an_utterance_is_refused_and_never_cut(tokenizer) -> None:
    words = TEXT[0].split()
    length = len(labels.encode(words, tokenizer, 64, "x:1").ids)
    assert len(labels.encode(words, tokenizer, length, "x:1").ids) == length
    with pytest.raises(Malformed, match=rf"x:1: {length} sub-words .* reads {length - 1} at most"):
        labels.encode(words, tokenizer, length - 1, "x:1")


def test_a_word_without_a_sub_word_is_refused(tokenizer) -> None:
    with pytest.raises(Malformed, match="x:1: word '': must have a sub-word"):
        labels.encode(["play", "", "list"], tokenizer, 64, "x:1")
