"""Measure time and memory of cleaning a pool and selecting from it, and draw their growth.

    benchmark_selection.py --labelled labelled --out results/selection

Inputs: a folder of labelled.py. Its training utterances are recombined into pools of 10,000,
100,000 and 1,000,000 different ones: a slot gets the value that another utterance has in it.
Outputs, in --out: rows.csv (a run a row; one that is there is not repeated) and growth.svg.

Each run is a process of its own, so that its peak memory is its own. `seconds` and `cpu_seconds`
are of the work on the pool; `peak_bytes` is of the whole process, with what Python's packages take:
a run of the method "none" does nothing else."""

import argparse
import csv
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import committee
import numpy as np
import pool_prepare
import select_pool
from ngrams import batches_of
from pool_files import read_batches, write_pool
from submodular import naive_greedy
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

from labelled import Utterance, read_jsonl, write_jsonl
from pool import fingerprint
from shared.command import RunError, exit_code_of
from shared.run_table import append_row, read

COLUMNS = (
    *("method", "pool", "budget", "shards", "concave", "seconds", "cpu_seconds", "peak_bytes"),
    *("counting_seconds", "choosing_seconds", "gain", "largest_possible_gain", "evaluations"),
    *("same_as_naive", "kept"),
)
KEY = COLUMNS[:5]
SIZES = (10_000, 100_000, 1_000_000)
SEED_UTTERANCES = 140  # as many labelled ones as SNIPS has with 20 of an intent
MEMBERS, INTENTS = 4, 7
_MAX_TRIES = 50

Row = dict[str, Any]


def recombine(utterances: Sequence[Utterance], count: int, seed: int) -> Iterator[str]:
    """Yield `count` different texts: utterances with slot values of others.

    Raises:
        ValueError: the utterances have too few values.
    """
    rng = random.Random(seed)
    values: dict[str, list[str]] = defaultdict(list)
    for each in utterances:
        for slot in each.slots:
            values[slot.name].append(each.text[slot.start : slot.end])
    seen: set[int] = set()
    for _ in range(count * _MAX_TRIES):
        if len(seen) == count:
            return
        pattern = rng.choice(utterances)
        text, end = "", 0
        for slot in pattern.slots:
            text += pattern.text[end : slot.start] + rng.choice(values[slot.name])
            end = slot.end
        text += pattern.text[end:]
        if hash(text) not in seen:
            seen.add(hash(text))
            yield text
    if len(seen) < count:
        raise ValueError(f"--labelled: gives {len(seen):,} texts: must give {count:,}; give more")


def make_pool(utterances: Sequence[Utterance], size: int, folder: Path) -> Path:
    """Write a pool of a size, with predictions of a committee that guesses, if it is not there."""
    path = folder / f"{size}.arrow"
    if not path.exists():
        texts = list(tqdm(recombine(utterances, size, size), f"pool of {size:,}", total=size))
        write_pool(path, batches_of(texts, 10_000))
        intents = [f"intent{number}" for number in range(INTENTS)]
        for name, batches in (
            ("predictions", batches_of(texts, 10_000)),
            ("held-out", [texts[:700]]),
        ):
            found = _guesses(batches, name == "held-out")
            committee.write_predictions(folder / f"{size}-{name}.arrow", found, intents)
    return path


def _guesses(batches: Any, has_labels: bool) -> Iterator[committee.Batch]:
    rng = np.random.default_rng(0)
    for texts in batches:
        guessed = rng.dirichlet(np.full(INTENTS, 0.1), (MEMBERS, len(texts))).astype(np.float32)
        columns = {"fingerprint": np.array([fingerprint(text) for text in texts], np.uint64)}
        if has_labels:
            columns["label"] = guessed.mean(axis=0).argmax(axis=-1)
        yield committee.Batch(guessed, columns)


# --- a run, in its own process ------------------------------------------------------------------


def _settings(run: Row, folder: Path) -> select_pool.Settings:
    method, size = run["method"], run["pool"]
    return select_pool.Settings(
        method="submodular" if method in ("greedy", "greedi", "naive") else method,
        labelled=folder / "seed.jsonl",
        pool=folder / f"{size}.arrow",
        budget=run["budget"],
        concave=run["concave"] or "log",
        shards=run["shards"] or 1,
        predictions=folder / f"{size}-predictions.arrow",
        held_out=folder / f"{size}-held-out.arrow",
        rate=1.0,
    )


def _select(run: Row, folder: Path) -> Row:
    with tempfile.TemporaryDirectory() as out:
        record = select_pool.select(_settings(run, folder), Path(out))
    seconds = record.get("seconds", {})
    return {
        "counting_seconds": seconds.get("counting", ""),
        "choosing_seconds": seconds.get("choosing", ""),
        **{name: record.get(name, "") for name in ("gain", "largest_possible_gain", "evaluations")},
    }


def _prepare(run: Row, folder: Path) -> Row:
    settings = pool_prepare.Settings(
        pool=[folder / f"{run['pool']}.arrow"], labelled=folder / "seed.jsonl"
    )
    with tempfile.TemporaryDirectory(dir=folder) as out:
        return {"kept": pool_prepare.prepare(settings, Path(out))["kept"]}


def _naive(run: Row, folder: Path) -> Row:
    """Choose with and without laziness, and compare; the time is that of the naive choice."""
    from ngrams import count_ngrams
    from submodular import greedy

    settings = _settings(run, folder)
    labelled = [each.text for each in read_jsonl(settings.labelled)]
    features = count_ngrams(labelled, read_batches(settings.pool))
    start = np.asarray(features.labelled.sum(axis=0)).ravel().astype(np.int64)
    lazy = greedy(features.pool, start, settings.budget, settings.concave)
    began = time.monotonic()
    naive = naive_greedy(features.pool, start, settings.budget, settings.concave)
    seconds = time.monotonic() - began
    same = (lazy.indices == naive.indices).all() and (lazy.gains == naive.gains).all()
    return {
        "choosing_seconds": seconds,
        "gain": float(naive.gains.sum()),
        "evaluations": naive.num_evaluations,
        "same_as_naive": bool(same),
    }


def _import_alone(run: Row, folder: Path) -> Row:
    import datasets  # noqa: F401  (the others import it)

    return {}


WORK: dict[str, Callable[[Row, Path], Row]] = {
    "none": _import_alone,
    "prepare": _prepare,
    "random": _select,
    "committee": _select,
    "greedy": _select,
    "greedi": _select,
    "naive": _naive,
}


def measure(run: Row, folder: Path) -> Row:
    """Do a run in this process, and return its row."""
    began, cpu = time.monotonic(), time.process_time()
    found = WORK[run["method"]](run, folder)
    row = dict.fromkeys(COLUMNS, "") | run | found
    row["seconds"], row["cpu_seconds"] = time.monotonic() - began, time.process_time() - cpu
    row["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {name: round(each, 3) if isinstance(each, float) else each for name, each in row.items()}


# --- all runs -----------------------------------------------------------------------------------


def plan(sizes: Sequence[int]) -> list[Row]:
    """Return the runs: what distinguishes each, KEY."""
    runs = [{"method": "none", "pool": 0, "budget": 0}]
    for size in sizes:
        tenth = size // 10
        runs.append({"method": "prepare", "pool": size, "budget": 0})
        runs += [
            {"method": method, "pool": size, "budget": tenth} for method in ("random", "committee")
        ]
        for budget in (tenth, min(10_000, tenth), min(1000, tenth)):
            runs.append({"method": "greedy", "pool": size, "budget": budget, "concave": "log"})
        for shards in (4, 16) if size < sizes[-1] else (4,):
            given = {"budget": tenth, "shards": shards, "concave": "log"}
            runs.append({"method": "greedi", "pool": size} | given)
    runs.append({"method": "greedy", "pool": sizes[0], "budget": sizes[0] // 10, "concave": "sqrt"})
    smallest = {"method": "naive", "pool": sizes[0], "budget": sizes[0] // 10}
    runs += [smallest | {"concave": concave} for concave in ("log", "sqrt")]
    unique = {tuple(str(run.get(name, "")) for name in KEY): run for run in runs}
    return [dict.fromkeys(KEY, "") | run for run in unique.values()]


def _do(run: Row, folder: Path) -> Row:
    command = [sys.executable, __file__, "--pools", str(folder), "--run", json.dumps(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{run} failed:\n{done.stderr[-2000:]}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def run_all(labelled: Path, sizes: Sequence[int], pools: Path, out: Path) -> None:
    """Do the runs that have no row yet, one after the other.

    Raises:
        ValueError: the labelled set cannot be read, or is too small.
    """
    utterances = read_jsonl(labelled / "train.jsonl")
    for folder in (pools, out):
        folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    write_jsonl(pools / "seed.jsonl", rng.sample(utterances, min(SEED_UTTERANCES, len(utterances))))
    path = out / "rows.csv"
    done = {tuple(row[name] for name in KEY) for row in read(path, COLUMNS)}
    runs = plan(sizes)
    runs = [run for run in runs if tuple(str(run[name]) for name in KEY) not in done]
    for run in tqdm(runs, "runs"):
        if run["pool"]:
            make_pool(utterances, run["pool"], pools)
        append_row(path, _do(run, pools), COLUMNS)


def _label(row: dict[str, str]) -> str:
    if row["method"] == "greedi":
        return f"GreeDi, {row['shards']} shards"
    if row["method"] == "greedy":
        is_tenth = row["budget"] == row["pool"][:-1]
        return "lazy greedy" + ("" if is_tenth else f", {int(row['budget']):,} chosen")
    return row["method"]


def draw(path: Path, out: Path) -> None:
    """Draw time and peak memory over the pool's size; a tenth of it is chosen where not said."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with path.open(newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["method"] not in ("none", "naive") and row["concave"] != "sqrt"
        ]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    lines: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: int(row["pool"])):
        lines[_label(row)].append(row)
    for axis, column, scale in ((axes[0], "seconds", 1.0), (axes[1], "peak_bytes", 2.0**30)):
        for label, points in lines.items():
            values = [float(row[column]) / scale for row in points]
            axis.plot([int(row["pool"]) for row in points], values, marker="o", label=label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("utterances of the pool")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[1].set_ylabel("peak memory of the process, GiB")
    axes[0].legend(fontsize="small")
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--labelled", type=Path, help="a folder of labelled.py")
    parser.add_argument("--out", type=Path, help="where the rows and the plot are written")
    parser.add_argument(
        "--pools", type=Path, default=Path("runs/nlu_ssl/pools"), help="made there (%(default)s)"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--run", help=argparse.SUPPRESS)

    def program() -> None:
        args = parser.parse_args()
        if args.run is not None:
            print(json.dumps(measure(json.loads(args.run), args.pools)))
            return
        if args.labelled is None or args.out is None:
            raise ValueError("--labelled and --out: must be given; see --help")
        run_all(args.labelled, args.sizes, args.pools, args.out)
        draw(args.out / "rows.csv", args.out / "growth.svg")

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
