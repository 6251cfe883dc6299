"""Select utterances of a pool for semi-supervised learning.

    select_pool.py --method submodular --labelled train.jsonl --pool pool/pool.arrow \\
        --budget 20000 --out selected
    select_pool.py --method committee --labelled train.jsonl --pool pool/pool.arrow \\
        --predictions pool.npz --held-out validation.npz --budget 20000 --out selected

Outputs, in --out: selection.jsonl, {"text", "rank", "score"} a line, from rank 0 on, and
selection.json: what was counted, f's value or the thresholds, and times. `score` is what the
utterance added to f (submodular), its measure (committee), or the number from 0 to 1 that was drawn
for it (random)."""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from committee import MEASURES, RATE, Measured, Threshold, choose_threshold, measure_file
from ngrams import MAX_ORDER, MIN_COUNT, Features, count_ngrams
from numpy.typing import NDArray
from pool_files import read_batches
from submodular import (
    CONCAVE,
    Selection,
    certain_share,
    expected_share,
    greedi,
    greedy,
    mass_of,
    upper_bound,
    value,
)
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

from labelled import read_jsonl
from pool import Forbidden, Line, fingerprint
from shared.command import exit_code_of

METHODS = ("random", "submodular", "committee")
ORDERS = ("random", "certain", "uncertain")


@dataclass(frozen=True)
class Settings:
    """What is asked for; see --help.

    Attributes:
        order: which of the utterances that the committee admits are taken.
    """

    method: str
    labelled: Path
    pool: Path
    budget: int
    seed: int = 0
    forbid: list[Path] = field(default_factory=list)
    concave: str = "log"
    max_order: int = MAX_ORDER
    min_count: int = MIN_COUNT
    shards: int = 1
    workers: int = 1
    predictions: Path | None = None
    held_out: Path | None = None
    rate: float = RATE
    measure: str = "entropy"
    order: str = "random"
    progress: bool = False


@dataclass(frozen=True)
class Chosen:
    """Rows of the pool by rank, their scores, and what is said of the choice."""

    indices: NDArray[np.int64]
    scores: NDArray[np.float64]
    record: dict[str, Any]


def _count(settings: Settings) -> int:
    """Count the pool's utterances, which also finds labels and lines that are none."""
    num = 0
    with tqdm(desc="counting", unit="utt", disable=not settings.progress) as bar:
        for texts in read_batches(settings.pool):
            num += len(texts)
            bar.update(len(texts))
    if not num:
        raise ValueError(f"{settings.pool}: the pool is empty: must have utterances; give another")
    if not 1 <= settings.budget <= num:
        raise ValueError(
            f"--budget {settings.budget:,}: must be from 1 to the pool's {num:,} utterances; lower "
            "it, or give a larger pool"
        )
    return num


def choose_randomly(num: int, budget: int, seed: int) -> Chosen:
    """Draw a number for each utterance, and choose those with the lowest."""
    draws = np.random.default_rng(seed).random(num)
    indices = np.argsort(draws, kind="stable")[:budget]
    return Chosen(indices, draws[indices], {})


def choose_submodular(settings: Settings, num: int) -> Chosen:
    """Count n-grams, and choose greedily from the labelled utterances on."""
    labelled = [each.text for each in read_jsonl(settings.labelled)]
    began = time.monotonic()
    with tqdm(total=num, desc="n-grams", unit="utt", disable=not settings.progress) as bar:

        def counted() -> Any:
            for texts in read_batches(settings.pool):
                yield texts
                bar.update(len(texts))

        features = count_ngrams(
            labelled, counted(), max_order=settings.max_order, min_count=settings.min_count
        )
    if not sum(features.num_ngrams):
        what = f"--min-count {settings.min_count}: no n-gram occurs so often"
        raise ValueError(f"{what} in the labelled set and the pool; lower it")
    counted_s = time.monotonic() - began
    return _choose_by(settings, features, counted_s)


def _choose_by(settings: Settings, features: Features, counted_s: float) -> Chosen:
    start = mass_of(features.labelled, np.arange(features.labelled.shape[0]))
    began = time.monotonic()
    budget, concave = settings.budget, settings.concave
    more: dict[str, Any] = {}
    if settings.shards == 1:
        found = greedy(features.pool, start, budget, concave, progress=settings.progress)
    else:
        rounds = greedi(
            features.pool,
            start,
            budget,
            concave,
            shards=settings.shards,
            seed=settings.seed,
            workers=settings.workers,
            progress=settings.progress,
        )
        found = rounds.selection
        more = {
            "shard_gains": rounds.shard_gains,
            "union_gain": rounds.union_gain,
            "union_candidates": rounds.num_candidates,
            "expected_share": expected_share(settings.shards),
        }
    chosen_s = time.monotonic() - began
    record = _record_of(settings, features, start, found) | more
    return Chosen(
        found.indices,
        found.gains,
        record | {"seconds": {"counting": counted_s, "choosing": chosen_s}},
    )


def _record_of(
    settings: Settings, features: Features, start: NDArray[np.int64], found: Selection
) -> dict[str, Any]:
    whole = start + mass_of(features.pool, found.indices)
    before, after = value(start, settings.concave), value(whole, settings.concave)
    most = upper_bound(features.pool, start, found.indices, settings.budget, settings.concave)
    return {
        "ngrams": features.num_ngrams,
        "dropped_ngrams": features.num_dropped,
        "f_labelled": before,
        "f": after,
        "gain": after - before,
        "largest_possible_gain": most,
        "share_of_it": (after - before) / most if most else 1.0,
        "certain_share": certain_share(settings.shards, settings.budget),
        "evaluations": found.num_evaluations,
    }


def _check_same(measured: Measured, settings: Settings, num: int) -> None:
    """Refuse predictions that are not of the pool's utterances, one by one."""

    def refuse(what: str) -> ValueError:
        rule = "must have the pool's utterances in the pool's order"
        return ValueError(f"{settings.predictions}: {what}: {rule}; predict this pool again")

    if len(measured.marks) != num:
        raise refuse(f"has {len(measured.marks):,} utterances, {settings.pool} has {num:,}")
    place = 0
    for texts in read_batches(settings.pool):
        marks = np.array([fingerprint(text) for text in texts], np.uint64)
        differ = np.flatnonzero(marks != measured.marks[place : place + len(texts)])
        if len(differ):
            raise refuse(f"utterance {place + int(differ[0])} is another one than the pool's")
        place += len(texts)


def _thresholds(held_out: Measured, settings: Settings) -> dict[str, Threshold]:
    source = str(settings.held_out)
    if held_out.wrong is None:
        rule = "must have labels, as a threshold is chosen by them"
        raise ValueError(f"{source}: has no column 'label': {rule}; write it with labels")
    found = {
        "intents": choose_threshold(
            held_out.intents, held_out.wrong, rate=settings.rate, source=f"{source}, intents"
        )
    }
    if held_out.slots is not None:
        if held_out.slot_wrong is None or held_out.slot_tokens is None:
            rule = "must have them, as a threshold is chosen by them"
            raise ValueError(f"{source}: has slots without labels: {rule}; write it with tags")
        found["slots"] = choose_threshold(
            held_out.slots,
            held_out.slot_wrong,
            held_out.slot_tokens,
            rate=settings.rate,
            source=f"{source}, slots",
        )
    return found


def _check_alike(pool: Measured, held_out: Measured, settings: Settings) -> None:
    for name, mine, theirs in (
        ("members", pool.members, held_out.members),
        ("intents", pool.names, held_out.names),
        ("slots", pool.slots is not None, held_out.slots is not None),
    ):
        if mine != theirs:
            what = f"{settings.predictions} has {name} {mine}, {settings.held_out} {theirs}"
            raise ValueError(f"{what}: must be equal; predict both with the same members")


def choose_by_committee(settings: Settings, num: int) -> Chosen:
    """Admit utterances up to a threshold of the committee's measure, and choose among them."""
    if settings.predictions is None or settings.held_out is None:
        raise ValueError("--method committee: needs --predictions and --held-out; give both")
    began = time.monotonic()
    held_out = measure_file(settings.held_out, settings.measure)
    thresholds = _thresholds(held_out, settings)
    pool = measure_file(settings.predictions, settings.measure)
    _check_alike(pool, held_out, settings)
    _check_same(pool, settings, num)
    admitted = pool.intents <= thresholds["intents"].value
    if pool.slots is not None:
        admitted &= pool.slots <= thresholds["slots"].value
    rows = np.flatnonzero(admitted)
    if len(rows) < settings.budget:
        raise ValueError(
            f"--budget {settings.budget:,}: the committee admits {len(rows):,} of "
            f"{len(admitted):,} utterances at --rate {settings.rate:g}; lower --budget to that, or "
            "raise --rate"
        )
    indices = _ordered(rows, pool, settings)[: settings.budget]
    record = {
        "members": pool.members,
        "admitted": len(rows),
        "thresholds": {name: asdict(each) for name, each in thresholds.items()},
        "seconds": {"choosing": time.monotonic() - began},
    }
    return Chosen(indices, _score(pool)[indices], record)


def _score(pool: Measured) -> NDArray[np.float64]:
    return pool.intents if pool.slots is None else pool.intents + pool.slots


def _ordered(rows: NDArray[np.int64], pool: Measured, settings: Settings) -> NDArray[np.int64]:
    if settings.order == "random":
        return np.random.default_rng(settings.seed).permutation(rows)
    scores = _score(pool)[rows]
    return rows[np.argsort(scores if settings.order == "certain" else -scores, kind="stable")]


def choose(settings: Settings) -> Chosen:
    """Choose by the method that is asked for.

    Raises:
        ValueError: the pool, the budget or what a method needs is not right.
    """
    num = _count(settings)
    if settings.method == "random":
        found = choose_randomly(num, settings.budget, settings.seed)
    elif settings.method == "submodular":
        found = choose_submodular(settings, num)
    else:
        found = choose_by_committee(settings, num)
    found.record["pool"] = num
    return found


def _texts(settings: Settings, indices: NDArray[np.int64]) -> list[str]:
    """Return some of the pool's texts; the others are read past."""
    wanted = np.sort(indices)
    found: dict[int, str] = {}
    place = 0
    for texts in read_batches(settings.pool):
        part = wanted[np.searchsorted(wanted, place) : np.searchsorted(wanted, place + len(texts))]
        found.update((int(index), texts[index - place]) for index in part)
        place += len(texts)
    return [found[int(index)] for index in indices]


def select(settings: Settings, out: Path) -> dict[str, Any]:
    """Select, write what was selected, and return what selection.json says.

    Raises:
        ValueError: see `choose`; or a chosen utterance is in a set of --forbid.
    """
    began = time.monotonic()
    chosen = choose(settings)
    texts = _texts(settings, chosen.indices)
    forbidden = Forbidden.read(settings.forbid)
    for text, index in zip(texts, chosen.indices, strict=True):
        forbidden.check([Line(text, settings.pool, int(index) + 1)])
    record = {
        **{name: _plain(each) for name, each in asdict(settings).items() if name != "progress"},
        "labelled_utterances": len(read_jsonl(settings.labelled)),
        "words_per_utterance": sum(len(text.split()) for text in texts) / len(texts),
        **chosen.record,
        "seconds_in_all": time.monotonic() - began,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    _write(out, texts, chosen, record)
    return record


def _plain(each: Any) -> Any:
    """Return a setting as JSON has it; a file is its name."""
    if isinstance(each, list):
        return [_plain(item) for item in each]
    return each.name if isinstance(each, Path) else each


def _write(out: Path, texts: Sequence[str], chosen: Chosen, record: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / "selection.unfinished"
    with unfinished.open("w", encoding="utf-8") as file:
        for rank, (text, score) in enumerate(zip(texts, chosen.scores, strict=True)):
            entry = {"text": text, "rank": rank, "score": float(score)}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    (out / "selection.json").write_text(json.dumps(record, indent=2) + "\n")
    unfinished.rename(out / "selection.jsonl")


def _say(record: dict[str, Any]) -> None:
    print(f"{record['budget']:,} of {record['pool']:,} utterances, {record['method']}")
    if record["method"] == "submodular":
        print(
            f"f rises from {record['f_labelled']:.1f} to {record['f']:.1f}, by at least "
            f"{record['share_of_it']:.3f} of what any {record['budget']:,} utterances can add; "
            f"certain was {record['certain_share']:.3f}"
        )
    for name, each in record.get("thresholds", {}).items():
        print(
            f"{name}: {record['measure']} up to {each['value']:.4g}, with "
            f"{each['rate']:.3f} wrong among {each['admitted']:,} of {each['held_out']:,} held-out "
            f"utterances"
        )


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    made.add_argument("--method", choices=METHODS, required=True)
    made.add_argument("--labelled", type=Path, required=True, help="jsonl of labelled.py")
    made.add_argument("--pool", type=Path, required=True, help="of pool_prepare.py, or JSON lines")
    made.add_argument("--budget", type=int, required=True, help="utterances to select")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--seed", type=int, default=0, help="of draws and shards (%(default)s)")
    made.add_argument(
        "--forbid", type=Path, nargs="+", default=[], help="sets that no utterance may be in"
    )
    submodular = made.add_argument_group("submodular")
    submodular.add_argument("--concave", choices=list(CONCAVE), default="log")
    submodular.add_argument("--max-order", type=int, default=MAX_ORDER, help="(%(default)s)")
    submodular.add_argument(
        "--min-count", type=int, default=MIN_COUNT, help="of an n-gram (%(default)s)"
    )
    submodular.add_argument(
        "--shards", type=int, default=1, help="choose in two rounds (GreeDi) (%(default)s)"
    )
    submodular.add_argument(
        "--workers", type=int, default=1, help="processes for the shards (%(default)s)"
    )
    committee = made.add_argument_group("committee")
    committee.add_argument("--predictions", type=Path, help="for the pool, of committee.py")
    committee.add_argument("--held-out", type=Path, help="for labelled utterances, with labels")
    committee.add_argument(
        "--rate", type=float, default=RATE, help="of mis-annotation (%(default)s)"
    )
    committee.add_argument("--measure", choices=MEASURES, default="entropy")
    committee.add_argument(
        "--order",
        choices=ORDERS,
        default="random",
        help="which of the admitted utterances are taken (%(default)s)",
    )
    return made


def main() -> int:
    """Select from the command line."""

    def program() -> None:
        args = vars(parser().parse_args())
        out = args.pop("out")
        _say(select(Settings(**args, progress=True), out))

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
