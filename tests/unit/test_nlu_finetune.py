"""examples/nlu_teacher: fine-tuning, the exported models, and their answers.

Two forked processes do the work, in nlu_cases.py: Megatron and a process group stay out of pytest's
own process.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.forked import run_forked

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nlu_teacher"
sys.path.append(str(EXAMPLE))

for package in ("num2words", "tokenizers", "transformers", "safetensors"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'megatron-adams[nlu]'")
import finetune_nlu  # noqa: E402  (the example's files import each other by name)
from finetune_rows import METRICS  # noqa: E402
from labels import Tagged  # noqa: E402


def run_case(name: str, folder: Path) -> Any:
    root = str(Path(__file__).resolve().parents[2])
    run_forked(
        f"import sys; sys.path.insert(0, {root!r})\n"
        f"from pathlib import Path\nfrom tests.unit import nlu_cases\n"
        f"nlu_cases.{name}(Path({str(folder)!r}))",
        OMP_NUM_THREADS="1",
        HF_HOME=str(folder / "huggingface"),  # where it copies an export's code to
        HF_HUB_OFFLINE="1",
    )
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_case("run", tmp_path_factory.mktemp("nlu"))


# --- fine-tuning --------------------------------------------------------------------------------


def test_a_study_learns_and_goes_on_where_it_was_stopped(found: Any) -> None:
    out_of_time, one_seed, two_seeds, nothing_left, other_settings = found["study"]["codes"]
    assert (out_of_time, one_seed, two_seeds, nothing_left, other_settings) == (3, 0, 0, 0, 2)
    rows = found["study"]["rows"]
    assert [(row["optimizer"], row["seed"]) for row in rows] == [
        ("adams", "0"),
        ("adamw", "0"),
        ("adams", "1"),
        ("adamw", "1"),
    ]
    assert found["study"]["again"]
    # Half of the utterances have either intent, and no slot is right by chance.
    assert all(float(row["frame_error"]) < 0.3 for row in rows)
    assert {row["num_train"] for row in rows} == {"16"}


def test_adams_has_half_of_adamws_state(found: Any) -> None:
    state = {row["optimizer"]: int(row["state_bytes"]) for row in found["study"]["rows"]}
    num_params = int(found["study"]["rows"][0]["num_params"])
    assert state == {"adams": 4 * num_params, "adamw": 8 * num_params}


def test_a_run_is_the_same_whatever_was_run_before_it(found: Any) -> None:
    alone = found["study"]["alone"]
    (row,) = (
        row for row in found["study"]["rows"] if (row["optimizer"], row["seed"]) == ("adamw", "1")
    )
    for name in ("train_loss", "validation_score", "best_step", *METRICS):
        assert float(row[name]) == alone[name], name


def test_a_saved_model_gives_the_answers_that_were_written(found: Any) -> None:
    assert found["study"]["same"] == {"test": True, "more": True}


def test_the_loss_is_that_of_the_words_alone(found: Any) -> None:
    assert found["loss"]["mine"] == pytest.approx(found["loss"]["oracle"], rel=1e-6)


def test_training_ends_early_where_nothing_becomes_better(found: Any) -> None:
    slow = found["stops"]["slow"]
    assert (slow["best_step"], slow["steps"]) == (5, 15)


def test_the_weights_of_the_best_evaluation_are_kept(found: Any) -> None:
    assert found["stops"]["best"] == {"is_first": True, "is_last": False}


def test_a_loss_that_is_no_number_is_the_worst_score(found: Any) -> None:
    diverged = found["stops"]["diverged"]
    assert diverged["validation_score"] == float("inf") and diverged["frame_error"] == ""


def test_an_utterance_longer_than_the_encoder_is_refused_with_its_line(found: Any) -> None:
    message = found["long_utterance"]
    assert "test.jsonl:1: " in message and "the encoder reads 32 at most" in message


def tagged(intent: str, number: int) -> Tagged:
    return Tagged((str(number),), ("O",), intent)


def test_a_few_shot_subset_has_as_many_of_each_intent() -> None:
    pool = [tagged(intent, i) for intent, n in (("a", 50), ("b", 9)) for i in range(n)]
    first, again, other = (finetune_nlu.few_shot(pool, 7, subset) for subset in (0, 0, 1))
    assert first == again != other
    for chosen in (first, other):
        assert len(set(chosen)) == 14
        assert [sum(each.intent == name for each in chosen) for name in "ab"] == [7, 7]
    assert finetune_nlu.few_shot(pool, 0, 0) == pool
    with pytest.raises(ValueError, match="10 shots: intent 'b' has only 9 utterances"):
        finetune_nlu.few_shot(pool, 10, 0)
    fewer = finetune_nlu.few_shot(pool, 10, 0, or_fewer=True)
    assert [sum(each.intent == name for each in fewer) for name in "ab"] == [10, 9]


def test_each_pass_has_every_utterance_once() -> None:
    drawn = finetune_nlu.batches(10, 4, seed=0)
    passes = [[next(drawn) for _ in range(3)] for _ in range(2)]
    for each in passes:
        assert sorted(itertools.chain(*each)) == list(range(10)) and list(map(len, each)) == [
            4,
            4,
            2,
        ]
    assert passes[0] != passes[1]


def test_the_rate_rises_and_falls() -> None:
    rates = [finetune_nlu.learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and rates[99] > 0
    assert finetune_nlu.learning_rate(0, 1, 2.0) == 2.0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "--model or --random: must be given"),
        ("--random S", "S: must be NAME=PATH"),
        ("--random S=x --model S=y", "each must have a name of its own"),
        ("--random S=x --shots -1", "--shots and --validation-shots"),
        ("--random S=x --rates 0", "--rates 0.0: must be over 0"),
        ("--random S=x --seeds 0", "must be 1 or more"),
        ("--random S=x --patience 0", "--patience 0: must be 1 or more"),
        ("--random S=x --dropout 1", "--dropout 1.0: must be in"),
        ("--random S=x", "train.jsonl: no such file"),
    ],
)
def test_arguments_that_give_no_study_are_refused(
    flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*flags.split(), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert finetune_nlu.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and not (tmp_path / "out").exists()


# --- export -------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["learned_absolute", "rope"])
def test_transformers_computes_megatrons_logits(found: Any, position: str) -> None:
    compared = found["transformers_difference"][position]
    # Learned positions give the same bits here; the logits differ between utterances.
    assert compared["difference"] < 1e-4 and compared["spread"] > 1e-3


def test_an_encoder_that_transformers_has_not_is_refused(found: Any) -> None:
    refused = found["transformers_difference"]["refused"]
    assert "bias_activation_fusion=True: must be False" in refused


@pytest.mark.full
def test_the_exported_models_answer_as_megatron_does(tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'megatron-adams[nlu]'")
    exported = run_case("export_whole", tmp_path)
    assert exported.pop("intolerant") == 2
    assert exported.pop("auto") < 1e-4
    for each in exported.values():
        assert each["code"] == 0 and each["record"]["utterances"] == 12
        for name in ("transformers", "onnx"):
            assert each["record"][f"largest_difference_{name}"] < 1e-4
        assert each["answers"]["onnx"] == each["answers"]["transformers"]
        answer, nothing, too_long = each["answers"]["onnx"]
        intent, words = each["megatron"]
        assert answer["intent"] == intent
        assert {slot["name"]: slot["value"] for slot in answer["slots"]} == words
        assert "must have a word" in nothing["error"] and "line 3" in nothing["error"]
        assert "reads 32 at most" in too_long["error"] and "line 4" in too_long["error"]
        # With learned positions, transformers has an embedding of types beside, all zero.
        assert 0 <= each["speed"]["parameters"] - each["parameters"] <= 32
        assert 0 < each["speed"]["median_ms"] <= each["speed"]["p95_ms"]
