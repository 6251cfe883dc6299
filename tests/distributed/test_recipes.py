"""Every recipe rehearses in its own layout, resumes to the same bits, and ends well on SIGTERM."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.harness.cluster import REPO, Cluster
from tests.harness.thinning import thinned

EXAMPLES = REPO / "examples"
sys.path.append(str(EXAMPLES))

from shared import launch  # noqa: E402  (the examples are on the path now)
from shared.command import command_line_flags  # noqa: E402
from shared.recipe import Recipe, parse_flags  # noqa: E402

CASES = "tests.distributed.recipe_cases"
GPT2, LLAMA2 = (EXAMPLES / name / "recipe.toml" for name in ("pretrain_gpt2", "pretrain_llama2"))
MOCK_VOCAB_SIZE = 512

# model and optimizer -> recipe, tensor x pipeline x data parallel, ranks of a node
REHEARSALS = {
    "124m-adams": (GPT2, (1, 1, 2), 2),
    "124m-adamw": (GPT2, (1, 1, 2), 2),
    "350m-adams": (GPT2, (1, 1, 2), 2),
    "774m-adams": (GPT2, (1, 1, 2), 2),
    "1.5b-adams": (GPT2, (1, 1, 2), 2),
    "1b-adams": (LLAMA2, (1, 1, 2), 2),
    "7b-adams": (LLAMA2, (2, 1, 2), 2),  # on two nodes
    "70b-adams": (LLAMA2, (8, 4, 1), 8),  # on four
}


def make_job(recipe_path: Path, arguments: str, extra: str = "") -> launch.Job:
    recipe = Recipe.load(recipe_path)
    args = launch.parser(recipe).parse_args(arguments.split())
    return launch.make_job(recipe, args, parse_flags(extra.split()))


@pytest.fixture(autouse=True)
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PET_", "WANDB_")):
            monkeypatch.delenv(name)


def rehearse(
    cluster: Cluster, recipe: Path, arguments: str, extra: str = "", **kwargs: Any
) -> tuple[launch.Job, Any]:
    job = make_job(recipe, f"{arguments} --cpu-rehearsal", extra)
    words = command_line_flags(job.flags)
    outcome = cluster.run(f"{CASES}:rehearse", job.num_ranks, words=words, timeout_s=280, **kwargs)
    return job, outcome


@pytest.mark.parametrize(
    "name", thinned(REHEARSALS, full=("350m-adams", "774m-adams", "1.5b-adams", "70b-adams"))
)
def test_recipe_rehearses_in_its_layout(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    recipe, layout, ranks_of_node = REHEARSALS[name]
    model, optimizer = name.split("-")
    # Two steps and an evaluation; the tests below save and resume.
    arguments = f"--model {model} --optimizer {optimizer} --out {tmp_path}"
    if math.prod(layout) > ranks_of_node:
        monkeypatch.setenv("PET_NNODES", str(math.prod(layout) // ranks_of_node))
        monkeypatch.setenv("PET_NPROC_PER_NODE", str(ranks_of_node))
    extra = "--train-iters 3 --exit-interval 2 --eval-interval 1"
    job, outcome = rehearse(cluster, recipe, arguments, extra, ranks_of_node=ranks_of_node)
    assert job.num_ranks == math.prod(layout)
    for result in outcome.results:
        assert result["sizes"] == layout
        assert result["optimizer"] == ("AdamS" if optimizer == "adams" else "AdamW")
        assert result["dtype"] == "torch.bfloat16"
        assert result["adam"] == (0.9, 0.95, 1e-8 if recipe == GPT2 else 1e-5, 0.1)
    losses = outcome.results[-1]["losses"]
    assert len(losses) == 2
    # An untrained model is about as good as guessing among the padded vocabulary.
    multiple = 128 * layout[0]
    vocab_size = math.ceil(MOCK_VOCAB_SIZE / multiple) * multiple
    assert losses[0] == pytest.approx(math.log(vocab_size), rel=0.05)
    assert "validation loss" in outcome.log


SIX_STEPS = "--train-iters 6 --save-interval 3 --eval-interval 4"


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the ranks of a rehearsal of 13B end with: TP 2 x PP 2 x DP 2, six steps."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    _, outcome = rehearse(cluster, LLAMA2, f"--model 13b --out {folder}", SIX_STEPS)
    return list(outcome.results)


def test_killed_rehearsal_resumes_to_the_bits_of_an_uninterrupted_one(
    cluster: Cluster, tmp_path: Path, uninterrupted: list[Any]
) -> None:
    arguments = f"--model 13b --out {tmp_path}"
    job, killed = rehearse(cluster, LLAMA2, arguments, SIX_STEPS, kill_at=5, check=False)
    assert killed.codes == [-signal.SIGKILL] * 8
    latest = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert latest.read_text() == "3"
    _, resumed = rehearse(cluster, LLAMA2, arguments, SIX_STEPS)
    assert latest.read_text() == "6"
    assert resumed.results[-1]["losses"] == uninterrupted[-1]["losses"][3:]
    assert digests(resumed.results) == digests(uninterrupted)
    assert (job.num_ranks, {result["sizes"] for result in resumed.results}) == (8, {(2, 2, 2)})


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", thinned(["1b", "13b"], full=["13b"]))
def test_sigterm_to_train_py_saves_a_checkpoint_that_resumes(
    cluster: Cluster, tmp_path: Path, model: str
) -> None:
    """The real thing: train.py, torchrun, two processes or eight, and a signal."""
    out = tmp_path / "interrupted"
    # A save before the signal: what it spawned must live until the last one.
    flags = "--train-iters 1000 --save-interval 3 --eval-interval 1000"
    command = [sys.executable, str(LLAMA2.parent / "train.py")]
    command += ["--model", model, "--cpu-rehearsal", "--no-plan", "--out", str(out)]
    with (tmp_path / "log.txt").open("w+") as log:
        process = subprocess.Popen(
            [*command, "--", *flags.split()], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 300
            while " iteration        4/" not in (tmp_path / "log.txt").read_text():
                assert process.poll() is None and time.monotonic() < deadline, _end(tmp_path)
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=200)
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks, which are in sessions of their own
                process.wait(timeout=60)
    assert "exiting program after receiving SIGTERM" in (tmp_path / "log.txt").read_text()
    latest = out / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert latest.exists(), _end(tmp_path)
    step = int(latest.read_text())
    assert 4 <= step < 1000
    assert list((out / "tensorboard").glob("events.*"))
    assert list((out / "logs").rglob("stdout.log"))

    # Two more steps from there, and the same steps at a stretch.
    stop = f"{flags} --exit-interval {step + 2}"
    resumed, stretch = (
        rehearse(cluster, LLAMA2, f"--model {model} --out {folder}", stop)[1]
        for folder in (out, tmp_path / "stretch")
    )
    losses = [outcome.results[-1]["losses"] for outcome in (resumed, stretch)]
    assert losses[0] == losses[1][step:]
    assert digests(resumed.results) == digests(stretch.results)


def digests(results: list[Any]) -> list[str]:
    return [result["digest"] for result in results]


def _end(folder: Path) -> str:
    return (folder / "log.txt").read_text()[-4000:]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("recipe", "model", "num_ranks"),
    [(GPT2, "1.5b", 16), (LLAMA2, "13b", 256), (LLAMA2, "70b", 1024)],
    ids=["1.5b", "13b", "70b"],
)
def test_megatron_takes_the_flags_of_a_full_size_job(
    te_cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    recipe: Path,
    model: str,
    num_ranks: int,
    precision: str,
) -> None:
    # Where TransformerEngine is: its Python code in this test, no kernel runs.
    monkeypatch.setattr(launch, "find_spec", lambda name: name)
    monkeypatch.setenv("PET_NNODES", str(num_ranks // 8))
    monkeypatch.setenv("PET_NPROC_PER_NODE", "8")
    job = make_job(
        recipe, f"--model {model} --precision {precision} --out {tmp_path}", "--mock-data"
    )
    extra = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "32000"]
    words = [*command_line_flags(job.flags), *extra]
    (args,) = te_cluster.run(f"{CASES}:validate", words=words, num_parallel=num_ranks).results
    size = {"1.5b": 1, "13b": 4, "70b": 32}[model]
    assert args["data_parallel_size"] == num_ranks // size
    assert args["optimizer"] == "adams"
    assert args["bf16"] and args["exit_signal_handler"]
    assert args["sequence_parallel"] == (size > 1)
    expected = ("hybrid", "tensorwise", True) if precision == "fp8" else (None, "delayed", False)
    assert (args["fp8"], args["fp8_recipe"], args["fp8_param_gather"]) == expected
    assert args["min_lr"] == pytest.approx(args["lr"] / 10)
