"""`megatron-adams plan`: one real plan through the command, and what it refuses by itself."""

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_adams import cli
from megatron_adams.planning import PlanError, chart, compute, process, short
from megatron_adams.planning.gpus import GIB, Gpu, known_names, named
from megatron_adams.planning.models import MODELS, model_flags
from megatron_adams.planning.report import print_report
from megatron_adams.planning.results import Plan
from megatron_adams.planning.traffic import bytes_per_param

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))

from contestants import traffic  # noqa: E402
from traffic import ADAMS, FUSED_ADAM, GUARDED_ADAMS, NORM  # noqa: E402

from megatron_adams.kernels.modes import Mode  # noqa: E402

GPT = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 64 "
    "--max-position-embeddings 64 --micro-batch-size 1 --bf16 --use-distributed-optimizer "
    "--vocab-size 1000 --tokenizer-type NullTokenizer"
)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A script's plan, through the command: JSON, and the folder of its picture."""
    folder = tmp_path_factory.mktemp("plan")
    script = folder / "pretrain.sh"
    script.write_text(
        "TP=2; GPUS_PER_NODE=8\nNUM_NODES=${NUM_NODES:-2}\n"
        f"MODEL=(\n  {GPT}  # small\n  --tensor-model-parallel-size $TP\n)\n"
        "torchrun --nproc-per-node $GPUS_PER_NODE --nnodes $NUM_NODES --node-rank $NODE_RANK \\\n"
        '    pretrain_gpt.py "${MODEL[@]}" --data-path $DATA --optimizer adams\n'
    )
    command = ["plan", "--script", script, "--gpu", "h100", "--json", "--chart", folder / "p.png"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_adams.cli", *map(str, command)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder


def test_script_is_planned_with_its_variables_and_ranks(planned):
    plan, _ = planned
    assert plan["num_ranks"] == 16
    assert plan["layout"] == {"tp": 2, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "dp": 8}
    assert plan["given"] == "adams"


def test_modes_stand_side_by_side(planned):
    plan, _ = planned
    assert {mode["name"]: mode["bytes_per_param"] for mode in plan["modes"]} == {
        "adamw": 12,
        "adams": 8,
        "adamw_precision_aware": 10,
        "adams_precision_aware": 6,
        "adamw_precision_aware_bf16": 6,
        "adams_precision_aware_bf16": 4,
        "adamw_precision_aware_fp8": 4,
        "adams_precision_aware_fp8": 3,
    }
    assert plan["modes"][5]["flags"] == (
        "--optimizer adams --use-precision-aware-optimizer --exp-avg-dtype bf16"
    )
    assert [mode["fits"] for mode in plan["modes"]] == ["yes"] * 8


def test_chart_is_a_picture(planned):
    _, folder = planned
    assert (folder / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def of(data):
    return Plan.from_json(copy.deepcopy(data))


def printed(plan, gpu):
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    print_report(plan, gpu, console)
    return console.file.getvalue()


def test_table_has_every_mode_and_says_which_is_asked_for(planned):
    plan = of(planned[0])
    text = printed(plan, named("h100"))
    for mode in plan.modes:
        assert mode.title in text
    row, kinds = [line.split() for line in text.splitlines() if line.startswith("AdamS *")]
    assert row[2] == "8" and row[-2] == "yes"
    assert len(kinds) == 4, "main params and exp_avg alone"
    assert "80 GiB" in text and "Step" in text
    assert "Step" not in printed(plan, Gpu("GPU", 40 * GIB, None))
    assert "Fits" not in printed(plan, None)


def test_stages_with_the_same_bytes_share_a_row(planned):
    data = copy.deepcopy(planned[0])
    kind = data["kinds"][0]
    data["kinds"] = [{**kind, "pipeline_stage": stage} for stage in range(4)]
    data["kinds"][3] = {**data["kinds"][3], "weights": kind["weights"] + 2**30}
    text = printed(of(data), None)
    assert "0-2" in text and "3 (last)" in text


@pytest.mark.parametrize(
    ("given", "expected"), [("adams", "AdamS"), ("adamw_precision_aware", "AdamW, precision-aware")]
)
def test_summary_is_short_and_marks_the_job(planned, given, expected):
    text = short(of({**planned[0], "given": given}))
    assert len(text.splitlines()) < 8
    (line,) = [line for line in text.splitlines() if "<- this job" in line]
    assert line.strip().startswith(expected)
    assert "TP2 x DP8" in text


def test_gpu_is_compared_with_the_fullest_rank_and_its_activations(planned):
    plan = of(planned[0])
    total = plan.total_bytes("adams")
    assert total == plan.fullest("adams").static_bytes("adams") + plan.activations
    assert Gpu("GPU", total - 1, None).fits(total) == "no"
    assert Gpu("GPU", total, None).fits(total) == "tight"
    assert Gpu("GPU", 2 * total, None).fits(total) == "yes"


# The step's bytes

DEFAULT = {"grad": "fp32", "param": "bf16", "exp_avg": "fp32", "main_param": "fp32"}


def test_step_bytes_are_those_that_were_counted():
    for optimizer, is_guarded, passes in (
        ("adams", False, ADAMS),
        ("adams", True, GUARDED_ADAMS),
        ("adam", False, FUSED_ADAM),
    ):
        for clips in (True, False):
            own = [p for p in passes if clips or p.kind not in (NORM, "clip")]
            assert bytes_per_param(
                optimizer, DEFAULT, is_precision_aware=False, clips=clips, is_guarded=is_guarded
            ) == sum(each.total for each in own)


@pytest.mark.parametrize(
    "dtypes",
    [
        ("fp32", "fp32", "fp32", "none"),
        ("fp32", "bf16", "fp32", "remainder"),
        ("bf16", "bf16", "bf16", "remainder"),
        ("fp32", "bf16", "fp8", "remainder"),
        ("fp32", "fp16", "fp16", "fp16"),
    ],
)
def test_step_bytes_of_a_mode_are_its_kernels(dtypes):
    mode = Mode(*(dtype.replace("fp8", "e4m3") for dtype in dtypes))
    read, written = (sum(side.values()) for side in traffic(mode))
    names = ("grad", "param", "exp_avg", "main_param")
    assert bytes_per_param(
        "adams",
        dict(zip(names, dtypes, strict=True)),
        is_precision_aware=True,
        clips=False,
        is_guarded=False,
    ) == read + written + (read if mode.is_scaled else 0)


def test_passes_of_the_precision_aware_adam_are_not_guessed():
    assert (
        bytes_per_param("adam", DEFAULT, is_precision_aware=True, clips=True, is_guarded=False)
        is None
    )


# Names


@pytest.mark.parametrize("name", ["H100", "h100-80gb", "NVIDIA H100 80GB"])
def test_gpu_is_found_by_its_usual_names(name):
    assert named(name) == named("h100")
    assert round(named(name).memory_gib) == 80


def test_every_gpu_name_that_is_listed_is_known():
    for name in known_names():
        assert named(name).bandwidth_gb_s > 500


@pytest.mark.parametrize("name", MODELS)
def test_model_flags_are_a_command_line_of_megatrons(name):
    flags = model_flags(name)
    assert {"--num-layers", "--bf16", "--use-distributed-optimizer"} <= set(flags)


# What is refused


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *map(str, argv)])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "nothing to plan: name a model with --model"),
        (["--model", "llama2-13"], "did you mean llama2-13b?"),
        (["--model", "gpt2-124m", "--gpu", "h101"], "--gpu-memory-gib"),
        (["--model", "gpt2-124m", "--gpu", "tpu"], "must be one of a100, a100-40gb"),
        (["--model", "gpt2-124m", "--tp", "0"], "--tp: 0: must be a whole number from 1"),
        (["--model", "gpt2-124m", "--gpu-memory-gib", "-1"], "must be a number above 0"),
        (["--model", "gpt2-124m", "--gpu-bandwidth", "900"], "add --gpu or --gpu-memory-gib"),
        (
            ["--model", "gpt2-124m", "--dp", "3", "--world-size", "4"],
            "--dp 3 (3 ranks) and --world-size 4 (4 ranks) contradict each other",
        ),
        (["--script", "/no/such/file"], "No such file"),
        (["--", *GPT.split()], "the number of ranks is not known: add --dp"),
        (["--", "torchrun", "pretrain_gpt.py"], "no command with Megatron's flags was found"),
        (
            ["--dp", "1", "--", "--num-layers", "$LAYERS"],
            "$LAYERS in the value of --num-layers is not set",
        ),
    ],
)
def test_bad_input_is_refused_with_a_sentence_and_exit_code_2(capsys, argv, expected):
    message = refusal(capsys, *argv)
    assert expected in message
    assert "\n" not in message and len(message) < 300


def test_megatrons_refusal_is_the_commands(capsys):
    """Through the process that plans; tests/distributed/test_plan.py has more of them."""
    argv = ["--world-size", "8", "--", *GPT.split(), "--tensor-model-parallel-size", "3"]
    assert "8 ranks do not divide into --tensor-model-parallel-size 3" in refusal(capsys, *argv)


def test_no_ranks_are_refused():
    with pytest.raises(PlanError, match="0 ranks: must be at least 1") as refused:
        compute(GPT.split(), 0)
    assert refused.value.is_refusal


def test_failure_of_the_planner_is_no_refusal(monkeypatch, capsys):
    environment = {**process._environment(), "PYTHONPATH": "/nowhere"}
    monkeypatch.setattr(process, "_environment", lambda: environment)
    monkeypatch.setattr(process.sys, "executable", "/bin/false")
    assert cli.main(["plan", "--model", "gpt2-124m"]) == 1
    assert "planning failed with exit code" in capsys.readouterr().err


def test_chart_without_matplotlib_names_the_extra(planned, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-adams\[recipes\]'"):
        chart.draw(of(planned[0]), None, Path("p.png"))


def test_chart_of_a_format_that_there_is_not(planned, tmp_path):
    with pytest.raises(ValueError, match="xyz"):
        chart.draw(of(planned[0]), None, tmp_path / "p.xyz")
