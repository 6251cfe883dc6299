"""examples/nlu_teacher: spoken form, vocabulary, pools, datasets, and the leak check."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nlu_teacher"
sys.path.append(str(EXAMPLE))

import pool  # noqa: E402  (the example's files import each other by name)
import vocabulary  # noqa: E402
from pool import Forbidden, Line, Repetitions, check_no_leak, read_documents  # noqa: E402
from prepare_text import RECORD, Settings, describe, pack, prepare  # noqa: E402
from spoken import spoken_form  # noqa: E402

# --- spoken form --------------------------------------------------------------------------------

SPOKEN = {
    "Play Hits from 1959, now!": "play hits from nineteen fifty nine now",
    "in the 1980s, or the 90s": "in the nineteen eighties or the nineties",
    "at 7:05pm or 11:00": "at seven oh five pm or eleven",
    "$5 and $1 and €2.50": "five dollars and one dollar and two point five zero euros",
    "3.5% & 1,000 @ home": "three point five percent and one thousand at home",
    "the 21st of May 2026": "the twenty first of may twenty twenty six",
    "don\u2019t 'quote' me": "don't quote me",
    "AC/DC's mp3, U.S.A.": "ac dc's mp three u s a",
    "007 12345678901234567": (
        "zero zero seven one two three four five six seven eight nine zero one two three four five "
        "six seven"
    ),
    "Zürich \u0663": "zürich three",
    "!? -- ...": "",
}


@pytest.mark.parametrize("written", SPOKEN)
def test_spoken_form(written: str) -> None:
    assert spoken_form(written) == SPOKEN[written]


TEXT = st.text(st.sampled_from("aZé'\u2019 019.,:%$€&-/st½²İß\u0663\n"), max_size=20) | st.text(
    max_size=8
)


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_spoken_form_is_its_own(text: str) -> None:
    spoken = spoken_form(text)
    assert spoken_form(spoken) == spoken
    assert all(char.isalpha() or char in " '" for char in spoken if char.isascii())
    assert spoken == " ".join(spoken.split())


@settings(max_examples=300, deadline=None)
@given(TEXT, TEXT)
def test_words_are_spoken_one_by_one(first: str, second: str) -> None:
    together = " ".join(filter(None, [spoken_form(first), spoken_form(second)]))
    assert spoken_form(f"{first} {second}") == together


# --- vocabulary ---------------------------------------------------------------------------------

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(8)]


@pytest.mark.parametrize("kind", vocabulary.KINDS)
def test_vocabulary_has_fixed_special_ids(tmp_path: Path, kind: str) -> None:
    trained = vocabulary.train(TEXTS, 300, kind)
    trained.save(str(tmp_path / vocabulary.FILE))
    loaded = vocabulary.load(tmp_path)
    assert [loaded.token_to_id(t) for t in vocabulary.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    ids = loaded.encode("beta alpha").ids
    assert (ids[0], ids[-1]) == (vocabulary.FIRST, vocabulary.LAST)
    assert loaded.decode(ids).strip() == "beta alpha"
    # The name of a special token in a text is text.
    assert vocabulary.MASK not in loaded.encode("[MASK]").ids
    assert vocabulary.digest(tmp_path) == vocabulary.digest(tmp_path / vocabulary.FILE)


def test_vocabulary_of_other_special_ids_is_refused(tmp_path: Path) -> None:
    trained = vocabulary.train(TEXTS, 100).to_str().replace("[MASK]", "[M]")
    (tmp_path / "tokenizer.json").write_text(trained)
    with pytest.raises(ValueError, match=r"\[MASK\]=None.*must have the ids 0 to 4"):
        vocabulary.load(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        vocabulary.load(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="must be one of"):
        vocabulary.train(TEXTS, 100, "words")
    with pytest.raises(ValueError, match="at least 261 for bpe"):
        vocabulary.train(TEXTS, 100, "bpe")


# --- reading ------------------------------------------------------------------------------------


def test_documents_of_text_and_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One. Two!\nThree\n\n\nFour\n")
    texts = [[line.text for line in document] for document in read_documents(tmp_path / "a.txt")]
    assert texts == [["One. Two!", "Three"], ["Four"]]
    (tmp_path / "b.jsonl").write_text('{"text": "One\\nTwo"}\n\n{"text": " "}\n{"text": "x"}\n')
    lines = [line for document in read_documents(tmp_path / "b.jsonl") for line in document]
    assert [(line.text, line.number) for line in lines] == [("One", 1), ("Two", 1), ("x", 4)]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b'{"text": "x"}\n{"text": 3}\n', r"line 2: has no string 'text'"),
        (b'{"text": "x"}\n\n{\n', "line 3: is no JSON"),
        (b'{"text": "\xe9"}\n', "is not UTF-8"),
    ],
)
def test_bad_lines_are_refused_with_their_place(
    tmp_path: Path, contents: bytes, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path / "bad.jsonl"))


def test_sentences_end_before_a_capital_or_a_digit() -> None:
    line = Line('He said "No." Then 3.5 m, e.g. here. 7 of them! And', Path("f"), 4)
    found = [sentence.text for sentence in pool.split_sentences([line])]
    assert found == ['He said "No.', "Then 3.5 m, e.g. here.", "7 of them!", "And"]


def test_repetitions_are_found_in_spoken_form() -> None:
    repetitions = Repetitions()
    first = repetitions.without([Line("Call 2 of us!", Path("f"), 1), Line("b", Path("f"), 2)])
    again = repetitions.without([Line("call two of us", Path("f"), 3), Line("c", Path("f"), 4)])
    assert [line.number for line in [*first, *again]] == [1, 2, 4]
    assert repetitions.num_dropped == 1


# --- datasets -----------------------------------------------------------------------------------


def make_settings(text: Path, **changed: Any) -> Settings:
    return Settings(
        **{
            "text": [text],
            "key": "text",
            "utterances": False,
            "spoken_share": 0.7,
            "held_out_fraction": 0.2,
            "max_length": 12,
            "tokenizer": None,
            "vocabulary": "wordpiece",
            "vocab_size": 200,
            "forbid": [],
            "drop_forbidden": False,
            "drop_long": False,
            **changed,
        }
    )


def write_documents(path: Path, num_documents: int) -> None:
    rows = [
        f"The {WORDS[i % 8]} number {i} is here. It is {WORDS[i % 5]} number {i}, of {i + 1} more."
        for i in range(num_documents)
    ]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def read_sequences(prefix: Path) -> list[list[int]]:
    # The format of Megatron's index: sizes behind a header of 9 + 8 + 1 + 8 + 8 bytes.
    data = prefix.with_suffix(".idx").read_bytes()
    count = int(np.frombuffer(data, np.uint64, 1, 18)[0])
    lengths = np.frombuffer(data, np.int32, count, 34)
    ids = np.fromfile(prefix.with_suffix(".bin"), np.uint16)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def test_dataset_holds_every_word_once(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl", 200)
    record = prepare(make_settings(tmp_path / "a.jsonl"), tmp_path / "out")
    counts = record["counts"]
    assert counts["lines"] == 400
    assert 0.6 < counts["spoken_lines"] / 400 < 0.8
    assert counts["documents"]["train"] + counts["documents"]["held_out"] == 200
    assert 20 < counts["documents"]["held_out"] < 60
    tokenizer = vocabulary.load(tmp_path / "out")
    texts: list[str] = []
    for split in ("train", "held_out"):
        sequences = read_sequences(tmp_path / "out" / split)
        assert len(sequences) == counts["sequences"][split]
        assert max(map(len, sequences)) <= 10
        assert sum(map(len, sequences)) == counts["tokens"][split]
        texts.append(tokenizer.decode([i for part in sequences for i in part]))
    words = spoken_form(" ".join(texts)).split()
    expected = [spoken_form(row) for row in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert counts["unknown_tokens"] == 0
    # "text", the key, is among the expected words of each line.
    assert sorted(words) == sorted(w for row in expected for w in row.split()[1:])
    assert f"{counts['divided_sentences']} sentences divided" in describe(record)


def test_frequencies_of_tokens_are_a_loss(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl", 100)
    record = prepare(make_settings(tmp_path / "a.jsonl"), tmp_path / "out")
    train, held_out = (
        [i for part in read_sequences(tmp_path / "out" / split) for i in part]
        for split in ("train", "held_out")
    )
    occurrences, size = Counter(train), record["vocab_size"]
    losses = [-math.log((occurrences[i] + 1) / (len(train) + size)) for i in held_out]
    assert record["unigram_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert f"{record['unigram_loss']:.3f} nats by the tokens' frequencies" in describe(record)


@pytest.mark.parametrize("kind", vocabulary.KINDS)
def test_same_text_gives_the_same_dataset(tmp_path: Path, kind: str) -> None:
    write_documents(tmp_path / "a.jsonl", 40)
    settings = make_settings(tmp_path / "a.jsonl", vocabulary=kind, vocab_size=300)
    first, second = (prepare(settings, tmp_path / name) for name in ("x", "y"))
    assert first == second
    for name in ("train.bin", "held_out.idx", vocabulary.FILE, pool.LINES_FILE):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_share_of_spoken_form(tmp_path: Path, share: float) -> None:
    write_documents(tmp_path / "a.jsonl", 20)
    settings = make_settings(tmp_path / "a.jsonl", spoken_share=share)
    assert prepare(settings, tmp_path / "out")["counts"]["spoken_lines"] == 40 * share


def test_long_utterance_is_refused_or_counted(tmp_path: Path) -> None:
    long = " ".join(WORDS * 3)
    (tmp_path / "a.txt").write_text("\n".join([*TEXTS, long, *(f"{w} again" for w in WORDS)]))
    settings = make_settings(tmp_path / "a.txt", utterances=True, max_length=16)
    with pytest.raises(ValueError, match=r"a.txt, line 9: has \d+ tokens.*--drop-long"):
        prepare(settings, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    settings = make_settings(tmp_path / "a.txt", utterances=True, max_length=16, drop_long=True)
    record = prepare(settings, tmp_path / "out")
    assert record["counts"]["dropped_long"] == 1
    assert sum(record["counts"]["sequences"].values()) == 16
    assert "1 too long" in describe(record)


def test_pack_divides_and_fills() -> None:
    sentences = [[1, 2], [3, 4, 5, 6, 7], [8], [9]]
    sequences, divided = pack(sentences, 4, divide=True, places=["a"] * 4)
    assert sequences == [[1, 2], [3, 4, 5, 6], [7, 8, 9]]
    assert divided == 1


def test_dataset_refuses(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl", 10)
    for changed, message in (
        ({"spoken_share": 1.2}, "--spoken-share 1.2"),
        ({"held_out_fraction": 0.0}, "--held-out-fraction 0.0"),
        ({"max_length": 3}, "--max-length 3"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(make_settings(tmp_path / "a.jsonl", **changed), tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        prepare(make_settings(tmp_path / "a.jsonl"), tmp_path / "there")
    (tmp_path / "short.txt").write_text("alpha\n")
    with pytest.raises(ValueError, match=r"there is no (train|held-out) text"):
        prepare(make_settings(tmp_path / "short.txt"), tmp_path / "out")


# --- leaks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaked", ["Play track 7!", "play track seven"])
def test_utterance_of_a_test_set_stops_the_preparation(tmp_path: Path, leaked: str) -> None:
    write_documents(tmp_path / "a.jsonl", 30)
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "Play track 7!"}) + "\n")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps({"text": leaked}) + "\n")
    settings = make_settings(tmp_path / "a.jsonl", forbid=[tmp_path / "test.jsonl"])
    with pytest.raises(ValueError, match=r"a.jsonl, line 31: .*test.jsonl, line 1"):
        prepare(settings, tmp_path / "out")
    # Without being told, it is in the dataset, and the check of the finished one finds it.
    prepare(make_settings(tmp_path / "a.jsonl"), tmp_path / "leaky")
    with pytest.raises(ValueError, match=r"leaky: holds 1 utterances.*test.jsonl, line 1"):
        check_no_leak([tmp_path / "leaky"], [tmp_path / "test.jsonl"])
    settings = make_settings(
        tmp_path / "a.jsonl", forbid=[tmp_path / "test.jsonl"], drop_forbidden=True
    )
    record = prepare(settings, tmp_path / "clean")
    assert record["counts"]["dropped_forbidden"] == 1
    assert check_no_leak([tmp_path / "clean"], [tmp_path / "test.jsonl"]) == 1


def test_leak_check_needs_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("x\n")
    with pytest.raises(ValueError, match="is missing; prepare the dataset"):
        check_no_leak([tmp_path], [tmp_path / "test.txt"])
    assert Forbidden.read([tmp_path / "test.txt"]).places
    assert RECORD == "dataset.json"
