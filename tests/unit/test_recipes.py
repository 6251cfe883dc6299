"""The recipes' settings, their command line, and what is refused before any rank starts."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "examples"
sys.path.append(str(EXAMPLES))

from shared import launch, rehearsal  # noqa: E402  (the examples are on the path now)
from shared.command import command_line_flags  # noqa: E402
from shared.recipe import Recipe, check_layout, number, parse_flags  # noqa: E402

GPT2, LLAMA2 = (EXAMPLES / name / "recipe.toml" for name in ("pretrain_gpt2", "pretrain_llama2"))
MODELS = [(path, model) for path in (GPT2, LLAMA2) for model in Recipe.load(path).models]
IDS = [model for _, model in MODELS]


@pytest.fixture(autouse=True)
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PET_", "WANDB_")):
            monkeypatch.delenv(name)
    # A command's way to end on SIGTERM is not for the process of the tests.
    monkeypatch.setattr("shared.command.signal.signal", lambda *handler: None)


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with eight GPUs and TransformerEngine."""
    monkeypatch.setattr(launch, "num_visible_gpus", lambda: 8)
    monkeypatch.setattr(launch, "find_spec", lambda name: name)


def make_job(recipe_path: Path, arguments: str, extra: str = "") -> launch.Job:
    recipe = Recipe.load(recipe_path)
    args = launch.parser(recipe).parse_args(arguments.split())
    return launch.make_job(recipe, args, parse_flags(extra.split()))


def flags_of(path: Path, model: str, optimizer: str = "adams") -> dict[str, object]:
    return Recipe.load(path).flags(model, optimizer, "bf16", transformer_engine=True)


def num_params(flags: dict[str, object], vocab_size: int) -> int:
    """Parameters of the model that the flags describe, with an unpadded vocabulary."""
    layers, hidden = number(flags, "num-layers"), number(flags, "hidden-size")
    heads = number(flags, "num-attention-heads")
    groups = number(flags, "num-query-groups", heads)
    ffn = number(flags, "ffn-hidden-size", 4 * hidden)
    attention = 2 * hidden * hidden + 2 * hidden * hidden // heads * groups
    if flags["normalization"] == "RMSNorm":  # Llama: no biases, gated MLP, two embeddings
        return (
            layers * (attention + 3 * hidden * ffn + 2 * hidden) + hidden + 2 * vocab_size * hidden
        )
    positions = number(flags, "max-position-embeddings")
    biases = 5 * hidden + ffn  # query, key, value, output; the MLP's two
    layer = attention + 2 * hidden * ffn + biases + 4 * hidden
    return layers * layer + 2 * hidden + (vocab_size + positions) * hidden


@pytest.mark.parametrize(
    ("path", "model", "published"),
    [
        # Hugging Face's gpt2, gpt2-medium, gpt2-large, gpt2-xl
        (GPT2, "124m", 124_439_808),
        (GPT2, "350m", 354_823_168),
        (GPT2, "774m", 774_030_080),
        (GPT2, "1.5b", 1_557_611_200),
        # TinyLlama-1.1B, Llama-2-7b, Llama-2-13b, Llama-2-70b
        (LLAMA2, "1b", 1_100_048_384),
        (LLAMA2, "7b", 6_738_415_616),
        (LLAMA2, "13b", 13_015_864_320),
        (LLAMA2, "70b", 68_976_648_192),
    ],
    ids=IDS,
)
def test_model_has_the_published_number_of_parameters(
    path: Path, model: str, published: int
) -> None:
    vocab_size = 50257 if path == GPT2 else 32000
    assert num_params(flags_of(path, model), vocab_size) == published


@pytest.mark.parametrize(("path", "model"), MODELS, ids=IDS)
def test_adams_has_half_of_adamws_rate_and_everything_else_of_it(path: Path, model: str) -> None:
    adams, adamw = (flags_of(path, model, optimizer) for optimizer in ("adams", "adamw"))
    assert (adams["optimizer"], adamw["optimizer"]) == ("adams", "adam")
    for name in ("lr", "min-lr"):
        assert 2 * float(str(adams[name])) == pytest.approx(float(str(adamw[name])), rel=1e-12)
    assert float(str(adamw["min-lr"])) == pytest.approx(float(str(adamw["lr"])) / 10, rel=1e-12)
    differing = {name for name in adams.keys() | adamw.keys() if adams.get(name) != adamw.get(name)}
    assert differing == {"optimizer", "lr", "min-lr"}


@pytest.mark.parametrize(
    ("path", "model", "tokens"),
    [(GPT2, "1.5b", 491_520), (LLAMA2, "1b", 2**21), (LLAMA2, "70b", 2**22)],
)
def test_tokens_a_step_are_those_of_the_source(path: Path, model: str, tokens: int) -> None:
    flags = flags_of(path, model)
    assert number(flags, "global-batch-size") * number(flags, "seq-length") == tokens
    assert number(flags, "seq-length") <= number(flags, "max-position-embeddings")


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(("path", "model"), MODELS, ids=IDS)
def test_recipe_starts_on_nodes_of_eight_gpus(
    monkeypatch: pytest.MonkeyPatch, path: Path, model: str
) -> None:
    for num_nodes in (1, 2) if path == GPT2 else (4, 8, 16):
        monkeypatch.setenv("PET_NNODES", str(num_nodes))
        job = make_job(path, f"--model {model} --out /tmp/x", "--mock-data")
        assert job.num_ranks == 8 * num_nodes


# What a rehearsal may change; all else, the layout above all, is the job's.
SHRUNK = {
    *("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups"),
    *("seq-length", "max-position-embeddings", "micro-batch-size", "global-batch-size"),
    *("train-iters", "lr-warmup-iters", "eval-interval", "eval-iters", "log-interval"),
    *("save-interval", "num-workers", "distributed-timeout-minutes"),
}


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize(("path", "model"), MODELS, ids=IDS)
def test_rehearsal_changes_sizes_alone_and_says_what_it_leaves_out(
    path: Path, model: str, precision: str
) -> None:
    job = make_job(path, f"--model {model} --precision {precision} --cpu-rehearsal --out /tmp/x")
    kept = job.job_flags.keys() - SHRUNK
    left_out = {name for name in kept if name not in job.flags}
    assert {name for name in kept - left_out if job.flags[name] != job.job_flags[name]} == set()
    expected = {"sequence-parallel"} if path == LLAMA2 else set()
    if precision == "fp8":
        expected |= {"fp8-format", "fp8-recipe", "fp8-param-gather"}
    assert left_out == expected
    for name in left_out:
        assert f"--{name}" in job.notes[1]
    assert "bf16" in job.flags
    layout = ("tensor-model-parallel-size", "pipeline-model-parallel-size")
    tensor, pipeline = (number(job.flags, name) for name in layout)
    assert number(job.flags, "num-layers") % pipeline == 0
    assert number(job.flags, "num-attention-heads") % tensor == 0
    assert number(job.flags, "num-query-groups", tensor) % tensor == 0
    assert number(job.flags, "ffn-hidden-size", 4 * tensor) % tensor == 0
    assert job.num_ranks == tensor * pipeline * (2 if model != "70b" else 1)
    assert f"hidden-size {job.job_flags['hidden-size']} -> " in job.notes[0]


def test_rehearsal_of_virtual_stages_has_a_layer_for_each() -> None:
    extra = "--num-virtual-stages-per-pipeline-rank 5"
    job = make_job(LLAMA2, "--model 70b --cpu-rehearsal --out /tmp/x", extra)
    assert job.flags["num-layers"] == 20


def test_rehearsal_of_given_processes_shares_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NPROC_PER_NODE", "4")
    job = make_job(LLAMA2, "--model 13b --cpu-rehearsal --out /tmp/x")
    assert (job.num_ranks, job.flags["global-batch-size"]) == (4, 2)
    assert "--nproc-per-node" not in job.command()


@pytest.mark.usefixtures("eight_gpus")
def test_users_flags_win_and_a_flag_can_be_left_out(tmp_path: Path) -> None:
    arguments = f"--model 124m --out {tmp_path} --without overlap-param-gather"
    words = make_job(GPT2, arguments, "--mock-data --lr=1e-4 --train-iters 20").command()
    assert words.count("--lr") == words.count("--train-iters") == 1
    assert words[words.index("--lr") + 1] == "1e-4"
    assert words[words.index("--train-iters") + 1] == "20"
    assert "--overlap-param-gather" not in words
    assert "--overlap-grad-reduce" in words


def test_flags_are_read_as_they_are_written() -> None:
    words = ["--lr", "1e-4", "--bf16", "--train-data-path", "0.5", "a", "0.5", "b", "--lr=2e-4"]
    flags = parse_flags(words)
    assert flags == {"lr": "2e-4", "bf16": True, "train-data-path": ["0.5", "a", "0.5", "b"]}
    assert parse_flags(command_line_flags(flags)) == flags
    with pytest.raises(ValueError, match="-lr: not a flag"):
        parse_flags(["-lr", "1"])


@pytest.mark.usefixtures("eight_gpus")
def test_printed_line_is_the_command_with_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[object] = []
    monkeypatch.setattr(os, "execve", lambda *call: started.extend(call))
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_NODE_RANK", "1")
    arguments = ["--model", "124m", "--out", str(tmp_path / "run"), "--", "--mock-data"]
    assert launch.main(GPT2, ["--print", *arguments]) == 0
    assert not started
    words = shlex.split(capsys.readouterr().out)
    assert not (tmp_path / "run").exists()
    assert launch.main(GPT2, arguments) == 0
    program, command, environment = started
    assert program == sys.executable
    assert words[0] == "env"
    end = words.index(sys.executable)
    assert words[end:] == command
    settings = dict(word.split("=", 1) for word in words[1:end])
    assert settings.items() <= environment.items()  # type: ignore[attr-defined]
    assert settings["PET_NODE_RANK"] == "1"
    # Another node than the first prints nothing and writes nothing.
    assert "Starting" not in capsys.readouterr().out
    assert not (tmp_path / "run" / "job.json").exists()


def test_alone_it_is_standalone_and_on_nodes_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "--model 124m --cpu-rehearsal --out /tmp/x"
    words = make_job(GPT2, arguments).command()
    assert "--standalone" in words
    assert words[words.index("--nproc-per-node") + 1] == "2"
    monkeypatch.setenv("PET_NNODES", "1")
    assert "--standalone" not in make_job(GPT2, arguments).command()


def rehearse(out: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Start a rehearsal up to the point where it becomes torchrun."""
    monkeypatch.setattr(os, "execve", lambda *call: None)
    start = ["--model", "124m", "--cpu-rehearsal", "--out", str(out), *arguments]
    return launch.main(GPT2, start)


def test_memory_plan_is_printed_for_the_full_size_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[list[str], int]] = []

    def plan(words: list[str], *, num_ranks: int) -> str:
        asked.append((words, num_ranks))
        return "4 bytes"

    monkeypatch.setattr("megatron_adams.planning.summary", plan)
    assert rehearse(tmp_path, monkeypatch) == 0
    assert "4 bytes" in capsys.readouterr().out
    ((words, num_ranks),) = asked
    assert num_ranks == 2
    assert words[words.index("--hidden-size") + 1] == "768"
    assert rehearse(tmp_path, monkeypatch, "--no-plan") == 0
    assert len(asked) == 1


def test_training_starts_without_a_plan_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str], *, num_ranks: int) -> str:
        raise RuntimeError("no such layout")

    monkeypatch.setattr("megatron_adams.planning.summary", fail)
    assert rehearse(tmp_path, monkeypatch) == 0
    output = capsys.readouterr().out
    assert "There is no memory plan (RuntimeError: no such layout)" in output
    assert "Starting 2 ranks" in output


def test_folder_keeps_what_was_started_and_refuses_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rehearse(tmp_path, monkeypatch, "--no-plan") == 0
    assert json.loads((tmp_path / "job.json").read_text())["model"] == "124m"
    assert (tmp_path / "command.sh").read_text().startswith("env PYTHONPATH=")
    assert rehearse(tmp_path, monkeypatch, "--no-plan") == 0  # to resume
    assert rehearse(tmp_path, monkeypatch, "--no-plan", "--optimizer", "adamw") == 2
    error = capsys.readouterr().err
    assert "holds a job with optimizer adams, and optimizer adamw is asked for" in error


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = f"--model 124m --cpu-rehearsal --out {tmp_path}"
    assert "wandb-project" not in make_job(GPT2, arguments).flags
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    job = make_job(GPT2, arguments)
    assert job.flags["wandb-project"] == "mine"
    first, second = (job.environment()["WANDB_RUN_ID"] for _ in range(2))
    assert first == second
    assert job.environment()["WANDB_RESUME"] == "allow"
    other = make_job(GPT2, f"--model 124m --cpu-rehearsal --out {tmp_path / 'other'}")
    assert other.environment()["WANDB_RUN_ID"] != first
    assert [path.name for path in tmp_path.glob("*wandb*")] == ["wandb_run_id.txt"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ("--model 124m", {}, "no GPU is visible: give --cpu-rehearsal"),
        ("--model 124m", {"PET_NPROC_PER_NODE": "8"}, "--data is missing: give a folder that"),
        ("--model 124m --data /no/such", {"PET_NPROC_PER_NODE": "8"}, "holds no dataset.json"),
        ("--model 13b --cpu-rehearsal", {"PET_NPROC_PER_NODE": "6"}, "must be a multiple of 4"),
        (
            "--model 13b --cpu-rehearsal",
            {"PET_NNODES": "1:4"},
            "PET_NNODES=1:4: must be one",
        ),
        ("--model 13b --cpu-rehearsal", {"PET_NPROC_PER_NODE": "gpu"}, "PET_NPROC_PER_NODE=gpu"),
        ("--model 124m --cpu-rehearsal --without fp8", {}, "--without fp8: the recipe of 124m has"),
        ("--model 124m --cpu-rehearsal -- lr", {}, "lr: not a flag"),
        (
            "--model 124m --cpu-rehearsal -- --tensor-model-parallel-size two",
            {},
            "--tensor-model-parallel-size two: must be a positive whole number",
        ),
        (
            "--model 124m --precision fp8 -- --mock-data",
            {"PET_NPROC_PER_NODE": "8"},
            "--precision fp8: needs TransformerEngine",
        ),
    ],
)
def test_what_cannot_start_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: str,
    environment: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setattr(launch, "num_visible_gpus", lambda: 0)
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    own, dashes, extra = arguments.partition(" -- ")
    words = [*own.split(), "--out", str(out), *(["--", *extra.split()] if dashes else [])]
    assert launch.main(LLAMA2 if "13b" in arguments else GPT2, words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_layout_that_does_not_divide_is_refused_with_one_that_does() -> None:
    flags: dict[str, object] = {"global-batch-size": 480, "micro-batch-size": 12}
    check_layout(flags, 40)
    with pytest.raises(ValueError, match="give -- --micro-batch-size 10"):
        check_layout(flags, 16)
    with pytest.raises(ValueError, match="the 7 data-parallel ones cannot share a global batch"):
        check_layout(flags, 7)


@pytest.mark.usefixtures("eight_gpus")
def test_without_transformer_engine_megatrons_own_layers_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    job = make_job(LLAMA2, "--model 7b --out /tmp/x", "--mock-data")
    assert job.flags["transformer-impl"] == "local"
    assert "sequence-parallel" not in job.flags
    assert "left out: --sequence-parallel" in job.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("not toml", "cannot be read"),
        ("[megatron]\n", "has no \\[models\\]"),
        ("[megatron]\n[models]\n[optimizers]\n[precision]\n[more]\n", "\\[more\\] is not known"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "recipe.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Recipe.load(path)
    assert str(path) in str(error.value)


def test_rehearsal_takes_two_replicas_where_they_are_few() -> None:
    sizes = {1: 2, 2: 4, 4: 8, 8: 8, 32: 32}
    for size, ranks in sizes.items():
        assert rehearsal.num_ranks({"tensor-model-parallel-size": size}) == ranks
