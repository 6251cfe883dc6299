"""examples/rl_countdown: the check of answers, the split, the plan, and a run through TRL."""

import dataclasses
import itertools
import random
import re
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "rl_countdown"
sys.path.append(str(EXAMPLE))

import countdown  # noqa: E402  (the example's files import each other by name)
import rl_plot  # noqa: E402
import rl_results  # noqa: E402
from countdown import Problem, Split, is_correct  # noqa: E402
from rl_results import DECIDING_SEEDS, RATES, Results, Run  # noqa: E402

PROBLEM = Problem((2, 3, 12), 13)


# --- the check ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    ["12+3-2", "3+12-2", "12-2+3", "3-2+12", "12+(3-2)", "12-(2-3)", "((3)-(2))+12", "(12+3-2)"],
)
def test_right_answers(answer: str) -> None:
    assert is_correct(answer, PROBLEM)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "13",  # the target itself
        "12+3",  # the target is missed
        "12+2-3",
        "12+3+2",
        "12+3-2+0",  # a number that is not given
        "12+1",
        "10+3",
        "12+3-2+2-2",  # a number twice
        "12+3-2-3+3",
        "15-2",  # numbers left out
        "1+2+12-2",  # a digit of a number
        "32-12-7",  # digits put together
        "-2+12+3",  # a sign
        "+12+3-2",
        "12+3+-2",
        "12-(-3)-2",
        "12--3-2",
        "12+(+3)-2",
        "012+3-2",  # leading zeros
        "12+03-2",
        "12+3-2-00",
        "12 + 3 - 2",  # spaces
        "12+3-2 ",
        "12+3-2\n",
        "\n12+3-2",
        "\t12+3-2",
        "(12+3-2",
        "12+3-2)",
        "12+(3)(-2)",
        "(12)(3)-2",
        "()",
        "12+3-",
        "(12+3-2)*1",
        "12*3-23",
        "(12+3-2)/1",  # division, by zero too
        "12+3-2/0",
        "12+3-2//1",
        "12+3-2%7",
        "12+3-2**1",  # powers
        "9**9**9**9",
        "12+3-2#",
        "12+3-2;1",
        "12+3-2,",
        "12.0+3-2",
        "12e0+3-2",
        "0xC+3-2",
        "0b1100+3-2",
        "1_2+3-2",
        "12+3-2==13",
        "12+3-2if 1else 0",
        "12+3-True-True",
        "~(-13)+3-2-1",
        "x:=12+3-2",
        "__import__('os').system('true')",
        "len('13')",
        "\u0661\u0662+3-2",  # digits of other scripts
        "12+\uff13-2",
        "12+\u00b3-2",
        "12+3\u22122",  # another minus
        "12\uff0b3-2",  # another plus
        "12+3-2\x00",
        "(" * 20_000 + "12+3-2" + ")" * 20_000,  # what the parser cannot take
        "(" * 14 + "12+3-2" + ")" * 14,  # more than 32 characters
        "1" * 10_000,
    ],
)
def test_wrong_answers(answer: str) -> None:
    assert not is_correct(answer, PROBLEM)


def test_a_number_that_is_given_twice_is_used_twice() -> None:
    problem = Problem((4, 4, 9), 9)
    assert is_correct("4-4+9", problem) and is_correct("9-(4-4)", problem)
    assert not is_correct("9", problem) and not is_correct("9-4+4-4+4", problem)


def test_a_boolean_is_no_number() -> None:
    """The parser has True as a constant, which is an int."""
    with pytest.raises(countdown._Wrong):
        countdown._evaluate(countdown.ast.parse("True", mode="eval").body, [])


# --- the problems -------------------------------------------------------------------------------


def test_problems_are_those_that_an_enumeration_finds() -> None:
    found = set()
    for numbers in itertools.combinations_with_replacement(range(1, countdown.MAX_NUMBER + 1), 3):
        for a, b, c in itertools.permutations(numbers):
            for first, second in itertools.product((1, -1), repeat=2):
                # (a ? b) ? c, and a ? (b ? c)
                values = (a + first * b + second * c, a + first * (b + second * c))
                found |= {Problem(numbers, value) for value in values if value >= 1}
    assert set(countdown.all_problems()) == found


def test_every_listed_answer_is_right() -> None:
    for problem in countdown.all_problems():
        texts = countdown.answers(problem.numbers)[problem.target]
        assert texts and all(is_correct(text, problem) for text in texts)
        assert max(map(len, texts)) <= countdown.MAX_ANSWER_CHARS


def test_a_prompt_has_the_numbers_in_any_order() -> None:
    assert PROBLEM.prompt() == "2 3 12=13:"
    prompts = {PROBLEM.prompt(random.Random(seed)) for seed in range(50)}
    assert len(prompts) == 6 and "12 3 2=13:" in prompts


def test_held_out_problems_are_never_trained_on() -> None:
    split = countdown.split_problems(1000, 500)
    assert (len(split.taught), len(split.held_out)) == (1000, 500)
    assert len(split.train) == len(countdown.all_problems()) - 500
    assert set(split.taught) <= set(split.train)
    assert not set(split.train) & set(split.held_out)
    assert countdown.split_problems(1000, 500) == split
    # The texts, too: every order of every problem's numbers.
    trained = {
        f"{' '.join(map(str, order))}={each.target}:"
        for each in split.train
        for order in itertools.permutations(each.numbers)
    }
    assert not [each for each in split.held_out if each.prompt() in trained]


def test_a_problem_on_both_sides_is_found() -> None:
    reordered = Problem((12, 2, 3), 13)
    with pytest.raises(ValueError, match="trained on, too"):
        countdown.check_apart(Split([], [reordered], [PROBLEM]))
    with pytest.raises(ValueError, match="trained on, too"):
        countdown.check_apart(Split([reordered], [], [PROBLEM]))
    countdown.check_apart(Split([], [Problem((2, 3, 12), 17)], [PROBLEM]))


def test_more_problems_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="ask for fewer"):
        countdown.split_problems(6000, 400)


# --- the plan and the files ---------------------------------------------------------------------


def done(accuracy_of) -> Results:
    results: Results = {}
    while (run := rl_results.next_run(results)) is not None:
        assert run not in results
        results[run] = accuracy_of(run)
    return results


def accuracy_of(run: Run) -> float:
    best = {"AdamS": 5e-4, "AdamW": 2.5e-4}[run.optimizer]
    return 0.5 * min(run.lr, best) / max(run.lr, best) + 0.01 * run.seed


def test_the_sweep_is_equal_and_comes_first() -> None:
    results = done(accuracy_of)
    runs = list(results)
    sweep = [run for run in runs if run.seed == rl_results.SWEEP_SEED]
    assert runs[: len(sweep)] == sweep
    assert len(RATES["AdamS"]) == len(RATES["AdamW"])
    for name, rates in RATES.items():
        assert sorted(run.lr for run in sweep if run.optimizer == name) == sorted(rates)
    assert [(run.optimizer, run.seed) for run in runs[len(sweep) :]] == [
        (name, seed) for seed in DECIDING_SEEDS for name in RATES
    ]
    assert rl_results.SWEEP_SEED not in DECIDING_SEEDS
    for name in RATES:
        swept = {run.lr: results[run] for run in sweep if run.optimizer == name}
        best = max(swept, key=lambda lr: swept[lr])
        assert {run.lr for run in runs[len(sweep) :] if run.optimizer == name} == {best}


def test_only_the_deciding_seeds_are_compared() -> None:
    best = {name: rates[1] for name, rates in RATES.items()}

    def accuracy(run: Run) -> float:
        if run.lr != best[run.optimizer]:
            return 0.1
        return 0.9 if run.seed == rl_results.SWEEP_SEED else 0.5 + (run.optimizer == "AdamS") / 8

    comparison = rl_results.compare(done(accuracy))
    assert comparison is not None
    assert comparison.adams == [0.625] * 3 and comparison.adamw == [0.5] * 3
    assert comparison.differences == [0.125] * 3
    assert rl_results.compare({}) is None


def row(run: Run, held_out: float) -> dict[str, object]:
    given = {"optimizer": run.optimizer, "lr": run.lr, "seed": run.seed, "held_out": held_out}
    return dict.fromkeys(rl_results.COLUMNS, 1) | given


def test_a_row_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    first, second = Run("AdamS", 5e-4, 0), Run("AdamW", 5e-4, 0)
    rl_results.append_row(path, row(first, 0.25))
    with path.open("a") as file:
        file.write("AdamW,0.0005,0,0.5")  # what a kill in the middle of a line leaves
    assert rl_results.results_of(rl_results.read_rows(path)) == {first: 0.25}
    rl_results.append_row(path, row(second, 0.5))
    assert rl_results.results_of(rl_results.read_rows(path)) == {first: 0.25, second: 0.5}
    path.write_text("optimizer,lr\nAdamS,1\n")
    with pytest.raises(ValueError, match="give another --out"):
        rl_results.read_rows(path)


def test_a_study_with_other_settings_does_not_go_on(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    rl_results.keep_settings(path, {"grpo_steps": 4})
    rl_results.keep_settings(path, {"grpo_steps": 4})
    with pytest.raises(ValueError, match="give another --out"):
        rl_results.keep_settings(path, {"grpo_steps": 5})


def write(folder: Path, results: Results) -> str:
    """Write the files of a study with these results, and return its summary."""
    curve = {"steps": [1, 2], "reward": [0, 0.5], "held_out_steps": [0, 2], "held_out": [0, 1]}
    for run, held_out in results.items():
        rl_results.append_row(folder / "runs.csv", row(run, held_out))
        rl_results.append_curves(folder / "curves.jsonl", dataclasses.asdict(run) | curve)
    rl_plot.write(folder)
    assert (folder / "rl_countdown.png").read_bytes().startswith(b"\x89PNG")
    return (folder / "summary.md").read_text()


def test_the_summary_has_means_and_differences(tmp_path: Path) -> None:
    best = {name: rates[1] for name, rates in RATES.items()}
    accuracy = {"AdamS": [0.5, 0.6, 0.7], "AdamW": [0.4, 0.6, 0.5]}
    results = done(
        lambda run: (
            accuracy[run.optimizer][run.seed - 1]
            if run.seed != rl_results.SWEEP_SEED
            else float(run.lr == best[run.optimizer])
        )
    )
    text = write(tmp_path, results)
    assert "60.0 (sd 10.0)" in text and "50.0 (sd 10.0)" in text
    assert "+10.0, +0.0, +20.0 points; the mean is +10.0." in text


def test_a_study_without_a_sweep_has_a_summary(tmp_path: Path) -> None:
    """The short study has one run with each optimizer; after the first there is one row."""
    runs = [Run(name, 1e-4, DECIDING_SEEDS[0]) for name in RATES]
    assert "| AdamS | - | 0.0001 | 1: 50.0 |" in write(tmp_path, {runs[0]: 0.5})
    assert "AdamS minus AdamW, seed by seed: +25.0 points" in write(tmp_path, {runs[1]: 0.25})


def test_the_readme_states_the_plan_that_the_code_runs() -> None:
    text = (EXAMPLE / "README.md").read_text("utf-8")
    for name, rates in RATES.items():
        [cell] = re.findall(rf"^\| rates of {name} \| (.*) \|$", text, re.MULTILINE)
        assert tuple(map(float, cell.split(", "))) == rates
    seeds = f"{', '.join(map(str, DECIDING_SEEDS[:-1]))} and {DECIDING_SEEDS[-1]}"
    assert f"seeds {seeds} decide" in text


def test_the_results_are_those_of_the_plan() -> None:
    folder = EXAMPLE / "results"
    rows = rl_results.read_rows(folder / "runs.csv")
    done: Results = {}
    for run, held_out in rl_results.results_of(rows).items():
        assert run == rl_results.next_run(done)
        done[run] = held_out
    assert done and len(done) == len(rows)
    assert set(rl_results.read_curves(folder / "curves.jsonl")) == set(done)
    assert (folder / "summary.md").read_text() == rl_plot.summary(rows)


# --- the model and the trainers -----------------------------------------------------------------


def test_the_tokenizer_has_every_text() -> None:
    policy = pytest.importorskip("policy", reason="needs transformers and tokenizers")
    tokenizer = policy.make_tokenizer()
    texts = [
        each.prompt() + countdown.answers(each.numbers)[each.target][0]
        for each in countdown.all_problems()
    ]
    tokens = tokenizer(texts)["input_ids"]
    assert [len(each) for each in tokens] == [len(text) for text in texts]
    assert tokenizer.batch_decode(tokens) == texts


def test_a_study_goes_on_and_both_optimizers_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="needs TRL: pip install 'megatron-adams[rl]'")
    import post_training
    import rl_study
    import torch

    # This model solves nothing, so that no answer would differ from another one.
    monkeypatch.setattr(post_training, "is_correct", lambda answer, problem: len(answer) % 2 == 0)
    built = []
    for name, kind in post_training.OPTIMIZERS.items():

        def build(*args: object, name: str = name, kind: type = kind, **kwargs: object) -> object:
            built.append((name, kwargs["lr"], kind(*args, **kwargs)))
            return built[-1][2]

        monkeypatch.setitem(post_training.OPTIMIZERS, name, build)
    runs = [Run("AdamS", 1e-2, 0), Run("AdamW", 1e-2, 1)]
    scratch = tmp_path / "scratch"
    rl_study.study(rl_study.TINY, rl_study.plan_of(runs[:1]), tmp_path, scratch)
    [first] = rl_results.read_rows(tmp_path / "runs.csv")
    rl_study.study(rl_study.TINY, rl_study.plan_of(runs), tmp_path, scratch)
    rows = rl_results.read_rows(tmp_path / "runs.csv")
    assert rows[0] == first and list(rl_results.results_of(rows)) == runs
    assert [(name, lr) for name, lr, _ in built] == [(run.optimizer, run.lr) for run in runs]
    taught = rl_study.LlamaForCausalLM.from_pretrained(scratch / "taught").state_dict()
    for name, _, optimizer in built:
        names = {"AdamS": {"exp_avg"}, "AdamW": {"exp_avg", "exp_avg_sq"}}[name]
        params = optimizer.param_groups[0]["params"]
        assert len(params) == len([*taught])
        for param, old in zip(params, taught.values(), strict=True):
            state = {key for key, value in optimizer.state[param].items() if value.numel() > 1}
            assert state == names
            assert not torch.equal(param, old)
    for curves in rl_results.read_curves(tmp_path / "curves.jsonl").values():
        assert curves["steps"] == [1, 2] and all(0 < each < 1 for each in curves["reward"])
        assert curves["held_out_steps"] == [0, 1, 2]


def test_a_reward_is_one_for_a_right_answer_alone() -> None:
    pytest.importorskip("trl", reason="needs TRL: pip install 'megatron-adams[rl]'")
    import post_training

    rewards = post_training.reward(
        ["2 3 12=13:"] * 3, ["12+3-2", "12+3+2", "12+3-2:"], [[2, 3, 12]] * 3, [13] * 3
    )
    assert rewards == [1.0, 0.0, 0.0]
