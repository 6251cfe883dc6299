"""examples/nlu_teacher/finetune_rows.py: the plan of a study, and its files."""

import json
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nlu_teacher"
sys.path.append(str(EXAMPLE))

pytest.importorskip("num2words", reason="needs num2words: pip install 'megatron-adams[nlu]'")
pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'megatron-adams[nlu]'")
import finetune_rows as rows  # noqa: E402  (the example's files import each other by name)
import join_studies  # noqa: E402
from finetune_rows import SWEEP, Plan, Run  # noqa: E402
from labels import Tagged  # noqa: E402

PLAN = Plan(("S",), ("adams", "adamw"), (1e-3, 2e-3, 4e-3), (20,), subsets=2, seeds=2)


def do_all(plan: Plan, score_of=lambda run: abs(run.lr - 2e-3)) -> list[Run]:
    scores: dict[Run, float] = {}
    while (run := plan.next_run(scores)) is not None:
        assert run not in scores
        scores[run] = score_of(run)
    return list(scores)


def row(run: Run, **more: object) -> dict:
    filled = dict.fromkeys(rows.COLUMNS, 0.5)
    names = ("model", "optimizer", "lr", "shots", "subset", "seed")
    return filled | {name: getattr(run, name) for name in names} | more


# --- the plan -----------------------------------------------------------------------------------


def test_rates_come_first_and_the_best_one_decides() -> None:
    done = do_all(PLAN)
    assert len(done) == PLAN.num_runs() == 2 * (2 * 3 + 4)
    mine = [run for run in done if run.optimizer == "adams"]
    assert [(run.lr, run.subset, run.seed) for run in mine] == [
        *((lr, place, place) for place in (SWEEP, SWEEP + 1) for lr in PLAN.rates),
        *((2e-3, subset, seed) for subset in (0, 1) for seed in (0, 1)),
    ]


def test_each_optimizer_has_its_own_best_rate() -> None:
    best = {"adams": 1e-3, "adamw": 4e-3}
    done = do_all(PLAN, lambda run: abs(run.lr - best[run.optimizer]))
    assert {(run.optimizer, run.lr) for run in done if run.subset < SWEEP} == set(best.items())


def test_deciding_runs_do_not_change_the_rate() -> None:
    """They score worse than every run of the sweep, or better; the rate stays."""
    for deciding in (9.0, -9.0):
        done = do_all(PLAN, lambda run, bad=deciding: run.lr if run.subset >= SWEEP else bad)
        assert {run.lr for run in done if run.subset < SWEEP} == {1e-3}


def test_the_mean_of_the_sweeps_chooses_the_rate() -> None:
    scores = {
        (1e-3, SWEEP): 0.1,
        (1e-3, SWEEP + 1): 0.9,
        (2e-3, SWEEP): 0.4,
        (2e-3, SWEEP + 1): 0.5,
    }
    runs = {Run("S", "adams", lr, 20, i, i): score for (lr, i), score in scores.items()}
    assert rows.best_rate(runs, ("S", "adams", 20)) == 2e-3
    # A rate whose sweep is not complete, another optimizer, and a deciding run count for nothing.
    more = {
        Run("S", "adams", 4e-3, 20, SWEEP, SWEEP): 0.0,
        Run("S", "adamw", 1e-3, 20, SWEEP + 1, SWEEP + 1): 0.0,
        Run("S", "adams", 1e-3, 20, 0, 0): 0.0,
    }
    assert rows.best_rate(runs | more, ("S", "adams", 20)) == 2e-3
    assert rows.best_rate({}, ("S", "adams", 20)) is None


def test_one_rate_needs_no_sweep() -> None:
    plan = Plan(("S", "T"), ("adams",), (1e-3,), (20, 0), subsets=1, seeds=2)
    done = do_all(plan)
    assert len(done) == plan.num_runs() == 8 and not any(run.subset >= SWEEP for run in done)


def test_a_diverged_run_is_not_the_best() -> None:
    done = do_all(PLAN, lambda run: float("inf") if run.lr < 4e-3 else 1.0)
    assert {run.lr for run in done if run.subset < SWEEP} == {4e-3}


def test_an_edge_is_told() -> None:
    table = dict.fromkeys(do_all(PLAN), 0.5)
    assert not rows.is_at_edge(table, Run("S", "adams", 2e-3, 20, 0, 0))
    assert rows.is_at_edge(table, Run("S", "adams", 1e-3, 20, 0, 0))
    assert rows.is_at_edge(table, Run("S", "adams", 4e-3, 20, 0, 0))
    assert not rows.is_at_edge({}, Run("S", "adams", 4e-3, 20, 0, 0))


# --- the files ----------------------------------------------------------------------------------


def test_rows_come_back_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    runs = [Run("S", "adams", 2e-3, 20, 0, 0), Run("S", "adamw", 1e-3, 0, 1, 1)]
    for run in runs:
        rows.append_row(path, row(run))
    path.write_bytes(path.read_bytes() + b"S,adams,0.002,2")
    assert [rows.run_of(each) for each in rows.read_rows(path)] == runs
    rows.append_row(path, row(runs[0]))
    assert len(rows.read_rows(path)) == 3
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns of this version"):
        rows.read_rows(path)


def test_the_model_that_was_kept_is_found(tmp_path: Path) -> None:
    for run, score in {
        Run("S", "adams", 1e-3, 20, SWEEP, SWEEP): 0.9,
        Run("S", "adams", 2e-3, 20, SWEEP, SWEEP): 0.3,
        Run("S", "adams", 1e-3, 20, 0, 0): 0.1,  # at a rate that is not the best any more
        Run("S", "adams", 2e-3, 20, 0, 0): 0.4,
    }.items():
        rows.append_row(tmp_path / "rows.csv", row(run, validation_score=score))
    kept = rows.kept_model(tmp_path, "S", "adams", 20)
    assert kept == tmp_path / "models" / "S-adams-0.002-20-0-0"
    with pytest.raises(ValueError, match=r"T \(adams, 20 shots\): must be one of .* S \(adams, 20"):
        rows.kept_model(tmp_path, "T", "adams", 20)


def write_study(folder: Path, model: str, **settings: object) -> Run:
    run = Run(model, "adams", 1e-3, 20, 0, 0)
    rows.append_row(folder / "rows.csv", row(run))
    rows.keep_settings(folder / "settings.json", {"max_steps": 3, f"model {model}": "x"} | settings)
    for name in ("predictions", "models"):
        (folder / name / run.name).mkdir(parents=True)
        (folder / name / run.name / "file").write_text(model)
    return run


def test_studies_of_other_models_are_joined(tmp_path: Path) -> None:
    runs = []
    for name in ("S", "T"):
        (tmp_path / name).mkdir()
        runs.append(write_study(tmp_path / name, name))
    assert join_studies.join([tmp_path / "S", tmp_path / "T"], tmp_path / "out") == 2
    assert [rows.run_of(each) for each in rows.read_rows(tmp_path / "out" / "rows.csv")] == runs
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings == {"max_steps": 3, "model S": "x", "model T": "x"}
    for run in runs:
        for name in ("predictions", "models"):
            assert (tmp_path / "out" / name / run.name / "file").read_text() == run.model
    with pytest.raises(ValueError, match="exists already"):
        join_studies.join([tmp_path / "S"], tmp_path / "out")


def test_studies_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for name in ("S", "T"):
        (tmp_path / name).mkdir()
    write_study(tmp_path / "S", "S")
    write_study(tmp_path / "T", "T", max_steps=4)
    with pytest.raises(ValueError, match=r"T: max_steps=4: must be 3"):
        join_studies.join([tmp_path / "S", tmp_path / "T"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"has the run S-adams-0.001-20-0-0, as .*S has"):
        join_studies.join([tmp_path / "S", tmp_path / "S"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"is no study of finetune_nlu\.py"):
        join_studies.join([tmp_path / "absent"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_of_runs_differ() -> None:
    runs = do_all(PLAN)
    assert len({run.name for run in runs}) == len(runs)
    assert Run("S", "adams", 1e-3, 0, 0, 1).name == "S-adams-0.001-full-0-1"


def test_other_settings_are_refused_and_further_ones_are_added(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    rows.keep_settings(path, {"dropout": 0.1, "rates": (1.0,)})
    rows.keep_settings(path, {"dropout": 0.1, "rates": [1.0], "model T": "x"})
    with pytest.raises(ValueError, match=r"model T='y': must be 'x', as in .*settings\.json; give"):
        rows.keep_settings(path, {"model T": "y"})
    with pytest.raises(ValueError, match=r"dropout=0\.2: must be 0\.1"):
        rows.keep_settings(path, {"dropout": 0.2})


def test_a_changed_model_is_run_again_and_the_others_stay(tmp_path: Path) -> None:
    def models() -> list[str]:
        return [each["model"] for each in rows.read_rows(tmp_path / "rows.csv")]

    settings = {"dropout": 0.1, "model S": "a", "model T": "b"}
    assert rows.renew(tmp_path, settings) == 0
    rows.keep_settings(tmp_path / "settings.json", settings)
    for model in "STS":
        rows.append_row(tmp_path / "rows.csv", row(Run(model, "adams", 1e-3, 20, 0, 0)))
    assert rows.renew(tmp_path, settings | {"model U": "c"}) == 0 and models() == ["S", "T", "S"]
    changed = settings | {"model S": "x"}
    assert rows.renew(tmp_path, changed) == 2 and models() == ["T"]
    rows.keep_settings(tmp_path / "settings.json", changed)  # and is taken from now on
    assert rows.renew(tmp_path, changed | {"dropout": 0.2}) == 1 and models() == []
    rows.append_row(tmp_path / "rows.csv", row(Run("S", "adams", 1e-3, 20, 0, 0)))
    assert models() == ["S"]


def test_a_changed_file_has_another_digest(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_text("1")
    first = rows.digest(paths)
    assert rows.digest(reversed(paths)) == first
    paths[1].write_text("2")
    assert rows.digest(paths) != first


def test_answers_come_back_and_those_to_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run" / "test.jsonl"
    asked = [Tagged(("play", "it"), ("O", "B-a"), "Play"), Tagged(("stop",), ("O",), "Stop")]
    answers = [Tagged(each.words, ("O",) * len(each.words), "Stop") for each in asked]
    rows.write_answers(path, answers)
    read = rows.read_answers(path, asked)
    assert [(e.words, e.tags, e.intent) for e in read] == [
        (e.words, e.tags, e.intent) for e in answers
    ]
    for others in (asked[:1], [*asked, asked[0]], asked[::-1]):
        with pytest.raises(ValueError, match="must answer the utterances of the set"):
            rows.read_answers(path, others)
