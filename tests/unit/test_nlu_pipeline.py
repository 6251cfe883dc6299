"""examples/nlu_teacher: steps with hashes, the sizes by name, and what a model's folder refuses."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

REPO = Path(__file__).resolve().parents[2]
EXAMPLE = REPO / "examples" / "nlu_teacher"
sys.path.append(str(EXAMPLE))

import compare_optimizers  # noqa: E402  (the example's files import each other by name)
import encoder  # noqa: E402
import nlu_report  # noqa: E402
import pipeline  # noqa: E402
import run_training  # noqa: E402
import select_intents  # noqa: E402
import train_encoder  # noqa: E402
import train_student  # noqa: E402
import vocabulary  # noqa: E402
from encoder import Description, Shape  # noqa: E402
from job import Curves  # noqa: E402
from pipeline import Step, is_done, load_steps, run_step, run_steps  # noqa: E402
from prepare_text import Settings, prepare  # noqa: E402
from run_training import Training  # noqa: E402
from shared import launch  # noqa: E402
from shared.command import RunError  # noqa: E402
from shared.recipe import Recipe, number, parse_flags  # noqa: E402

from tests.unit.made_up_text import write_text  # noqa: E402

# --- steps --------------------------------------------------------------------------------------

COPY = """\
import sys
from pathlib import Path
print("copying", flush=True)
if Path(sys.argv[2]).exists():
    print("going on", flush=True)
Path(sys.argv[2]).write_text(Path(sys.argv[1]).read_text().upper())
with open(sys.argv[2] + ".ran", "a") as file:
    file.write("x")
"""


@pytest.fixture
def steps(tmp_path: Path) -> list[Step]:
    """Two steps: a file, and a copy of the copy."""
    (tmp_path / "copy_text.py").write_text(COPY)
    names = ["first", "second", "third"]
    paths = [tmp_path / name for name in names]
    paths[0].write_text("text")
    return [
        Step(
            names[i],
            ("copy_text.py", str(paths[i]), str(paths[i + 1])),
            (paths[i],),
            (paths[i + 1],),
            folder=tmp_path,
        )
        for i in range(2)
    ]


def count_runs(tmp_path: Path) -> list[int]:
    return [len((tmp_path / f"{name}.ran").read_text()) for name in ("second", "third")]


def test_nothing_is_run_twice(tmp_path: Path, steps: list[Step]) -> None:
    work = tmp_path / "work"
    assert run_steps(steps, work) == ["first", "second"]
    assert (tmp_path / "third").read_text() == "TEXT"
    assert run_steps(steps, work) == []
    assert count_runs(tmp_path) == [1, 1]
    record = json.loads((work / "steps" / "first.json").read_text())
    assert record["inputs"][str(tmp_path / "first")] == pipeline.hash_of(tmp_path / "first")
    assert "copying" in (work / "steps" / "first.log").read_text()


def test_changed_input_runs_what_depends_on_it(tmp_path: Path, steps: list[Step]) -> None:
    work = tmp_path / "work"
    run_steps(steps, work)
    (tmp_path / "first").write_text("other")
    assert run_steps(steps, work) == ["first", "second"]
    assert (tmp_path / "third").read_text() == "OTHER"
    # The same output again: the step behind is not run.
    (tmp_path / "first").write_text("Other")
    assert run_steps(steps, work) == ["first"]
    assert run_steps(steps, work, again=["second"]) == ["second"]


def test_changed_output_or_command_runs_again(tmp_path: Path, steps: list[Step]) -> None:
    work = tmp_path / "work"
    run_steps(steps, work)
    (tmp_path / "third").write_text("changed by hand")
    assert run_steps(steps, work) == ["second"]
    (tmp_path / "third").unlink()
    assert run_steps(steps, work) == ["second"]
    changed = Step("second", (*steps[1].command, "more"), steps[1].inputs, steps[1].outputs)
    assert not is_done(changed, work)


def test_stopped_step_goes_on_and_a_changed_one_begins_from_nothing(
    tmp_path: Path, steps: list[Step]
) -> None:
    work, log = tmp_path / "work", tmp_path / "work" / "steps" / "first.log"

    def went_on() -> bool:
        return "going on" in log.read_text()

    run_steps(steps, work)
    assert not went_on()
    (work / "steps" / "first.json").unlink()  # as if it had been stopped before its end
    assert run_steps(steps, work) == ["first"]
    assert went_on()
    (tmp_path / "first").write_text("other")
    (tmp_path / "other").write_text("left by a run with other inputs")
    changed = replace(steps[0], removes=(tmp_path / "other",))
    run_steps([changed], work)
    assert not went_on() and not (tmp_path / "other").exists()
    run_steps([changed], work, again=["first"])
    assert not went_on()


def test_failed_step_is_not_done(tmp_path: Path, steps: list[Step]) -> None:
    (tmp_path / "first").unlink()
    with pytest.raises(RunError, match=r"(?s)step first failed \(exit code 1\).*FileNotFoundError"):
        run_step(steps[0], tmp_path / "work", "")
    assert not is_done(steps[0], tmp_path / "work")
    (tmp_path / "first").write_text("text")
    silent = replace(steps[0], outputs=(tmp_path / "fourth",))
    with pytest.raises(RunError, match=r"has not made .*fourth"):
        run_step(silent, tmp_path / "work", "")


MEET = """\
import sys, time
from pathlib import Path
Path(sys.argv[1]).write_text("here")
for _ in range(600):
    if Path(sys.argv[2]).exists():
        break
    time.sleep(0.05)
else:
    sys.exit("nobody came")
"""


def test_steps_that_need_nothing_of_each_other_run_beside_each_other(
    tmp_path: Path,
) -> None:
    (tmp_path / "meet.py").write_text(MEET)
    a, b, c = (tmp_path / name for name in "abc")
    steps = [
        Step("a", ("meet.py", str(a), str(b)), (), (a,), folder=tmp_path),
        Step("b", ("meet.py", str(b), str(a)), (), (b,), folder=tmp_path),
        Step("c", ("meet.py", str(c), str(c)), (a, b / "part"), (c,), folder=tmp_path),
    ]
    assert pipeline.needed(steps) == {"a": set(), "b": set(), "c": {"a", "b"}}
    ran = run_steps(steps, tmp_path / "work", jobs=2)
    assert sorted(ran) == ["a", "b", "c"] and ran[-1] == "c"


def test_failed_step_ends_those_beside_it(tmp_path: Path) -> None:
    (tmp_path / "meet.py").write_text(MEET)
    (tmp_path / "fail.py").write_text("import sys; sys.exit(3)")
    a, b = tmp_path / "a", tmp_path / "b"
    steps = [
        Step("waits", ("meet.py", str(a), str(tmp_path / "nobody")), (), (a,), folder=tmp_path),
        Step("fails", ("fail.py",), (), (b,), folder=tmp_path),
        Step("after", ("meet.py", str(b), str(b)), (a,), (b,), folder=tmp_path),
    ]
    start = time.monotonic()
    with pytest.raises(RunError, match=r"step fails failed \(exit code 3\)"):
        run_steps(steps, tmp_path / "work", jobs=2)
    assert time.monotonic() - start < 20  # "waits" would take 30
    assert not any(is_done(step, tmp_path / "work") for step in steps)


def test_number_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "num_visible_gpus", lambda: 0)
    for cores, jobs in ((1, 1), (2, 2), (8, 2)):
        monkeypatch.setattr(pipeline.os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert pipeline._num_jobs(None) == jobs
    monkeypatch.setattr(pipeline, "num_visible_gpus", lambda: 1)
    assert (pipeline._num_jobs(None), pipeline._num_jobs(3)) == (1, 3)
    with pytest.raises(ValueError, match="--jobs 0: must be at least 1"):
        pipeline._num_jobs(0)


def test_hash_of_a_folder_knows_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = pipeline.hash_of(folder)
    (folder / "a").rename(folder / "b")
    second = pipeline.hash_of(folder)
    (folder / "b").write_text("2")
    assert len({first, second, pipeline.hash_of(folder), pipeline.hash_of(tmp_path / "no")}) == 4


def test_steps_of_the_pipeline_follow_each_other() -> None:
    for size in (None, "quick"):
        recipe = EXAMPLE / "recipe.toml"
        variables = {"work": Path("/nowhere"), "labelled": ["--format", "snips"], "recipe": recipe}
        found = load_steps(pipeline.STEPS, variables, size=size)
        trainings = [step for step in found if step.command[0] == "run_training.py"]
        assert trainings == [step for step in found if recipe in step.inputs]
        assert [step.name for step in found][:2] == ["public-text", "labelled"]
        labelled = found[1].command
        assert labelled[:3] == ("labelled.py", "--format", "snips")
        for step in found:
            assert not [word for word in step.command if "$" in word]
    models = {"T1", "T2", "S_via", "S_direct", "S_mlm", "S_public", "S_stage1"}
    names = {step.name for step in found}
    assert models | {f"finetune-{name}" for name in (*models, "S0")} <= names
    claims = nlu_report.read_claims(EXAMPLE / "claims.toml")
    named = {name for claim in claims for name in (claim.model, claim.baseline) if name}
    assert named == models | {"S0"}
    needs = pipeline.needed(found)
    assert needs["T2"] == {"stage2-data", "replay-data", "replay-check", "T1"}
    assert needs["finetune-S_via"] == {"select", "assistant", "S_via"}
    assert {f"finetune-{name}" for name in (*models, "S0")} == needs["join"]


def test_a_step_of_a_size_alone_and_words_with_variables(tmp_path: Path) -> None:
    (tmp_path / "steps.toml").write_text(
        'work = "some"\n[numbers]\nmore = ["--pool", "${work}/a"]\n[full]\nmore = ["--all"]\n'
        '[[step]]\nname = "x"\ncommand = ["x.py", "${more}"]\ninputs = []\noutputs = []\n'
        '[[step]]\nname = "y"\nonly = ["full"]\ncommand = ["y.py"]\ninputs = []\noutputs = []\n'
    )
    variables = {"work": Path("/w"), "given": ["a $b"]}
    (step,) = load_steps(tmp_path / "steps.toml", variables)
    assert step.command == ("x.py", "--pool", "/w/a") and step.folder == tmp_path
    steps = load_steps(tmp_path / "steps.toml", variables, size="full")
    assert [each.command for each in steps] == [("x.py", "--all"), ("y.py",)]
    assert pipeline.default_work(tmp_path / "steps.toml", "full").name == "some-full"
    # Words that the caller gives are taken as they are.
    text = (tmp_path / "steps.toml").read_text().replace("${more}", "${given}")
    (tmp_path / "steps.toml").write_text(text)
    (step,) = load_steps(tmp_path / "steps.toml", variables)
    assert step.command == ("x.py", "a $b")


@pytest.mark.full
@pytest.mark.timeout(1800)  # 36 processes that import torch
def test_all_steps_run_in_the_quick_form(tmp_path: Path) -> None:
    """All but the fetching of the text, which needs a network."""
    words = pipeline.labelled_words(None)
    variables = {"work": tmp_path, "labelled": words, "recipe": EXAMPLE / "recipe.toml"}
    fetch, *steps = load_steps(pipeline.STEPS, variables, size="quick")
    write_text(fetch.outputs[0], 300)
    assert sorted(run_steps(steps, tmp_path, jobs=2)) == sorted(step.name for step in steps)
    assert run_steps(steps, tmp_path) == []
    report = (tmp_path / "report" / "report.md").read_text()
    claims = nlu_report.read_claims(EXAMPLE / "claims.toml")
    assert all(f"| {claim.text} |" in report for claim in claims)
    for model in ("T1", "T2", "S_via", "S_direct", "S_mlm", "S_public", "S_stage1", "S0"):
        assert f"\n| {model} | " in report
    assert (tmp_path / "report" / "nlu.png").is_file()


BAD_STEPS = {
    "unset": (
        'command = ["a.py", "${no}"]\ninputs = []\noutputs = []',
        "a variable that is not set",
    ),
    "absent": (
        'command = ["a.py"]\ninputs = ["/nowhere/x"]\noutputs = []',
        "neither now nor as an output",
    ),
    "fields": ('command = ["a.py"]\ninputs = []', "it must have command, inputs, name, outputs"),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_bad_steps_are_refused_before_any_runs(tmp_path: Path, case: str) -> None:
    entry, message = BAD_STEPS[case]
    (tmp_path / "steps.toml").write_text(f'[numbers]\n[quick]\n[[step]]\nname = "x"\n{entry}\n')
    with pytest.raises(ValueError, match=message):
        load_steps(tmp_path / "steps.toml", {})


def test_repeated_and_unreadable_steps_are_refused(tmp_path: Path) -> None:
    step = '[[step]]\nname = "x"\ncommand = ["a.py"]\ninputs = []\noutputs = []\n'
    (tmp_path / "steps.toml").write_text(f"[numbers]\n[quick]\n{step}{step}")
    with pytest.raises(ValueError, match="stands there twice"):
        load_steps(tmp_path / "steps.toml", {}, size="quick")
    (tmp_path / "steps.toml").write_text("[numbers]\n")
    with pytest.raises(ValueError, match=r"it must have \[numbers\] and \[\[step\]\]"):
        load_steps(tmp_path / "steps.toml", {})
    (tmp_path / "steps.toml").write_text(f"[numbers]\n{step}")
    with pytest.raises(ValueError, match=r"it must have \[numbers\], \[full\] and \[\[step\]\]"):
        load_steps(tmp_path / "steps.toml", {}, size="full")
    with pytest.raises(ValueError, match="has no 'work': must name a folder"):
        pipeline.default_work(tmp_path / "steps.toml", None)


def test_labelled_corpus_is_named(tmp_path: Path) -> None:
    assert pipeline.labelled_words(None)[:2] == ["--format", "home-assistant"]
    words = pipeline.labelled_words(f"snips={tmp_path}")
    assert words == ["--format", "snips", "--source", str(tmp_path)]
    for bad in ("snips", f"other={tmp_path}", "snips=/nowhere"):
        with pytest.raises(ValueError, match="must be NAME=PATH"):
            pipeline.labelled_words(bad)


# --- sizes --------------------------------------------------------------------------------------

RECIPE = Recipe.load(train_encoder.RECIPE)
# Of the paper: parameters besides embeddings, in millions.
PAPER_SIZES = {"17m": 17, "170m": 170, "700m": 700, "2.3b": 2300, "9.3b": 9300}


def shape_of(model: str) -> Shape:
    flags = RECIPE.flags(model, "adams", "bf16", transformer_engine=False)
    names = ("num-layers", "hidden-size", "num-attention-heads", "ffn-hidden-size")
    sizes = [number(flags, name) for name in names]
    return Shape(*sizes, max_length=512, position=str(flags["position-embedding-type"]))


@pytest.mark.parametrize("model", PAPER_SIZES)
def test_sizes_are_the_papers(model: str) -> None:
    millions = shape_of(model).num_params_without_embeddings() / 1e6
    assert millions == pytest.approx(PAPER_SIZES[model], rel=0.03)


@pytest.mark.parametrize("model", RECIPE.models)
def test_every_size_divides_in_its_layout(model: str) -> None:
    flags = RECIPE.flags(model, "adams", "bf16", transformer_engine=True)
    shape = shape_of(model)
    tensor = number(flags, "tensor-model-parallel-size")
    assert shape.hidden_size % shape.num_attention_heads == 0
    assert shape.num_attention_heads % tensor == shape.ffn_hidden_size % tensor == 0
    assert shape.num_layers % number(flags, "pipeline-model-parallel-size") == 0
    adamw, adams = (
        RECIPE.flags(model, o, "bf16", transformer_engine=True) for o in ("adamw", "adams")
    )
    # Half of AdamW's rate, as docs/hyperparameters.md says; the small ones have a rate of a sweep.
    half = float(str(adamw["lr"])) / 2
    if model in PAPER_SIZES:
        assert adams["lr"] == pytest.approx(half)
    else:
        assert 0.1 * half < float(str(adams["lr"])) <= half


def make_job(script: launch.Script, arguments: str, extra: str = "") -> launch.Job:
    args = launch.parser(RECIPE).parse_args(arguments.split())
    return launch.make_job(RECIPE, args, parse_flags(extra.split()), script)


@pytest.fixture
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PET_", "WANDB_")):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("one_machine")
def test_rehearsal_keeps_the_layout(tmp_path: Path) -> None:
    arguments = f"--model 9.3b --cpu-rehearsal --out {tmp_path}"
    job = make_job(train_encoder.SCRIPT, arguments)
    assert job.num_ranks == 8
    assert (job.flags["tensor-model-parallel-size"], job.flags["pipeline-model-parallel-size"]) == (
        4,
        2,
    )
    assert job.flags["num-layers"] == 2 and job.job_flags["num-layers"] == 46
    assert job.command()[-1] != "" and str(EXAMPLE / "pretrain_encoder.py") in job.command()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nlu")
    (folder / "a.txt").write_text("\n".join(f"call number {i} again" for i in range(60)))
    settings = Settings(
        text=[folder / "a.txt"],
        key="text",
        utterances=True,
        spoken_share=1.0,
        held_out_fraction=0.2,
        max_length=24,
        tokenizer=None,
        vocabulary="wordpiece",
        vocab_size=90,
        forbid=[],
        drop_forbidden=False,
        drop_long=False,
    )
    prepare(settings, folder / "data")
    return folder / "data"


@pytest.mark.usefixtures("one_machine")
def test_job_trains_on_a_prepared_dataset(tmp_path: Path, data: Path) -> None:
    job = make_job(
        train_student.SCRIPT,
        f"--model 17m --cpu-rehearsal --out {tmp_path} --data {data}",
        "--teacher T --kl-weight 1",
    )
    assert job.flags["encoder-tokenizer"] == data
    assert job.flags["vocab-size"] == vocabulary.load(data).get_vocab_size()
    assert job.flags["train-data-path"] == data / "train"
    assert str(EXAMPLE / "distil_encoder.py") in job.command()
    # What the plan of memory is not made with.
    extra = {"teacher", "kl-weight", "encoder-tokenizer"}
    assert extra <= job.job_flags.keys() and extra <= train_student.SCRIPT.own_flags
    with pytest.raises(ValueError, match=r"is no dataset of prepare_text\.py"):
        make_job(train_encoder.SCRIPT, f"--model 17m --cpu-rehearsal --data {tmp_path}")


# --- one training of the pipeline ---------------------------------------------------------------


def make_training(data: Path, **changed: Any) -> Training:
    return Training(
        **{
            "model": "tiny",
            "optimizer": "adams",
            "data": data,
            "blend": (),
            "steps": 40,
            "batch": 8,
            "start": None,
            "teacher": None,
            "seed": 5,
            "out": data / "out",
            "extra": {},
            **changed,
        }
    )


def test_flags_of_a_training(data: Path) -> None:
    flags = make_training(data, blend=((data, 0.25),), start=Path("T1")).flags(0, 24)
    assert flags["train-data-path"] == [0.75, data / "train", 0.25, data / "train"]
    assert (flags["seq-length"], flags["train-iters"], flags["seed"]) == (24, 40, 5)
    assert flags["pretrained-checkpoint"] == Path("T1")
    assert "bf16" not in flags and "teacher" not in flags
    assert "bf16" in make_training(data).flags(1, 24)
    training = make_training(data, teacher=Path("T"), extra={"kl-weight": "1"})
    flags = training.flags(0, 24)
    assert (flags["teacher"], flags["kl-weight"]) == (Path("T"), "1")
    assert training.script().name == "distil_encoder.py"
    words = run_training.command(training, flags, 0)
    assert "--cpu-rehearsal" in words
    for processes, part in ((2, "4"), (1, "8")):
        words = run_training.command(replace(training, processes=processes), flags, 0)
        assert words[words.index("--nproc-per-node") + 1] == str(processes)
        assert words[words.index("--micro-batch-size") + 1] == part


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 2}, "--steps 2"),
        ({"blend": ((Path("x"), 1.0),)}, "together below 1"),
        ({"blend": ((Path("x"), 0.0),)}, "must be above 0"),
        ({"start": Path("a"), "teacher": Path("b")}, "give one"),
        ({"processes": 3}, "--processes 3: must be from 1 to 2"),
    ],
)
def test_training_refuses(data: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_training.check(make_training(data, **changed))


def test_gate_compares_with_the_frequencies_of_tokens(data: Path) -> None:
    limit = run_training.unigram_loss(make_training(data))
    assert limit == json.loads((data / "dataset.json").read_text())["unigram_loss"]
    curve = {"held_out": [[20, limit + 1], [40, limit - 0.25]], "unigram_loss": limit}
    stopping, saying = make_training(data), make_training(data, gate="say")
    assert "0.250 nats better" in run_training.gate(stopping, curve)
    for loss in (limit, limit + 0.5):
        curve["held_out"][-1][1] = loss
        found = f"is {loss:.3f} nats after 40 steps: must be below {limit:.3f}"
        with pytest.raises(RunError, match=found):
            run_training.gate(stopping, curve)
        assert found in run_training.gate(saying, curve)
    curve["held_out"][-1][1] = float("nan")
    with pytest.raises(RunError, match="is nan nats"):
        run_training.gate(stopping, curve)


def test_stopped_adamw_without_fused_adam_begins_from_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_training(data, out=tmp_path, optimizer="adamw")
    monkeypatch.setattr(run_training, "find_spec", lambda name: None)
    assert not run_training.cannot_resume(training)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "latest_checkpointed_iteration.txt").write_text("3")
    assert run_training.cannot_resume(training)
    assert not run_training.cannot_resume(replace(training, optimizer="adams"))

    def stop(*_: object) -> None:
        raise RunError("not trained here")

    monkeypatch.setattr(run_training.job, "run", stop)
    with pytest.raises(RunError, match="not trained here"):
        run_training.run(training)
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(run_training, "find_spec", lambda name: name == "apex" or None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "latest_checkpointed_iteration.txt").write_text("3")
    assert not run_training.cannot_resume(training)


def test_resumed_run_has_the_whole_curve(tmp_path: Path) -> None:
    def line(step: int, loss: float) -> str:
        return (
            f" iteration {step}/ 40 | consumed | elapsed time per iteration (ms): 5.0 | x | "
            f"learning rate: 1.0E-03 | y | lm loss: {loss} |\n"
            f" validation loss at iteration {step} on validation set | lm loss value: {loss} | \n"
        )

    log, earlier = tmp_path / run_training.LOG, tmp_path / run_training.EARLIER_LOGS
    log.write_text(line(10, 5.0) + line(20, 4.5))
    run_training.keep_log(tmp_path)  # no checkpoint: it begins from nothing
    assert not earlier.exists()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "latest_checkpointed_iteration.txt").write_text("10")
    run_training.keep_log(tmp_path)
    log.write_text(line(20, 4.0) + line(30, 3.5))
    run_training.keep_log(tmp_path)
    points = [(30, 3.0), (40, 2.5)]
    whole = run_training.whole_curves(Curves(points, points), earlier)
    assert whole.train == whole.held_out == [(10, 5.0), (20, 4.0), (30, 3.0), (40, 2.5)]
    (tmp_path / "model" / "latest_checkpointed_iteration.txt").unlink()
    run_training.keep_log(tmp_path)
    assert run_training.whole_curves(Curves(points, points), earlier).train == points


def test_dataset_without_frequencies_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="must have unigram_loss"):
        run_training.unigram_loss(make_training(tmp_path))


def test_optimizers_are_compared(tmp_path: Path) -> None:
    for name, kinds in (("adams", ["exp_avg"]), ("adamw", ["exp_avg", "exp_avg_sq"])):
        curve = {
            "train": [[1, 5.0], [2, 4.0]],
            "held_out": [[2, 4.5]],
            "optimizer_bytes": dict.fromkeys(("param", *kinds), 2**20),
            "seconds": 3.2,
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "curve.json").write_text(json.dumps(curve))
    curves = compare_optimizers.read([f"{name}={tmp_path / name}" for name in ("adams", "adamw")])
    rows = compare_optimizers.table(curves).splitlines()
    assert rows[2] == "| adams | 4.500 | 1.00 MiB | exp_avg 1.00 MiB | 3 |"
    assert "| 2.00 MiB | exp_avg 1.00 MiB, exp_avg_sq 1.00 MiB |" in rows[3]
    compare_optimizers.plot(curves, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
    axes = Figure().subplots()
    compare_optimizers.draw(axes, {str(number): curves["adams"] for number in range(9)})
    assert len(axes.lines) == 2 * 9  # more than there are colors
    with pytest.raises(ValueError, match="must be NAME=FOLDER"):
        compare_optimizers.read([str(tmp_path)])


def test_rare_intents_are_left_out_and_named(tmp_path: Path) -> None:
    intents = {"train": "aaabbbc", "validation": "aabc", "test": "abbc"}
    for name, letters in intents.items():
        rows = [json.dumps({"text": f"{i}", "intent": x}) for i, x in enumerate(letters)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    at_least = {"train": 3, "validation": 1, "test": 1}
    record = select_intents.write(tmp_path, at_least, tmp_path / "out")
    assert record == {
        "intents": ["a", "b"],
        "dropped": ["c"],
        "left_out": {"train": 1, "validation": 1, "test": 1},
    }
    kept = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert "".join(json.loads(line)["intent"] for line in kept) == "aaabbb"
    with pytest.raises(ValueError, match="1 intents have 3 utterances for training and 2"):
        select_intents.write(tmp_path, at_least | {"validation": 2}, tmp_path / "out")
    with pytest.raises(ValueError, match=r"make it with labelled\.py"):
        select_intents.read(tmp_path / "absent")


# --- a model's folder ---------------------------------------------------------------------------

SHAPE = Shape(2, 16, 4, 32, 24, "rope")


def test_description_is_read_as_it_was_written(tmp_path: Path) -> None:
    description = Description(SHAPE, 90, "abc")
    description.write(tmp_path)
    assert Description.read(tmp_path) == description
    (tmp_path / encoder.FILE).write_text('{"shape": {"num_layers": 2}}')
    with pytest.raises(ValueError, match="is no description of an encoder"):
        Description.read(tmp_path)


def test_folder_without_a_finished_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no finished checkpoint"):
        encoder.checkpoint_folder(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    (tmp_path / "iter_0000012" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(ValueError, match="no checkpoint of the format torch_dist"):
        encoder.checkpoint_folder(tmp_path)


def test_model_with_another_tokenizer_is_refused(tmp_path: Path, data: Path) -> None:
    Description(SHAPE, 90, "of another one").write(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    (tmp_path / "iter_0000012").mkdir()
    (tmp_path / "iter_0000012" / "metadata.json").write_text("{}")
    vocabulary.load(data).save(str(tmp_path / vocabulary.FILE))
    with pytest.raises(ValueError, match="is not the tokenizer that the model was trained with"):
        encoder.load_encoder(tmp_path)
