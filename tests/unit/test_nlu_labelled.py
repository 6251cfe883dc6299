"""examples/nlu_teacher/labelled.py and templates.py: the corpora, their faults, and the split."""

import json
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "nlu_teacher"
SNIPS = ROOT.parent / "shared" / "data" / "snips"
sys.path.append(str(EXAMPLE))

pytest.importorskip("num2words", reason="needs num2words: pip install 'megatron-adams[nlu]'")
import labelled  # noqa: E402  (the example's files import each other by name)
from labelled import Malformed, Slot, Utterance  # noqa: E402

GOOD = {
    "text": "play Thriller",
    "intent": "Play",
    "slots": [{"name": "album", "start": 5, "end": 13}],
}


def slot(name: str = "album", start: object = 5, end: object = 13, **more: object) -> dict:
    return {"slots": [{"name": name, "start": start, "end": end, **more}]}


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


# --- jsonl --------------------------------------------------------------------------------------


def test_jsonl_is_read_as_it_was_written(tmp_path: Path) -> None:
    utterances = [
        Utterance("play Thriller", "Play", (Slot("album", 5, 13),)),
        Utterance("hör zu", "Listen", ()),
    ]
    labelled.write_jsonl(tmp_path / "a.jsonl", utterances)
    read = labelled.read_jsonl(tmp_path / "a.jsonl")
    assert [(each.text, each.intent, each.slots) for each in read] == [
        (each.text, each.intent, each.slots) for each in utterances
    ]
    assert read[1].place == f"{tmp_path / 'a.jsonl'}:2"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("{", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ({"text": None}, "text=None"),
        ({"text": "  ", "slots": []}, "must have a word"),
        ({"intent": ""}, "must have a name"),
        ({"intent": 3}, "intent=3"),
        ({"slots": "none"}, "slots='none'"),
        ({"slots": ["album"]}, "must be an object"),
        (slot(start="5"), "start='5'"),
        (slot(start=True), "start=True"),
        (slot(end=14), "must lie within the text's 13 characters"),
        (slot(start=-1), "must lie within"),
        (slot(start=5, end=5), "must lie within"),
        (slot(start=4, end=5), "must have more than spaces"),
        (slot(name="my album"), "a word without spaces"),
        (slot(name=""), "a word without spaces"),
        (slot(value="Bad"), "the text has 'Thriller' from 5 to 13"),
        ({"slots": [*slot()["slots"], *slot("x", 0, 6)["slots"]]}, "must not overlap"),
    ],
)
def test_malformed_lines_are_refused_with_their_place(
    tmp_path: Path, change: object, said: str
) -> None:
    line = change if isinstance(change, str) else GOOD | change
    path = write(tmp_path / "a.jsonl", GOOD, line)
    with pytest.raises(Malformed, match=said) as raised:
        labelled.read_jsonl(path)
    place, _, rest = str(raised.value).partition(": ")
    assert place == f"{path}:2" and "; " in rest


# --- SNIPS --------------------------------------------------------------------------------------


def snips_file(path: Path, *elements: object, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        json.dumps({"Play": list(elements)}, indent=1, ensure_ascii=False).encode(encoding)
    )
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_snips_chunks_become_slots_without_the_spaces_around(tmp_path: Path, encoding: str) -> None:
    path = snips_file(
        tmp_path / "train_Play_full.json",
        {"data": [{"text": "hör "}, {"text": " Björk ", "entity": "artist"}, {"text": "?\n"}]},
        {"data": [{"text": " \n"}]},
        encoding=encoding,
    )
    (utterance,) = labelled.read_snips(path)
    assert utterance.text == "hör  Björk ?\n" and utterance.intent == "Play"
    assert [utterance.text[s.start : s.end] for s in utterance.slots] == ["Björk"]
    assert utterance.place == f"{path}:3"


def test_a_malformed_snips_element_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"Play": [\n {"data": [{"text": "play"}]},\n\n {"data": [{"words": 1}]}]}')
    with pytest.raises(Malformed, match=r"x\.json:4: .*must be"):
        labelled.read_snips(path)
    path.write_text('{"Play": [\n {"data": []},\n {"data": [,]}]}')
    with pytest.raises(Malformed, match=r"x\.json:3: "):
        labelled.read_snips(path)
    path.write_text("[]")
    with pytest.raises(Malformed, match=r"x\.json:1: '\[\]'"):
        labelled.read_snips(path)


@pytest.mark.skipif(not SNIPS.is_dir(), reason="SNIPS is not in ../shared/data/snips")
def test_snips_has_its_published_counts() -> None:
    files = {kind: sorted(SNIPS.glob(f"*/{kind}_*.json")) for kind in ("train", "validate")}
    read = {kind: [labelled.read_snips(path) for path in paths] for kind, paths in files.items()}
    assert sum(map(len, read["train"])) == 13_784 and sum(map(len, read["validate"])) == 700
    train = [each for utterances in read["train"] for each in utterances]
    assert len({each.intent for each in train}) == 7
    assert len({slot.name for each in train for slot in each.slots}) == 39


# --- MASSIVE ------------------------------------------------------------------------------------


def test_massive_brackets_become_slots() -> None:
    read = labelled.parse_brackets("wake me at [time : five am] [date : today]", "alarm", "x:1")
    assert read.text == "wake me at five am today"
    assert [(s.name, read.text[s.start : s.end]) for s in read.slots] == [
        ("time", "five am"),
        ("date", "today"),
    ]


@pytest.mark.parametrize("text", ["at [time : five", "at five]", "at [time five]", "[a : [b : c]]"])
def test_malformed_brackets_are_refused(text: str) -> None:
    with pytest.raises(Malformed, match="x:1: "):
        labelled.parse_brackets(text, "alarm", "x:1")


def test_massive_is_split_by_its_partitions(tmp_path: Path) -> None:
    line = {"intent": "alarm", "annot_utt": "wake me", "partition": "dev"}
    path = write(tmp_path / "m.jsonl", line, line | {"partition": "train"})
    splits = labelled.read_massive(path)
    assert {name: len(each) for name, each in splits.items()} == {
        "train": 1,
        "validation": 1,
        "test": 0,
    }
    with pytest.raises(Malformed, match=r"m\.jsonl:1: partition='x'"):
        labelled.read_massive(write(path, line | {"partition": "x"}))


# --- the split ----------------------------------------------------------------------------------


def test_no_test_or_validation_utterance_is_in_training() -> None:
    def say(*texts: str) -> list[Utterance]:
        return [Utterance(text, "Play", ()) for text in texts]

    kept, left_out = labelled.make_disjoint(
        {
            "train": say("Play 2 songs!", "stop", "hello", "hello", "..."),
            "validation": say("STOP.", "wait"),
            "test": say("play two songs", "play Two songs?"),
        }
    )
    assert {name: [each.text for each in sets] for name, sets in kept.items()} == {
        "train": ["hello"],
        "validation": ["STOP.", "wait"],
        "test": ["play two songs"],
    }
    assert left_out == {"train": 4, "validation": 0, "test": 1}


def test_a_held_out_set_has_as_many_of_each_intent_and_leaves_most() -> None:
    whole = [
        Utterance(f"{intent} {i}", intent, ())
        for intent, n in (("a", 50), ("b", 10))
        for i in range(n)
    ]
    rest, held_out = labelled.held_out(whole, 5, seed=0)
    assert len(rest) + len(held_out) == 60 and not set(rest) & set(held_out)
    assert [sum(each.intent == name for each in held_out) for name in "ab"] == [5, 2]
    assert labelled.held_out(whole, 5, seed=0)[1] == held_out
    assert labelled.held_out(whole, 5, seed=1)[1] != held_out


def test_the_command_writes_the_sets_and_refuses_a_missing_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "own"
    source.mkdir()
    argv = ["--format", "jsonl", "--source", str(source), "--out", str(tmp_path / "out")]
    assert labelled.main(argv) == 2
    assert "train.jsonl: no such file" in capsys.readouterr().err
    for name in labelled.SPLITS:
        write(source / f"{name}.jsonl", GOOD | {"text": f"play Thriller {name}"})
    assert labelled.main(argv) == 0
    written = (tmp_path / "out" / "test.jsonl").read_text()
    assert json.loads(written)["slots"] == [
        {"name": "album", "start": 5, "end": 13, "value": "Thriller"}
    ]
    write(source / "train.jsonl", GOOD | {"text": "play Thriller test"})
    assert labelled.main(argv) == 2
    assert "no utterance is left in train: " in capsys.readouterr().err
    argv[1:4] = ["snips", "--source", str(source)]
    assert labelled.main(argv) == 2
    assert "give the folder of SNIPS" in capsys.readouterr().err


# --- templates ----------------------------------------------------------------------------------

TEMPLATES = {
    "lists": {"level": {"range": {"from": 1, "to": 9}}, "message": {"wildcard": True}},
    "expansion_rules": {"the": "(the|my)", "say": "say {message}"},
    "intents": {},
}


def sampler(seed: int = 0):
    pytest.importorskip("hassil", reason="needs hassil: pip install 'megatron-adams[nlu]'")
    import templates

    return templates.Sampler(TEMPLATES, random.Random(seed))


def test_a_template_gives_its_words_and_slots() -> None:
    draws = sampler()
    import templates

    seen = set()
    for _ in range(200):
        chunks = templates.tidy(draws.draw("set [<the>] {area} (fan|lamp) to {level:speed}"))
        each = labelled.from_chunks(chunks, "Set", "x")
        assert "  " not in each.text and not each.text.startswith(" ")
        names = [(s.name, each.text[s.start : s.end]) for s in each.slots]
        assert [name for name, _ in names] == ["area", "speed"]
        assert names[0][1] in templates.VALUES["area"] and names[1][1] in "123456789"
        words = each.text.replace(names[0][1], "AREA").split()
        assert words[0] == "set" and words[-2] == "to" and words[-3] in {"fan", "lamp"}
        seen.add(tuple(words[1:-3]))
    assert seen == {("AREA",), ("the", "AREA"), ("my", "AREA")}


def test_a_template_that_needs_free_text_is_not_usable() -> None:
    draws = sampler()
    import templates

    assert templates._is_usable(draws, "turn on <the> {area}")
    assert not templates._is_usable(draws, "<say>")
    assert not templates._is_usable(draws, "<unknown>")


def test_home_assistants_templates_give_labelled_utterances() -> None:
    pytest.importorskip("home_assistant_intents", reason="needs home-assistant-intents")
    import templates

    first = templates.read_home_assistant("en", 5, seed=0)
    assert first == templates.read_home_assistant("en", 5, seed=0)
    assert len({each.intent for each in first}) > 30
    assert len({each.text for each in first}) > 100 and any(each.slots for each in first)
    with pytest.raises(ValueError, match="--source xx: must be a language"):
        templates.read_home_assistant("xx", 5, seed=0)
