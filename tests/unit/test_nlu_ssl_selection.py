"""examples/nlu_ssl: n-grams, the submodular choice, the committee, and select_pool.py."""

import json
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nlu_ssl"
sys.path.append(str(EXAMPLE))

import committee  # noqa: E402  (the example's files import each other by name)
import ngrams  # noqa: E402
import select_pool  # noqa: E402
import submodular  # noqa: E402
from labelled import Utterance, write_jsonl  # noqa: E402
from pool import fingerprint  # noqa: E402
from spoken import spoken_form  # noqa: E402

G = {"log": math.log1p, "sqrt": math.sqrt}
CONCAVE = pytest.mark.parametrize("concave", G)

# --- n-grams ------------------------------------------------------------------------------------

TEXTS = [
    "play Thriller by Michael Jackson",
    "play thriller, play Thriller at 7:05",
    "book a table for 2 in AC/DC's bar",
    "...",
    "",
    "play",
    "a table for two, a table for two",
]


def test_words_are_those_of_the_spoken_form() -> None:
    assert [ngrams.spoken_words(text) for text in TEXTS] == [
        spoken_form(text).split() for text in TEXTS
    ]


def counted_plainly(texts: list[str], order: int) -> list[Counter[tuple[str, ...]]]:
    words = [spoken_form(text).split() for text in texts]
    return [
        Counter(tuple(each[at : at + order]) for at in range(len(each) - order + 1))
        for each in words
    ]


@pytest.mark.parametrize("min_count", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 100])
def test_ngrams_are_counted_as_plain_python_counts_them(min_count: int, size: int) -> None:
    found = ngrams.count_ngrams(
        TEXTS[:2], ngrams.batches_of(TEXTS[2:], size), max_order=3, min_count=min_count
    )
    rows: list[list[int]] = [[] for _ in TEXTS]
    nums = []
    for order in (1, 2, 3):
        counts = counted_plainly(TEXTS, order)
        kept = {key for key, num in sum(counts, Counter()).items() if num >= min_count}
        nums.append(len(kept))
        for row, each in zip(rows, counts, strict=True):
            row += [num for key, num in each.items() if key in kept]
    assert found.num_ngrams == tuple(nums)
    matrix = sparse.vstack([found.labelled, found.pool]).tocsr()
    assert [sorted(matrix[row].data.tolist()) for row in range(len(TEXTS))] == [
        sorted(row) for row in rows
    ]
    # A column is one n-gram: its sum is the number of its occurrences.
    sums = sorted(np.asarray(matrix.sum(axis=0)).ravel().tolist())
    whole = [sum(counted_plainly(TEXTS, order), Counter()) for order in (1, 2, 3)]
    assert sums == sorted(num for each in whole for num in each.values() if num >= min_count)


def test_no_ngram_crosses_utterances() -> None:
    found = ngrams.count_ngrams(["one two"], [["three one two"]], max_order=2, min_count=1)
    assert found.num_ngrams == (3, 2)  # "one two", "three one", and no "two three"


# --- the submodular choice ----------------------------------------------------------------------


def instance(seed: int, num: int = 60, features: int = 25) -> tuple[sparse.csr_matrix, Any]:
    """Utterances with counts; every fifth is equal to an earlier one, and some are empty."""
    rng = np.random.default_rng(seed)
    dense = rng.poisson(0.15, (num, features)) * rng.integers(1, 4, (num, features))
    dense[4::5] = dense[:-4:5]
    dense[7] = 0
    start = rng.integers(0, 3, features).astype(np.int64)
    return sparse.csr_matrix(dense.astype(np.int32)), start


def plain_value(dense: np.ndarray, start: np.ndarray, chosen: Any, concave: str) -> float:
    """f, as a sum over features in plain Python."""
    masses = [int(start[u]) + sum(int(dense[v][u]) for v in chosen) for u in range(dense.shape[1])]
    return math.fsum(G[concave](mass) for mass in masses)


@CONCAVE
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("block", "first"), [(4096, 32), (7, 2), (2, 1)])
def test_lazy_greedy_equals_naive_greedy(
    concave: str, seed: int, block: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submodular, "_BLOCK", block)
    monkeypatch.setattr(submodular, "_FIRST_EVALUATED", first)
    features, start = instance(seed)
    for budget in (1, 17, features.shape[0]):
        lazy = submodular.greedy(features, start, budget, concave)
        naive = submodular.naive_greedy(features, start, budget, concave)
        assert lazy.indices.tolist() == naive.indices.tolist()
        assert lazy.gains.tolist() == naive.gains.tolist()
        assert len(set(lazy.indices.tolist())) == budget


@CONCAVE
@pytest.mark.parametrize("seed", range(3))
def test_each_choice_gains_most_by_a_plain_oracle(concave: str, seed: int) -> None:
    features, start = instance(seed)
    dense = features.toarray()
    found = submodular.greedy(features, start, 20, concave)
    chosen: list[int] = []
    for index, gain in zip(found.indices.tolist(), found.gains.tolist(), strict=True):
        before = plain_value(dense, start, chosen, concave)
        gains = {
            v: plain_value(dense, start, [*chosen, v], concave) - before
            for v in range(len(dense))
            if v not in chosen
        }
        most = max(gains.values())
        # The first of those that tie; 1e-11 is above the rounding of both, and below any gap.
        assert index == min(v for v, each in gains.items() if each > most - 1e-11)
        assert gain == pytest.approx(gains[index], abs=1e-11)
        chosen.append(index)


@CONCAVE
def test_value_is_that_of_a_plain_oracle(concave: str) -> None:
    features, start = instance(3)
    chosen = np.array([3, 9, 31, 58])
    mass = start + submodular.mass_of(features, chosen)
    expected = plain_value(features.toarray(), start, chosen.tolist(), concave)
    assert submodular.value(mass, concave) == pytest.approx(expected, rel=1e-14)


@CONCAVE
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.sets(st.integers(0, 58)), st.sets(st.integers(0, 58)))
def test_value_is_monotone_and_submodular(
    concave: str, seed: int, first: set[int], more: set[int]
) -> None:
    """A further utterance adds something to a set, and no more to a larger set."""
    features, start = instance(seed)
    sets = [sorted(first), sorted(first | more)]
    small, large = (start + submodular.mass_of(features, np.array(each, int)) for each in sets)
    row = submodular.mass_of(features, np.array([59]))
    values = [submodular.value(mass, concave) for mass in (small, large)]
    more_values = [submodular.value(mass + row, concave) for mass in (small, large)]
    adds = np.subtract(more_values, values)
    assert adds[0] >= adds[1] - 1e-12
    assert adds[1] >= 0
    assert values[1] >= values[0]


@CONCAVE
def test_increments_never_grow_where_floats_cannot_tell_them_apart(concave: str) -> None:
    table = submodular._increments(concave, 1 << 20)
    steps = np.diff(table)
    assert (np.diff(steps) <= 0).all()
    assert (steps > 0).all()
    places = np.array([0, 1, 2, 77, 4096, (1 << 20) - 1])
    expected = [G[concave](m) for m in places.tolist()]
    np.testing.assert_allclose(table[places] / 2.0**44, expected, rtol=1e-9)


def test_a_logarithm_with_errors_gives_no_increment_that_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = np.log1p
    monkeypatch.setattr(np, "log1p", lambda x: exact(x) + 1e-9 * (np.arange(len(x)) % 2))
    steps = np.diff(submodular._increments("log", 1 << 16))
    assert (np.diff(steps) <= 0).all()


def test_lazy_greedy_evaluates_less() -> None:
    rng = np.random.default_rng(0)
    features = sparse.random(3000, 400, 0.01, "csr", rng=rng)
    features.data = np.ones(features.nnz, np.int32)
    start = np.zeros(400, np.int64)
    lazy = submodular.greedy(features.astype(np.int32), start, 60)
    naive = submodular.naive_greedy(features.astype(np.int32), start, 60)
    assert lazy.indices.tolist() == naive.indices.tolist()
    assert naive.num_evaluations == 60 * 3000
    assert lazy.num_evaluations < naive.num_evaluations / 5


@CONCAVE
def test_no_choice_is_above_the_upper_bound(concave: str) -> None:
    from itertools import combinations

    features, start = instance(5, num=12, features=9)
    dense = features.toarray()
    found = submodular.greedy(features, start, 3, concave)
    before = plain_value(dense, start, (), concave)
    best = max(
        plain_value(dense, start, each, concave) - before for each in combinations(range(12), 3)
    )
    bound = submodular.upper_bound(features, start, found.indices, 3, concave)
    assert found.gains.sum() <= best + 1e-12 <= bound + 2e-12
    assert found.gains.sum() >= (1 - 1 / math.e) * best
    everything = submodular.greedy(features, start, 12, concave)
    bound = submodular.upper_bound(features, start, everything.indices, 12, concave)
    assert bound == pytest.approx(everything.gains.sum(), abs=1e-11)  # nothing is left to add


@CONCAVE
@pytest.mark.parametrize("shards", [1, 2, 5, 30])
def test_two_rounds_stay_above_their_bound(concave: str, shards: int) -> None:
    features, start = instance(2)
    for budget in (1, 10, 45):
        whole = submodular.greedy(features, start, budget, concave)
        rounds = submodular.greedi(features, start, budget, concave, shards=shards, seed=1)
        chosen = rounds.selection.indices
        assert len(set(chosen.tolist())) == budget
        dense = features.toarray()
        gain = plain_value(dense, start, chosen.tolist(), concave)
        gain -= plain_value(dense, start, (), concave)
        assert gain == pytest.approx(rounds.selection.gains.sum(), abs=1e-9)
        share = submodular.certain_share(shards, budget)
        most = submodular.upper_bound(features, start, whole.indices, budget, concave)
        assert share * whole.gains.sum() <= gain <= most + 1e-9
        assert gain >= max(rounds.shard_gains) - 1e-9
        if shards == 1:
            assert chosen.tolist() == whole.indices.tolist()


def test_a_shard_that_is_better_than_the_union_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    features, start = instance(4)
    real = submodular.greedy
    rounds = []

    def poor_second_round(rows: Any, masses: Any, budget: int, concave: str) -> Any:
        rounds.append(rows.shape[0])
        found = real(rows, masses, budget, concave)
        if len(rounds) != 4:
            return found
        return submodular.Selection(found.indices, found.gains * 0, found.num_evaluations)

    monkeypatch.setattr(submodular, "greedy", poor_second_round)
    found = submodular.greedi(features, start, 25, shards=3, seed=0)
    assert rounds[:3] == [20, 20, 20]
    assert found.union_gain == 0
    assert len(set(found.selection.indices.tolist())) == 25
    assert found.selection.gains.sum() > max(found.shard_gains)
    assert found.selection.gains[:20].sum() == pytest.approx(max(found.shard_gains))


def test_shares_that_are_certain_and_expected() -> None:
    assert submodular.certain_share(1, 10) == submodular.expected_share(1) == 1 - math.exp(-1)
    assert submodular.certain_share(4, 10) == pytest.approx((1 - math.exp(-1)) / 4)
    assert submodular.certain_share(400, 10) == pytest.approx((1 - math.exp(-1)) / 10)
    assert submodular.expected_share(7) == pytest.approx((1 - math.exp(-1)) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 61}, "budget 61: must be from 1 to the pool's 60 utterances"),
        ({"budget": 0}, "budget 0: must be from 1"),
        ({"concave": "cube"}, "concave='cube': must be one of log, sqrt"),
        ({"shards": 61}, "shards=61: must be from 1 to the pool's 60"),
    ],
)
def test_what_the_submodular_choice_refuses(change: dict[str, Any], message: str) -> None:
    features, start = instance(0)
    with pytest.raises(ValueError, match=message):
        submodular.greedi(features, start, **({"budget": 5, "shards": 2} | change))


def test_an_utterance_that_could_overflow_is_refused() -> None:
    features = sparse.csr_matrix(np.array([[1], [1 << 18]], np.int32))
    with pytest.raises(ValueError, match=r"utterance 1 has 262,144 n-grams: must be below"):
        submodular.greedy(features, np.zeros(1, np.int64), 1)


# --- the committee ------------------------------------------------------------------------------


def some_predictions(members: int = 3, num: int = 20, classes: int = 4) -> np.ndarray:
    rng = np.random.default_rng(7)
    found = rng.dirichlet(np.full(classes, 0.3), (members, num)).astype(np.float32)
    found[:, 0] = np.eye(classes)[1]  # sure, and agreed
    found[0, 1], found[1:, 1] = np.eye(classes)[0], np.eye(classes)[2]  # sure, and not agreed
    found[:, 2] = 1 / classes  # unsure, and agreed
    return found


def test_measures_are_those_of_a_plain_oracle() -> None:
    probabilities = some_predictions()
    found = committee.measures(probabilities)
    members, num, classes = probabilities.shape
    for place in range(num):
        rows = [[float(x) for x in probabilities[k, place]] for k in range(members)]
        rows = [[x / math.fsum(row) for x in row] for row in rows]
        mean = [math.fsum(row[c] for row in rows) / members for c in range(classes)]
        votes = Counter(row.index(max(row)) for row in rows)
        expected = {
            "entropy": -math.fsum(p * math.log(p) for p in mean if p),
            "vote_entropy": -math.fsum(n / members * math.log(n / members) for n in votes.values()),
            "kl": math.fsum(
                p * math.log(p / q) for row in rows for p, q in zip(row, mean, strict=True) if p
            )
            / members,
        }
        for name, each in expected.items():
            assert found[name][place] == pytest.approx(each, abs=1e-12), (name, place)
    assert found["entropy"][0] == found["vote_entropy"][0] == found["kl"][0] == 0
    assert found["kl"][1] == pytest.approx(found["entropy"][1])
    assert found["entropy"][2] == pytest.approx(math.log(classes))
    assert found["kl"][2] == pytest.approx(0, abs=1e-12)


def test_tokens_are_aggregated_to_their_utterance() -> None:
    probabilities = some_predictions(num=5)
    members = [[each[:2], each[2:2], each[2:]] for each in probabilities]
    whole = committee.measures(probabilities)
    for aggregate, reduce in (("mean", np.mean), ("max", np.max)):
        found = committee.token_measures(members, aggregate)
        for name, values in whole.items():
            expected = [reduce(values[:2]), 0, reduce(values[2:])]
            np.testing.assert_allclose(found[name], expected, rtol=1e-12)


def test_threshold_is_the_largest_with_the_rate() -> None:
    measured = np.array([0.1, 0.5, 0.2, 0.4, 0.3, 0.6])
    wrong = np.array([0, 0, 0, 1, 0, 1])  # at 0.4 and at 0.6
    # Rates from the smallest measure on: 0, 0, 0, 1/4, 1/5, 2/6
    found = committee.choose_threshold(measured, wrong, rate=0.2)
    assert (found.value, found.rate, found.admitted, found.held_out) == (0.5, 0.2, 5, 6)
    assert committee.choose_threshold(measured, wrong, rate=0.19).value == 0.3
    assert committee.choose_threshold(measured, wrong, rate=0.5).value == 0.6


def test_equal_measures_are_admitted_together() -> None:
    measured, wrong = np.array([0.1, 0.2, 0.2, 0.2]), np.array([0, 0, 0, 1])
    assert committee.choose_threshold(measured, wrong, rate=0.2).value == 0.1
    assert committee.choose_threshold(measured, wrong, rate=0.25).value == 0.2


def test_threshold_of_slots_counts_tokens() -> None:
    measured = np.array([0.1, 0.2, 0.3])
    wrong, tokens = np.array([0, 2, 2]), np.array([8, 2, 2])  # rates 0, 2/10, 4/12
    found = committee.choose_threshold(measured, wrong, tokens, rate=0.2)
    assert (found.value, found.admitted) == (0.2, 2)


def test_a_rate_that_no_threshold_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no threshold has .* 0.2 or less; the lowest is 0.500"):
        committee.choose_threshold(np.array([0.1, 0.2]), np.array([1, 0]), rate=0.2)
    with pytest.raises(ValueError, match=r"--rate 20: must be from 0 to 1"):
        committee.choose_threshold(np.array([0.1]), np.array([0]), rate=20)


class Model:
    """A member that answers from a seed and a text."""

    def __init__(self, seed: int, classes: int = 3) -> None:
        self.seed, self.classes = seed, classes

    def _rng(self, text: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, fingerprint(text)])

    def __call__(self, texts: Any) -> np.ndarray:
        rows = [self._rng(text).dirichlet(np.full(self.classes, 0.2)) for text in texts]
        return np.array(rows, np.float32)

    def slots(self, texts: Any) -> list[np.ndarray]:
        return [
            self._rng(text).dirichlet(np.full(5, 0.2), len(text.split())).astype(np.float32)
            for text in texts
        ]


POOL = [f"play song number {number}" for number in range(40)]
HELD_OUT = [f"stop list {number}" for number in range(30)]
INTENTS = ("a", "b", "c")
MEMBERS = tuple(Model(seed) for seed in range(3))


def write_committee(
    path: Path, texts: list[str], *, has_labels: bool, has_slots: bool = True, size: int = 7
) -> None:
    mean = np.mean([member(texts) for member in MEMBERS], axis=0)
    tags = [
        np.mean(each, axis=0).argmax(-1)
        for each in zip(*[m.slots(texts) for m in MEMBERS], strict=True)
    ]
    for each in tags[::4]:
        each[:] = (each + 1) % 5
    names = [INTENTS[(row.argmax() + (at % 5 == 0)) % 3] for at, row in enumerate(mean)]
    labels = committee.Labels(names, tags if has_slots else None) if has_labels else None
    found = committee.predictions(
        MEMBERS,
        ngrams.batches_of(texts, size),
        INTENTS,
        slots=[member.slots for member in MEMBERS] if has_slots else (),
        labels=labels,
    )
    assert committee.write_predictions(path, found, INTENTS) == len(texts)


def test_both_forms_of_a_file_are_read_as_they_were_written(tmp_path: Path) -> None:
    for suffix, size in ((".npz", 7), (".arrow", 7), (".npz", 100)):
        path = tmp_path / f"held{size}{suffix}"
        write_committee(path, HELD_OUT, has_labels=True, size=size)
        found = committee.measure_file(path, "kl")
        stacked = np.stack([member(HELD_OUT) for member in MEMBERS])
        np.testing.assert_array_equal(found.intents, committee.measures(stacked)["kl"])
        slots = committee.token_measures([member.slots(HELD_OUT) for member in MEMBERS])["kl"]
        np.testing.assert_allclose(found.slots, slots, rtol=1e-6)
        assert found.marks.tolist() == [fingerprint(text) for text in HELD_OUT]
        assert (found.members, found.names) == (3, INTENTS)
        assert found.wrong.tolist() == [at % 5 == 0 for at in range(30)]
        assert found.slot_wrong.tolist() == [3 * (at % 4 == 0) for at in range(30)]
        assert found.slot_tokens.tolist() == [3] * 30


@pytest.mark.parametrize("bad", [math.nan, -0.5, 2.0])
def test_confidences_that_are_none_are_refused(bad: float, tmp_path: Path) -> None:
    broken = some_predictions()
    broken[1, 4, 2] = bad
    with pytest.raises(ValueError, match=r"here: member 1 predicts .* for utterance 4.*not NaN"):
        committee.check_probabilities(broken, "here")
    marks = np.zeros(20, np.uint64)
    np.savez(
        tmp_path / "p.npz", probabilities=broken, intents=np.array(["a"] * 4), fingerprint=marks
    )
    with pytest.raises(ValueError, match="member 1 predicts"):
        committee.measure_file(tmp_path / "p.npz", "entropy")


def test_members_that_do_not_fit_are_refused() -> None:
    def run(**changes: Any) -> None:
        given = {"members": MEMBERS, "batches": [POOL], "intents": INTENTS} | changes
        list(committee.predictions(**given))

    with pytest.raises(ValueError, match="1 members: a committee must have at least two"):
        run(members=MEMBERS[:1])
    with pytest.raises(ValueError, match=r"member 1 returns \(40, 4\) .* must be \(40, 3\)"):
        run(members=(Model(0), Model(1, 4)))
    with pytest.raises(ValueError, match="intents d: must be among the members' 3"):
        run(labels=committee.Labels(["a"] * 39 + ["d"]))
    slots = [Model(0).slots, lambda texts: [each[:2] for each in Model(1).slots(texts)]]
    with pytest.raises(ValueError, match=r"utterance 0: members have .* tokens and tags"):
        run(slots=slots)
    tags = [np.zeros(4, np.int64)] * 39 + [np.zeros(5, np.int64)]
    slots = [member.slots for member in MEMBERS]
    with pytest.raises(ValueError, match="utterance 39 has 5 tags: must be one for each of 4"):
        run(slots=slots, labels=committee.Labels(["a"] * 40, tags))


def test_a_member_that_says_no_numbers_is_refused_while_it_predicts() -> None:
    def broken(texts: Any) -> np.ndarray:
        return MEMBERS[0](texts) * np.where(np.arange(len(texts)) == 2, np.nan, 1)[:, None]

    def broken_slots(texts: Any) -> list[np.ndarray]:
        return [each * (math.nan if i == 3 else 1) for i, each in enumerate(Model(1).slots(texts))]

    with pytest.raises(ValueError, match=r"from 0 on: member 1 predicts .* for utterance 2: conf"):
        list(committee.predictions([MEMBERS[0], broken], [POOL], INTENTS))
    slots = [MEMBERS[0].slots, broken_slots]
    with pytest.raises(ValueError, match="slots of utterance 3: member 1 predicts"):
        list(committee.predictions(MEMBERS, [POOL], INTENTS, slots=slots))


def test_what_is_no_file_of_predictions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    write_committee(path, POOL, has_labels=False)
    with pytest.raises(ValueError, match="measure='variance': must be one of entropy, vote_entro"):
        committee.measure_file(path, "variance")
    with pytest.raises(ValueError, match=r"p\.csv: must end with \.npz or \.arrow"):
        write_committee(tmp_path / "p.csv", POOL, has_labels=False)
    with pytest.raises(ValueError, match="aggregate='sum': must be one of mean, max"):
        committee.token_measures([], "sum")
    with np.load(path) as file:
        arrays = dict(file)
    arrays["slot_entropy"][7] = math.nan
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="the slots' entropy of utterance 7 is NaN: must be a num"):
        committee.measure_file(path, "entropy")
    nothing = {"probabilities": np.zeros((3, 0, 3), np.float32), "intents": np.array(INTENTS)}
    np.savez(path, **nothing, fingerprint=np.zeros(0, np.uint64))
    with pytest.raises(ValueError, match="has no utterance: must have some"):
        committee.measure_file(path, "entropy")


# --- select_pool.py -----------------------------------------------------------------------------


def write_pool(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def asked(tmp_path: Path) -> select_pool.Settings:
    write_jsonl(tmp_path / "train.jsonl", [Utterance("play song one", "a", ())])
    write_pool(tmp_path / "pool.jsonl", POOL)
    write_committee(tmp_path / "pool.npz", POOL, has_labels=False)
    write_committee(tmp_path / "held_out.npz", HELD_OUT, has_labels=True)
    return select_pool.Settings(
        method="submodular",
        labelled=tmp_path / "train.jsonl",
        pool=tmp_path / "pool.jsonl",
        budget=5,
        min_count=1,
        predictions=tmp_path / "pool.npz",
        held_out=tmp_path / "held_out.npz",
        rate=0.19,
    )


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "selection.jsonl").read_text().splitlines()]


def test_submodular_selection_is_written_by_rank(
    asked: select_pool.Settings, tmp_path: Path
) -> None:
    record = select_pool.select(asked, tmp_path / "out")
    features = ngrams.count_ngrams(["play song one"], [POOL], min_count=1)
    start = np.asarray(features.labelled.sum(axis=0)).ravel().astype(np.int64)
    expected = submodular.naive_greedy(features.pool, start, 5)
    assert lines_of(tmp_path / "out") == [
        {"text": POOL[index], "rank": rank, "score": gain}
        for rank, (index, gain) in enumerate(zip(expected.indices, expected.gains, strict=True))
    ]
    assert json.loads((tmp_path / "out" / "selection.json").read_text())["f"] == record["f"]
    dense = features.pool.toarray()
    chosen = expected.indices.tolist()
    assert record["f"] == pytest.approx(plain_value(dense, start, chosen, "log"), rel=1e-13)
    assert record["f_labelled"] == pytest.approx(plain_value(dense, start, (), "log"), rel=1e-13)


def test_shards_are_reported_beside_their_bound(
    asked: select_pool.Settings, tmp_path: Path
) -> None:
    whole = select_pool.select(asked, tmp_path / "whole")
    parts = select_pool.select(replace(asked, shards=4), tmp_path / "parts")
    assert len(parts["shard_gains"]) == 4
    assert parts["certain_share"] == pytest.approx((1 - math.exp(-1)) / 4)
    assert parts["certain_share"] * whole["gain"] <= parts["gain"] <= whole["largest_possible_gain"]


def test_random_selection_depends_on_the_seed_alone(
    asked: select_pool.Settings, tmp_path: Path
) -> None:
    asked = replace(asked, method="random")
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        select_pool.select(replace(asked, seed=seed), tmp_path / str(number))
        lines = lines_of(tmp_path / str(number))
        assert [line["score"] for line in lines] == sorted(line["score"] for line in lines)
        chosen.append([line["text"] for line in lines])
        assert len(set(chosen[-1])) == 5
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("order", select_pool.ORDERS)
def test_committee_selects_what_it_admits(
    asked: select_pool.Settings, tmp_path: Path, order: str
) -> None:
    record = select_pool.select(replace(asked, method="committee", order=order), tmp_path / "out")
    lines = lines_of(tmp_path / "out")
    pool = committee.measure_file(asked.predictions, "entropy")
    intents, slots = (record["thresholds"][name]["value"] for name in ("intents", "slots"))
    admitted = np.flatnonzero((pool.intents <= intents) & (pool.slots <= slots))
    assert record["admitted"] == len(admitted) < 40
    assert {line["text"] for line in lines} <= {POOL[index] for index in admitted}
    scores = [line["score"] for line in lines]
    whole = sorted((pool.intents + pool.slots)[admitted].tolist())
    if order != "random":
        assert scores == (whole[:5] if order == "certain" else whole[:-6:-1])
    for name, held in record["thresholds"].items():
        assert held["rate"] <= 0.19, name


def test_arrow_and_json_lines_give_the_same(asked: select_pool.Settings, tmp_path: Path) -> None:
    from pool_files import write_pool as write_arrow

    assert write_arrow(tmp_path / "pool.arrow", ngrams.batches_of(POOL, 7)) == 40
    write_committee(tmp_path / "pool-arrow.arrow", POOL, has_labels=False)
    arrow = {"pool": tmp_path / "pool.arrow", "predictions": tmp_path / "pool-arrow.arrow"}
    for method in select_pool.METHODS:
        given = replace(asked, method=method)
        select_pool.select(given, tmp_path / "json")
        select_pool.select(replace(given, **arrow), tmp_path / "arrow")
        assert lines_of(tmp_path / "json") == lines_of(tmp_path / "arrow")


def refusal(asked: select_pool.Settings, out: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (each caller compares the message)
        select_pool.select(asked, out)
    assert not (out / "selection.jsonl").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 41}, "--budget 41: must be from 1 to the pool's 40 utterances; lower it"),
        ({"budget": 0}, "--budget 0: must be from 1 to the pool's 40 utterances"),
        ({"min_count": 1000}, "--min-count 1000: no n-gram occurs so often"),
        ({"min_count": 0}, "min_count=0: must be at least 1"),
        ({"method": "committee", "held_out": None}, "needs --predictions and --held-out"),
        ({"method": "committee", "budget": 40}, "utterances at --rate 0.19; lower --budget"),
    ],
)
def test_what_a_selection_refuses(
    asked: select_pool.Settings, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    assert message in refusal(replace(asked, **change), tmp_path / "out")


def test_pools_that_are_none_are_refused(asked: select_pool.Settings, tmp_path: Path) -> None:
    from datasets import Dataset

    out, labels = tmp_path / "out", tmp_path / "labels.jsonl"
    labels.write_text('{"text": "play"}\n{"text": "play it", "intent": "a", "slots": []}\n')
    assert "labels.jsonl, line 2: has 'intent', 'slots': a pool with labels" in refusal(
        replace(asked, pool=labels), out
    )
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "the pool is empty" in refusal(replace(asked, pool=tmp_path / "empty.jsonl"), out)
    Dataset.from_dict({"text": ["a"], "label": [1]}).save_to_disk(tmp_path / "labelled")
    assert "has 'label': a pool with labels" in refusal(
        replace(asked, pool=tmp_path / "labelled"), out
    )
    Dataset.from_dict({"words": ["a"]}).save_to_disk(tmp_path / "nameless")
    assert "must have 'text'" in refusal(replace(asked, pool=tmp_path / "nameless"), out)
    (tmp_path / "broken.arrow").write_bytes(b"no arrow")
    assert "cannot be read" in refusal(replace(asked, pool=tmp_path / "broken.arrow"), out)


def test_predictions_that_do_not_fit_are_refused(
    asked: select_pool.Settings, tmp_path: Path
) -> None:
    asked = replace(asked, method="committee")
    other, out = tmp_path / "other.npz", tmp_path / "out"
    shuffled = [*POOL[:3], POOL[4], POOL[3], *POOL[5:]]
    write_committee(other, shuffled, has_labels=False)
    given = replace(asked, predictions=other)
    assert "utterance 3 is another one than the pool's" in refusal(given, out)
    write_committee(other, POOL[:39], has_labels=False)
    assert "has 39 utterances" in refusal(given, out)
    write_committee(other, POOL, has_labels=False, has_slots=False)
    assert "has slots False" in refusal(given, out)
    given = replace(asked, held_out=asked.predictions)
    assert "has no column 'label'" in refusal(given, out)
    with np.load(asked.held_out) as file:
        arrays = {name: file[name] for name in file.files if name != "slot_wrong"}
    np.savez(tmp_path / "untagged.npz", **arrays)
    given = replace(asked, held_out=tmp_path / "untagged.npz")
    assert "has slots without labels: must have them" in refusal(given, out)
    other.write_text("no file of numpy")
    assert "other.npz: cannot be read" in refusal(replace(asked, predictions=other), out)


def test_a_chosen_utterance_of_a_test_set_is_refused(
    asked: select_pool.Settings, tmp_path: Path
) -> None:
    write_pool(tmp_path / "test.jsonl", ["Play song number SEVEN!"])
    given = replace(asked, method="random", budget=40, forbid=[tmp_path / "test.jsonl"])
    assert "line 8: 'play song number 7' is in a validation or test set" in refusal(
        given, tmp_path / "out"
    )
