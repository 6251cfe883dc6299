"""examples/nlu_ssl: a pool is read in parts, and cleaned."""

import gzip
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nlu_ssl"
sys.path.append(str(EXAMPLE))

import domain_filter  # noqa: E402  (the example's files import each other by name)
import pool_near  # noqa: E402
from labelled import Utterance, write_jsonl  # noqa: E402
from pool_files import read_all, read_batches, read_texts, write_pool  # noqa: E402
from pool_prepare import REASONS, Settings, decide, prepare  # noqa: E402

NAMES = ["ann", "bob", "carla", "dmitri", "eve", "frank", "gina", "hugo"]
SONGS = ["thriller", "bad", "yesterday", "help", "hello", "creep"]
MUSIC = [f"play {song} by {name}" for song in SONGS for name in NAMES]
WEATHER = [
    f"what is the weather in {name}ville {day}" for name in NAMES for day in ("today", "tomorrow")
]
LONG = "one two three four five six seven eight nine"


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(domain_filter, "_HASHED", 1 << 12)  # enough here, and trained at once
    write_jsonl(tmp_path / "train.jsonl", [Utterance(text, "a", ()) for text in MUSIC[:12]])
    pool = [
        *MUSIC[10:40],  # the first two of them are labelled
        *WEATHER[6:12],
        "...",  # nothing is spoken
        "Play CREEP, by Gina!",  # as the test set has it
        MUSIC[20].upper(),  # repeated
        f"{MUSIC[30].split(' ', 1)[1]} play",  # the same words in another order
        MUSIC[47],
    ]
    return Settings(
        pool=[write(tmp_path / "pool.jsonl", pool)],
        labelled=tmp_path / "train.jsonl",
        forbid=[write(tmp_path / "test.jsonl", [MUSIC[46]])],
        drop_forbidden=True,
        other_domains=[write(tmp_path / "others.jsonl", WEATHER[:6] + WEATHER[12:])],
    )


# --- files --------------------------------------------------------------------------------------


def test_all_forms_of_a_pool_give_the_same_batches(tmp_path: Path) -> None:
    from datasets import Dataset

    lines = write(tmp_path / "pool.jsonl", MUSIC)
    packed = tmp_path / "pool.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    assert write_pool(tmp_path / "pool.arrow", read_batches(lines, 5)) == len(MUSIC)
    Dataset.from_dict({"text": MUSIC, "id": range(len(MUSIC))}).save_to_disk(tmp_path / "folder")
    for path in (lines, packed, tmp_path / "pool.arrow", tmp_path / "folder"):
        batches = [list(batch) for batch in read_batches(path, 7)]
        assert [len(batch) for batch in batches] == [7] * 6 + [6], path
        assert [text for batch in batches for text in batch] == MUSIC, path
    assert sum(map(len, read_all([lines, packed]))) == 2 * len(MUSIC)


def test_a_file_that_is_not_finished_does_not_appear(tmp_path: Path) -> None:
    def broken() -> Any:
        yield MUSIC
        raise ValueError("the input ends here")

    with pytest.raises(ValueError, match="the input ends here"):
        write_pool(tmp_path / "pool.arrow", broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": 1}', "line 2: has 'label': a pool with labels"),
        ('{"text": "a", "slots": []}', "line 2: has 'slots': a pool with labels"),
        ('{"utterance": "a"}', "line 2: has no string 'text'"),
        ('{"text": 1}', "line 2: has no string 'text'"),
        ("text", "line 2: is no JSON"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=f"pool.jsonl, {message}"):
        list(read_batches(path))


# --- near-duplicates ----------------------------------------------------------------------------


def jaccard(first: list[str], second: list[str]) -> float:
    return len(set(first) & set(second)) / len(set(first) | set(second))


def some_utterances() -> list[list[str]]:
    rng = random.Random(3)
    words = [f"w{number}" for number in range(30)]
    found = [[rng.choice(words) for _ in range(rng.randint(1, 25))] for _ in range(80)]
    for each in found[:40]:
        changed = each.copy()
        changed[rng.randrange(len(each))] = rng.choice(words)
        rng.shuffle(changed)
        found += [changed, [*each, "more"]]
    return [*found, [], []]


def test_similarities_are_those_of_a_plain_oracle() -> None:
    utterances = some_utterances()
    words, lengths = pool_near.word_sets(utterances)
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, len(utterances), (500, 2))
    pairs = np.concatenate([pairs[pairs[:, 0] != pairs[:, 1]], [[5, 5], [80, 0]]])
    pairs = pairs[(lengths[pairs] > 0).all(axis=1) & (pairs[:, 0] != pairs[:, 1])]
    found = pool_near.similarities(words, np.cumsum(lengths) - lengths, lengths, pairs)
    expected = [jaccard(utterances[a], utterances[b]) for a, b in pairs]
    np.testing.assert_allclose(found, expected, rtol=1e-15)
    assert found.max() > 0.5


def test_near_duplicates_are_found_and_no_others(tmp_path: Path) -> None:
    utterances = some_utterances()
    near = pool_near.NearDuplicates(tmp_path, 0.9)
    for at in range(0, len(utterances), 11):
        near.add(utterances[at : at + 11])
    is_kept = np.ones(len(utterances), bool)
    is_kept[3] = False
    found = near.find(is_kept)
    # A group of three or more needs no path here: its first one is similar to all.
    expected = [
        is_kept[at]
        and bool(each)
        and any(
            is_kept[before] and utterances[before] and jaccard(utterances[before], each) >= 0.9
            for before in range(at)
        )
        for at, each in enumerate(utterances)
    ]
    assert found.tolist() == expected
    assert 10 < sum(expected) < 80


def test_utterances_that_a_chain_connects_are_a_group(tmp_path: Path) -> None:
    chain = [
        LONG.split(),
        [*LONG.split(), "ten"],
        [*LONG.split(), "ten", "eleven"],
        ["something", "else"],
    ]
    assert jaccard(chain[0], chain[2]) < 0.9 <= jaccard(chain[1], chain[2])
    near = pool_near.NearDuplicates(tmp_path, 0.9)
    near.add(chain)
    assert near.find(np.ones(4, bool)).tolist() == [False, True, True, False]


def test_hashes_agree_as_often_as_the_sets_are_similar() -> None:
    """One hash of two sets is equal with a probability of their similarity; a band's are ROWS."""
    rng = random.Random(0)
    pairs = []
    for _ in range(1500):
        shared = [f"s{rng.random()}" for _ in range(9)]
        pairs += [[*shared, f"a{rng.random()}"], shared]
    bands = pool_near.bands_of(*pool_near.word_sets(pairs))
    equal = (bands[::2] == bands[1::2]).mean()
    assert equal == pytest.approx(0.9**pool_near.ROWS, abs=0.03)
    assert len(np.unique(bands[1])) == pool_near.BANDS


@pytest.mark.parametrize("similarity", [0.2, 1.1])
def test_a_similarity_out_of_range_is_refused(similarity: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"similarity={similarity}: must be from 0.5 to 1"):
        pool_near.NearDuplicates(tmp_path, similarity)


# --- the domain filter --------------------------------------------------------------------------


def test_filter_tells_domains_apart_on_text_that_it_has_not_seen() -> None:
    model = domain_filter.DomainFilter(MUSIC[:30], WEATHER[:8])
    assert (model.confidences(MUSIC[30:]) >= 0.5).all()
    assert (model.confidences(WEATHER[8:]) < 0.5).all()
    held_out = model.held_out
    assert (held_out.positives, held_out.negatives) == (30, 8)
    assert (held_out.recall, held_out.precision, held_out.false_positive_rate) == (1, 1, 0)


def test_held_out_figures_are_of_text_that_the_filter_was_not_trained_on() -> None:
    """On labels that mean nothing it must be no better than guessing, though it can learn them."""
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(10**6)}" for _ in range(5)) for _ in range(200)]
    held_out = domain_filter.DomainFilter(texts[:100], texts[100:]).held_out
    assert held_out.precision == pytest.approx(0.5, abs=0.15)


def test_figures_are_those_of_the_counts() -> None:
    model = domain_filter.DomainFilter(MUSIC[:5], WEATHER[:5])
    confidences = np.array([0.9, 0.5, 0.4, 0.6, 0.1, 0.2, 0.3])
    found = model._held_out(confidences, np.arange(7) < 3)
    assert found == domain_filter.HeldOut(3, 4, 2 / 3, 2 / 3, 1 / 4)


def test_what_the_filter_refuses() -> None:
    with pytest.raises(ValueError, match="--other-domains: 4 utterances: must be at least 5"):
        domain_filter.DomainFilter(MUSIC, WEATHER[:4])
    with pytest.raises(ValueError, match="--confidence 1: must be above 0 and below 1"):
        domain_filter.DomainFilter(MUSIC, WEATHER, confidence=1)
    for bad in (np.nan, 1.5):
        with pytest.raises(ValueError, match=r"first that of utterance 1, are (nan|1.5): must be"):
            domain_filter.check_confidences(np.array([0.5, bad]), "a filter")


# --- the whole ----------------------------------------------------------------------------------


def test_each_reason_is_found(asked: Settings, tmp_path: Path) -> None:
    record = prepare(asked, tmp_path / "out")
    expected = {
        "silent": 1,
        "forbidden": 1,
        "labelled": 2,
        "repeated": 1,
        "other_domain": 6,
        "near_duplicate": 1,
        "kept": 29,
    }
    assert {name: record[name] for name in REASONS} == expected
    assert record["read"] == sum(expected.values()) == 41
    kept = read_texts(tmp_path / "out" / "pool.arrow")
    assert kept == [*MUSIC[12:40], MUSIC[47]]
    assert json.loads((tmp_path / "out" / "pool.json").read_text()) == record
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pool.arrow", "pool.json"]


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_reading_in_parts_gives_the_same_as_at_once(
    asked: Settings, tmp_path: Path, batch: int
) -> None:
    reasons = []
    for name, size in (("parts", batch), ("once", 10**6)):
        folder = tmp_path / name
        folder.mkdir()
        reasons.append(decide(replace(asked, batch=size), MUSIC[:12], folder)[0].tolist())
    assert reasons[0] == reasons[1]
    assert len(set(reasons[0])) == len(REASONS)


def test_without_other_domains_nothing_is_filtered(asked: Settings, tmp_path: Path) -> None:
    record = prepare(replace(asked, other_domains=[], similarity=None), tmp_path / "out")
    assert (record["other_domain"], record["near_duplicate"]) == (0, 0)
    assert record["domain_filter"] is None
    assert record["kept"] == 36


def test_an_utterance_of_a_test_set_stops_it(asked: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 38: 'Play CREEP, by Gina!' is in a validation or"):
        prepare(replace(asked, drop_forbidden=False, batch=5), tmp_path / "out")
    assert not (tmp_path / "out" / "pool.arrow").exists()


def test_a_pool_of_which_nothing_is_left_is_refused(asked: Settings, tmp_path: Path) -> None:
    pool = [write(tmp_path / "weather.jsonl", WEATHER[6:12])]
    with pytest.raises(ValueError, match=r"of 6 .* none is left \(0 kept.* 6 other_domain.*empty"):
        prepare(replace(asked, pool=pool), tmp_path / "out")
    with pytest.raises(ValueError, match="of 0 utterances none is left"):
        prepare(replace(asked, pool=[write(tmp_path / "no.jsonl", [])]), tmp_path / "out")


def test_confidences_that_are_nan_stop_it(
    asked: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        domain_filter.DomainFilter, "confidences", lambda self, texts: np.full(len(texts), np.nan)
    )
    with pytest.raises(ValueError, match=r"the domain filter: 41 of 41 confidences.*are nan"):
        prepare(asked, tmp_path / "out")
