"""examples/nlu_teacher/metrics.py: against seqeval, hand-made cases, and exact intervals."""

import math
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nlu_teacher"
sys.path.append(str(EXAMPLE))

pytest.importorskip("num2words", reason="needs num2words: pip install 'megatron-adams[nlu]'")
pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'megatron-adams[nlu]'")
import metrics  # noqa: E402  (the example's files import each other by name)
from labels import Tagged  # noqa: E402
from metrics import COLUMNS, METRICS  # noqa: E402


def says(tags: str, intent: str = "Play") -> Tagged:
    each = tuple(tags.split())
    return Tagged(tuple(f"w{index}" for index in range(len(each))), each, intent)


def rates(*pairs: tuple[Tagged, Tagged]) -> dict[str, float]:
    labelled, predicted = zip(*pairs, strict=True)
    found = metrics.rates(metrics.count_all(labelled, predicted).sum(0))
    return {name: float(found[name]) for name in METRICS}


# --- the metrics --------------------------------------------------------------------------------


def random_tags(rng: random.Random, length: int) -> str:
    kinds = ["O", "B-a", "I-a", "B-b", "I-b"]
    return " ".join(rng.choices(kinds, [3, 1, 2, 1, 1], k=length))


@pytest.mark.parametrize("seed", range(3))
def test_slot_f1_is_that_of_seqeval(seed: int) -> None:
    seqeval = pytest.importorskip("seqeval.metrics", reason="needs seqeval")
    rng = random.Random(seed)
    lengths = [rng.randint(1, 9) for _ in range(200)]
    labelled, predicted = ([random_tags(rng, n) for n in lengths] for _ in range(2))
    # Half of the answers are right, so that F1 is not small.
    predicted = [rng.choice(pair) for pair in zip(labelled, predicted, strict=True)]
    found = rates(*((says(a), says(b)) for a, b in zip(labelled, predicted, strict=True)))
    expected = seqeval.f1_score([x.split() for x in labelled], [x.split() for x in predicted])
    assert found["slot_f1"] == pytest.approx(expected, abs=1e-12) and 0.4 < expected < 0.9
    assert found["slot_error"] == pytest.approx(1 - expected, abs=1e-12)


def test_without_any_slot_f1_is_zero_as_in_seqeval() -> None:
    seqeval = pytest.importorskip("seqeval.metrics", reason="needs seqeval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = seqeval.f1_score([["O"]], [["O"]])
    assert rates((says("O"), says("O")))["slot_f1"] == expected == 0


def test_a_hand_made_case() -> None:
    found = rates(
        (says("B-a I-a O B-b"), says("B-a I-a O B-b")),  # right
        (says("B-a I-a O B-b"), says("B-a O O B-b")),  # a has other words: substituted
        (says("B-a O O O"), says("O O B-b O")),  # a deleted, b inserted
        (says("O O"), says("O O", "Stop")),  # another intent
    )
    assert found == {
        "intent_error": 1 / 4,
        "slot_f1": pytest.approx(2 * 3 / (5 + 5)),
        "slot_error": pytest.approx(1 - 0.6),
        "semer": (1 + 2 + 1) / (5 + 4),
        "frame_error": 3 / 4,
    }


@pytest.mark.parametrize(
    ("labelled", "predicted", "errors"),
    [
        ([], [], 0),
        ([("a", "x")], [("a", "x")], 0),
        ([("a", "x")], [("a", "y")], 1),  # one substitution
        ([("a", "x")], [("b", "x")], 2),  # a deletion and an insertion
        ([("a", "x")], [], 1),
        ([], [("a", "x"), ("a", "y")], 2),
        ([("a", "x"), ("a", "x")], [("a", "x")], 1),  # each counts once
        ([("a", "x"), ("a", "y")], [("a", "y"), ("a", "z")], 1),
        ([("a", "x"), ("b", "y"), ("c", "z")], [("a", "q"), ("c", "z"), ("d", "y")], 3),
    ],
)
def test_semantic_errors(labelled: list, predicted: list, errors: int) -> None:
    assert metrics.semantic_errors(labelled, predicted) == errors


def test_a_frame_is_wrong_for_an_end_that_is_wrong() -> None:
    assert rates((says("B-a I-a"), says("B-a O")))["frame_error"] == 1
    assert rates((says("B-a I-a"), says("B-a I-a")))["frame_error"] == 0


def test_answers_to_other_words_are_no_answers() -> None:
    with pytest.raises(AssertionError):
        metrics.count(says("O O"), says("O"))


# --- intervals ----------------------------------------------------------------------------------


def wrong_intents(wrong: np.ndarray) -> np.ndarray:
    """Rows of COLUMNS in which nothing but the intent is counted."""
    counts = np.zeros((*wrong.shape, len(COLUMNS)))
    counts[..., COLUMNS.index("wrong_intent")] = wrong
    counts[..., COLUMNS.index("utterances")] = counts[..., COLUMNS.index("semantic_labelled")] = 1
    return counts


def test_an_interval_of_a_share_is_the_binomial_one() -> None:
    size, share = 400, 0.3
    wrong = np.arange(size) < share * size
    found = metrics.estimate([[wrong_intents(wrong)]], metrics.metric("intent_error"))
    half = 1.96 * math.sqrt(share * (1 - share) / size)
    assert found.value == pytest.approx(share)
    assert found.low == pytest.approx(share - half, abs=0.006)
    assert found.high == pytest.approx(share + half, abs=0.006)


def test_utterances_are_drawn_together_for_both_models() -> None:
    """Where two models err on the same utterances, their difference is sure, whatever is drawn."""
    wrong = np.random.default_rng(7).random(300) < 0.3
    change = metrics.relative_change(metrics.metric("intent_error"))
    same = metrics.estimate([[wrong_intents(np.stack([wrong, wrong]))]], change)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    other = wrong & (np.arange(300) % 2 == 0)
    fewer = metrics.estimate([[wrong_intents(np.stack([other, wrong]))]], change)
    assert fewer.value == pytest.approx(other.sum() / wrong.sum() - 1)
    assert fewer.low < fewer.value < fewer.high < 0


def test_subsets_are_drawn_and_their_seeds_stay_together() -> None:
    """Two subsets without and with errors: a quarter of the draws has either one twice."""
    none, all_wrong = (wrong_intents(np.full(50, wrong)) for wrong in (False, True))
    groups = [[none, none], [all_wrong, all_wrong]]
    samples = metrics.resample(groups, metrics.metric("intent_error"), rounds=4000)
    values, counts = np.unique(samples, return_counts=True)
    assert values.tolist() == [0, 0.5, 1]
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    # Were the runs drawn, and not the subsets, there would be quarters.
    mixed = metrics.resample([[none, all_wrong]] * 2, metrics.metric("intent_error"), rounds=100)
    assert np.unique(mixed).tolist() == [0.5]


def test_a_bootstrap_is_repeatable() -> None:
    counts = wrong_intents(np.arange(400) % 3 == 0)
    first, second, other = (
        metrics.estimate([[counts]], metrics.metric("intent_error"), seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == second != other
