"""examples/nlu_ssl/benchmark_selection.py: its pools, its runs, its picture."""

import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nlu_ssl"
sys.path.append(str(EXAMPLE))

import benchmark_selection as benchmark  # noqa: E402  (the files import each other by name)
from labelled import parse_brackets, write_jsonl  # noqa: E402
from shared.run_table import append_row, read  # noqa: E402

UTTERANCES = [
    parse_brackets(f"play [song : {song}] by [name : {name}] now", "a", "")
    for song, name in (("one", "ann"), ("two", "bob"), ("three", "carla"), ("four", "dmitri"))
]


def test_recombined_utterances_differ_and_keep_their_slots() -> None:
    found = list(benchmark.recombine(UTTERANCES, 16, seed=0))
    assert len(set(found)) == 16
    songs, names = zip(*((text.split()[1], text.split()[3]) for text in found), strict=True)
    assert set(songs) == {"one", "two", "three", "four"}
    assert set(names) == {"ann", "bob", "carla", "dmitri"}
    assert all(text.startswith("play ") and text.endswith(" now") for text in found)
    with pytest.raises(ValueError, match="--labelled: gives 16 texts: must give 17"):
        list(benchmark.recombine(UTTERANCES, 17, seed=0))


def test_runs_are_measured_and_drawn(tmp_path: Path) -> None:
    words = [first + second for first in "abcdef" for second in "ghijk"]
    utterances = [
        parse_brackets(f"play [song : song{word}] by [name : {word}] now", "a", "")
        for word in words
    ]
    write_jsonl(tmp_path / "seed.jsonl", utterances[:3])
    benchmark.make_pool(utterances, 800, tmp_path)
    rows = {}
    for run in benchmark.plan([800]):
        row = benchmark.measure(run, tmp_path)
        rows[run["method"], run["budget"], run["shards"], run["concave"]] = row
        append_row(tmp_path / "rows.csv", row, benchmark.COLUMNS)
        assert row["peak_bytes"] > 1 << 20
    lazy, naive = (rows[method, 80, "", "log"] for method in ("greedy", "naive"))
    assert naive["same_as_naive"] is True
    assert lazy["gain"] == pytest.approx(naive["gain"], abs=1e-2)
    assert lazy["evaluations"] < naive["evaluations"] == 80 * 800
    assert rows["prepare", 0, "", ""]["kept"] == 800 - 3  # those of seed.jsonl
    assert len(read(tmp_path / "rows.csv", benchmark.COLUMNS)) == len(rows)
    benchmark.draw(tmp_path / "rows.csv", tmp_path / "growth.svg")
    assert "GreeDi, 4 shards" in (tmp_path / "growth.svg").read_text()
