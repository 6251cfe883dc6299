"""Select utterances on which a committee of models is sure enough, or not quite.

A committee is K models that were trained on other seeds or subsets. Of each utterance it has

    entropy        of the members' averaged prediction, sum -p log p
    vote_entropy   of the shares of the members' votes (Engelson and Dagan 1996)
    kl             the mean Kullback-Leibler divergence of the members' predictions from their
                   average (McCallum and Nigam 1998)

in nats. The entropy is large where the members are unsure and where they disagree; the other two
only where they disagree. An utterance is admitted if its measure is at most a threshold, chosen on
labelled held-out utterances at a given rate of mis-annotation: the share of wrong labels that the
averaged prediction would give to those it admits. Source: arXiv:2103.15871.

Slots are measured at each token, and aggregated to the utterance; both thresholds then hold.

A committee's predictions are a file, so that any model can be a member: `Predict` and
`PredictSlots` say what it must do, and `write_predictions` writes the file. It is an .npz, or an
.arrow for predictions that do not fit into memory, with

    probabilities   (members, utterances, intents) float32; in Arrow, a row of members x intents
    fingerprint     (utterances,) uint64, of pool.py: which utterance this is
    intents         the names; in Arrow, in the schema's metadata, as is the number of members
    slot_entropy, slot_vote_entropy, slot_kl   (utterances,) float32, where members tag slots
    label           (utterances,) int64, a place in intents; of held-out utterances
    slot_wrong, slot_tokens   (utterances,) int64; of held-out utterances with slots
"""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pool_files import ArrowWriter
from scipy.special import entr, rel_entr

sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

from pool import fingerprint

MEASURES = ("entropy", "vote_entropy", "kl")
AGGREGATES = ("mean", "max")
RATE = 0.2
"""The paper's example of an acceptable rate of mis-annotation."""

_SUM_TOLERANCE = 1e-3

Probabilities = NDArray[np.floating[Any]]


class Predict(Protocol):
    """A member's answer about intents."""

    def __call__(self, texts: Sequence[str], /) -> Probabilities:
        """Return how likely each intent is, (texts, intents) float32; a row sums to 1."""


class PredictSlots(Protocol):
    """A member's answer about slots."""

    def __call__(self, texts: Sequence[str], /) -> Sequence[Probabilities]:
        """Return for each text how likely each tag is, (tokens, tags) float32.

        All members have the same tokens and tags.
        """


@dataclass(frozen=True)
class Labels:
    """The right answers to held-out utterances.

    Attributes:
        intents: the name of each utterance's intent.
        tags: for each utterance, (tokens,) places in the members' tags; None without slots.
    """

    intents: Sequence[str]
    tags: Sequence[NDArray[np.int64]] | None = None


# --- measures -----------------------------------------------------------------------------------


def check_probabilities(probabilities: Probabilities, source: str) -> None:
    """Refuse what is no distribution over the last axis.

    Args:
        probabilities: (members, utterances, ...).
    Raises:
        ValueError: a value is NaN or negative, or a sum is not 1; the first one is named.
    """
    wrong = ~(probabilities >= 0)
    if not wrong.any():
        wrong = np.abs(probabilities.sum(axis=-1, keepdims=True) - 1) > _SUM_TOLERANCE
    if wrong.any():
        member, utterance = np.argwhere(wrong)[0][:2]
        row = np.array2string(probabilities[member, utterance].ravel(), threshold=8, precision=3)
        raise ValueError(
            f"{source}: member {member} predicts {row} for utterance {utterance}: confidences must "
            "be numbers from 0 that sum to 1, not NaN; train this member again, with a lower rate "
            "if it diverged"
        )


def measures(probabilities: Probabilities) -> dict[str, NDArray[np.float64]]:
    """Return MEASURES of a committee's predictions, in nats.

    Args:
        probabilities: (members, n, classes).
    Returns:
        (n,) float64 each. A member whose best classes tie votes for the first of them.
    """
    exact = probabilities.astype(np.float64)
    exact /= exact.sum(axis=-1, keepdims=True)
    mean = exact.mean(axis=0)
    votes = exact.argmax(axis=-1)[..., None] == np.arange(exact.shape[-1])
    return {
        "entropy": entr(mean).sum(axis=-1),
        "vote_entropy": entr(votes.mean(axis=0)).sum(axis=-1),
        "kl": rel_entr(exact, mean).sum(axis=-1).mean(axis=0),
    }


def token_measures(
    members: Sequence[Sequence[Probabilities]], aggregate: str = "mean"
) -> dict[str, NDArray[np.float64]]:
    """Return MEASURES of tokens, aggregated to their utterances.

    Args:
        members: for each member and utterance, (tokens, tags).
        aggregate: "mean" or "max" over an utterance's tokens.
    Returns:
        (utterances,) float64 each; 0 for an utterance without a token.
    Raises:
        ValueError: members have other numbers of tokens or tags, or see `check_probabilities`.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate={aggregate!r}: must be one of {', '.join(AGGREGATES)}")
    found = {name: np.zeros(len(members[0])) for name in MEASURES}
    for place, answers in enumerate(zip(*members, strict=True)):
        shapes = {answer.shape for answer in answers}
        if len(shapes) > 1:
            what = f"utterance {place}: members have {sorted(shapes)} tokens and tags"
            raise ValueError(f"{what}: must be equal; use one tokenizer and one set of labels")
        if len(answers[0]):
            stacked = np.stack(answers)
            check_probabilities(stacked[:, None], f"slots of utterance {place}")
            for name, values in measures(stacked).items():
                found[name][place] = values.mean() if aggregate == "mean" else values.max()
    return found


# --- files --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Predictions for some utterances, as a file has them.

    Attributes:
        probabilities: (members, utterances, intents) float32.
        columns: the other arrays, (utterances,) each.
    """

    probabilities: NDArray[np.float32]
    columns: dict[str, NDArray[Any]]


def _answers(members: Sequence[Predict], texts: Sequence[str], intents: int) -> Batch:
    answers = [np.asarray(member(texts), np.float32) for member in members]
    for number, answer in enumerate(answers):
        if answer.shape != (len(texts), intents):
            what = f"member {number} returns {answer.shape} for {len(texts)} utterances"
            rule = f"must be ({len(texts)}, {intents})"
            raise ValueError(f"{what}: {rule}; train all members with the same labels")
    marks = np.array([fingerprint(text) for text in texts], np.uint64)
    return Batch(np.stack(answers), {"fingerprint": marks})


def _intent_labels(labels: Labels, intents: Sequence[str], part: slice) -> NDArray[np.int64]:
    names = labels.intents[part]
    if unknown := sorted(set(names) - set(intents)):
        what = f"held-out utterances have the intents {', '.join(unknown)}"
        raise ValueError(f"{what}: must be among the members' {len(intents)}; leave them out")
    return np.array([intents.index(name) for name in names], np.int64)


def _slot_columns(
    answers: Sequence[Sequence[Probabilities]],
    tags: Sequence[NDArray[np.int64]] | None,
    aggregate: str,
) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {
        f"slot_{name}": values.astype(np.float32)
        for name, values in token_measures(answers, aggregate).items()
    }
    if tags is not None:
        guessed = [np.mean(each, axis=0).argmax(axis=-1) for each in zip(*answers, strict=True)]
        for place, (mine, theirs) in enumerate(zip(guessed, tags, strict=True)):
            if mine.shape != theirs.shape:
                what = f"held-out utterance {place} has {len(theirs)} tags"
                raise ValueError(f"{what}: must be one for each of {len(mine)} tokens")
        pairs = list(zip(guessed, tags, strict=True))
        found["slot_wrong"] = np.array([int((a != b).sum()) for a, b in pairs], np.int64)
        found["slot_tokens"] = np.array([len(b) for _, b in pairs], np.int64)
    return found


def predictions(
    members: Sequence[Predict],
    batches: Iterable[Sequence[str]],
    intents: Sequence[str],
    *,
    slots: Sequence[PredictSlots] = (),
    labels: Labels | None = None,
    aggregate: str = "mean",
    start: int = 0,
) -> Iterator[Batch]:
    """Ask all members about utterances, a batch at a time.

    Args:
        intents: the names of what the members' last axis counts.
        slots: members that tag slots.
        labels: of held-out utterances, in the order of the batches.
        start: where the first utterance is in its set, for messages.
    Raises:
        ValueError: there are fewer than two members, or an answer is none.
    """
    if len(members) < 2:
        raise ValueError(f"{len(members)} members: a committee must have at least two; train more")
    place = 0
    for texts in batches:
        batch = _answers(members, texts, len(intents))
        check_probabilities(batch.probabilities, f"utterances from {start + place} on")
        part = slice(place, place + len(texts))
        if labels is not None:
            batch.columns["label"] = _intent_labels(labels, intents, part)
        if slots:
            answers = [member(texts) for member in slots]
            tags = None if labels is None or labels.tags is None else labels.tags[part]
            batch.columns.update(_slot_columns(answers, tags, aggregate))
        yield batch
        place += len(texts)


def write_predictions(path: Path, batches: Iterable[Batch], intents: Sequence[str]) -> int:
    """Write what `predictions` yields, as .npz or .arrow; return how many utterances it has."""
    if path.suffix == ".arrow":
        return _write_arrow(path, batches, intents)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: must end with .npz or .arrow; give another name")
    held = list(batches)
    names = held[0].columns
    columns = {name: np.concatenate([each.columns[name] for each in held]) for name in names}
    probabilities = np.concatenate([each.probabilities for each in held], axis=1)
    np.savez(path, probabilities=probabilities, intents=np.array(intents), **columns)
    return probabilities.shape[1]


def _write_arrow(path: Path, batches: Iterable[Batch], intents: Sequence[str]) -> int:
    import pyarrow

    iterator = iter(batches)
    first = next(iterator)
    members, _, classes = first.probabilities.shape
    fields = [("probabilities", pyarrow.list_(pyarrow.float32(), members * classes))]
    fields += [(name, pyarrow.from_numpy_dtype(each.dtype)) for name, each in first.columns.items()]
    metadata = {"intents": json.dumps(list(intents)), "members": str(members)}
    with ArrowWriter(path, pyarrow.schema(fields, metadata=metadata)) as writer:
        for batch in itertools.chain([first], iterator):
            flat = np.moveaxis(batch.probabilities, 0, 1).reshape(-1)
            rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat), members * classes)
            writer.write([rows, *map(pyarrow.array, batch.columns.values())])
    return writer.num_rows


def _read_npz(path: Path) -> tuple[list[str], Iterator[Batch]]:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    probabilities, intents = arrays.pop("probabilities"), arrays.pop("intents")
    return [str(name) for name in intents], iter([Batch(probabilities, arrays)])


def _read_arrow(path: Path) -> tuple[list[str], Iterator[Batch]]:
    import pyarrow

    stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    metadata = stream.schema.metadata
    intents = json.loads(metadata[b"intents"])
    members = int(metadata[b"members"])

    def batches() -> Iterator[Batch]:
        for record in stream:
            flat = record.column("probabilities").flatten().to_numpy()
            rows = flat.reshape(record.num_rows, members, -1)
            names = [name for name in record.schema.names if name != "probabilities"]
            columns = {name: record.column(name).to_numpy() for name in names}
            yield Batch(np.moveaxis(rows, 1, 0), columns)

    return intents, batches()


@dataclass(frozen=True)
class Measured:
    """What is kept of a file of predictions: one number of a kind for each utterance.

    Attributes:
        members: how many there are.
        intents: (utterances,) float64, the measure.
        slots: the same of slots, or None.
        marks: (utterances,) uint64, their fingerprints.
        wrong: (utterances,) whether the averaged prediction is wrong; None without labels.
        slot_wrong, slot_tokens: (utterances,) wrong tokens and all; None without.
    """

    members: int
    names: tuple[str, ...]
    intents: NDArray[np.float64]
    slots: NDArray[np.float64] | None
    marks: NDArray[np.uint64]
    wrong: NDArray[np.bool_] | None
    slot_wrong: NDArray[np.int64] | None
    slot_tokens: NDArray[np.int64] | None


def measure_file(path: Path, measure: str) -> Measured:
    """Read a file of predictions and keep a measure; an Arrow file is read a batch at a time.

    Args:
        measure: one of MEASURES.
    Raises:
        ValueError: it cannot be read, or confidences in it are none.
    """
    import pyarrow

    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r}: must be one of {', '.join(MEASURES)}")
    try:
        names, batches = (_read_arrow if path.suffix == ".arrow" else _read_npz)(path)
    except (OSError, KeyError, TypeError, ValueError, pyarrow.ArrowInvalid) as exc:
        rule = "must be what committee.write_predictions writes"
        raise ValueError(f"{path}: cannot be read ({exc!r}): {rule}; write it again") from exc
    found: dict[str, list[NDArray[Any]]] = {}
    place = members = 0
    for batch in batches:
        check_probabilities(batch.probabilities, f"{path}, utterances from {place} on")
        members = len(batch.probabilities)
        found.setdefault("measure", []).append(measures(batch.probabilities)[measure])
        if "label" in batch.columns:
            answers = batch.probabilities.astype(np.float64).mean(axis=0).argmax(axis=-1)
            found.setdefault("wrong", []).append(answers != batch.columns["label"])
        for name, values in batch.columns.items():
            found.setdefault(name, []).append(values)
        place += batch.probabilities.shape[1]
    if not place:
        raise ValueError(f"{path}: has no utterance: must have some; write it again")
    whole = {name: np.concatenate(parts) for name, parts in found.items()}
    slots = whole.get(f"slot_{measure}")
    if slots is not None and np.isnan(slots).any():
        what = f"the slots' {measure} of utterance {int(np.isnan(slots).argmax())} is NaN"
        raise ValueError(f"{path}: {what}: must be a number; train the members again")
    return Measured(
        members,
        tuple(names),
        whole["measure"],
        None if slots is None else slots.astype(np.float64),
        whole["fingerprint"],
        whole.get("wrong"),
        whole.get("slot_wrong"),
        whole.get("slot_tokens"),
    )


# --- the threshold ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """Up to which measure an utterance is admitted.

    Attributes:
        rate: of mis-annotation among the admitted held-out utterances.
        admitted: how many of the held-out utterances these are.
        held_out: how many there are.
    """

    value: float
    rate: float
    admitted: int
    held_out: int


def choose_threshold(
    measured: NDArray[np.float64],
    wrong: NDArray[Any],
    total: NDArray[Any] | None = None,
    *,
    rate: float = RATE,
    source: str = "held-out set",
) -> Threshold:
    """Return the largest measure up to which the rate of mis-annotation is at most `rate`.

    Above the largest measure of a held-out utterance nothing is known, so that the threshold is
    never larger than it.

    Args:
        measured: (utterances,) of held-out utterances.
        wrong: (utterances,) wrong labels of each: 0 or 1 for intents, tokens for slots.
        total: (utterances,) labels of each; 1 if it is None.
    Raises:
        ValueError: rate is not from 0 to 1, or no threshold has it.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"--rate {rate}: must be from 0 to 1")
    order = np.argsort(measured, kind="stable")
    labels = np.ones(len(order)) if total is None else total[order]
    rates = np.cumsum(wrong[order]) / np.maximum(np.cumsum(labels), 1)
    sorted_measures = measured[order]
    # Equal measures are admitted together.
    is_last = np.append(sorted_measures[1:] != sorted_measures[:-1], True)
    possible = np.flatnonzero(is_last & (rates <= rate))
    if not len(possible):
        raise ValueError(
            f"{source}: no threshold has a mis-annotation rate of {rate:g} or less; the lowest is "
            f"{rates[is_last].min():.3f}; give a higher --rate, or better members"
        )
    last = int(possible[-1])
    return Threshold(float(sorted_measures[last]), float(rates[last]), last + 1, len(order))
