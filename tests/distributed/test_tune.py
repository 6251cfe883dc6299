"""`megatron-adams tune` on real Megatron: a rehearsal from the terminal, AdamW's checkpoints."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_adams.checkpoint import read_moments
from megatron_adams.cli import main
from tests.distributed.cases import SCRIPT, TINY_GPT
from tests.harness.argv import EP2, SAVED_AT, STEPS
from tests.harness.cluster import REPO, Cluster
from tests.harness.thinning import thinned

TRAIN = "tests.distributed.cases:train"
DISTRIBUTED = "--use-distributed-optimizer"
FORMATS = {
    "dp_reshardable": DISTRIBUTED,
    "bf16_fully_reshardable": f"{DISTRIBUTED} --bf16 --dist-ckpt-optim-fully-reshardable",
    "experts": f"{DISTRIBUTED} {EP2}",
    "legacy": f"{DISTRIBUTED} --ckpt-format torch",
    "plain": "",
    "plain_legacy": "--ckpt-format torch",
}


@pytest.mark.parametrize("name", thinned(FORMATS, full=("experts", "plain_legacy")))
def test_adamws_update_is_exact_in_its_checkpoint(
    plain_cluster: Cluster, checkpoints: Path, name: str
) -> None:
    argv = f"--optimizer adam {FORMATS[name]} {STEPS} --exit-interval {SAVED_AT}"
    saved = plain_cluster.run(TRAIN, 2, argv=f"{argv} --save {checkpoints} --adam-beta2 0.95")
    squares, numel = 0.0, 0
    for rank in saved.results:
        for shard in (shard for part in rank["parts"] for shard in part["shards"]):
            m, s = (shard["state"][key].double() for key in ("exp_avg", "exp_avg_sq"))
            root = (s / (1 - 0.95**SAVED_AT)).sqrt() + 1e-8
            squares += (m / (1 - 0.9**SAVED_AT) / root).square().sum().item()
            numel += int((s > 0).sum())
    shown: list[str] = []
    moments = read_moments(checkpoints, adams_beta2=0.95, report=shown.append)
    assert moments.adamw_rms == pytest.approx(math.sqrt(squares / numel), rel=1e-5)
    # Of a whole number of copies: a plain optimizer's dp ranks have the same state.
    assert numel % moments.num_elements == 0
    assert (moments.iteration, moments.lr) == (SAVED_AT, 1e-3)
    assert shown and shown[-1].startswith(f"[{len(shown)}/{len(shown)}] ")


def test_checkpoint_gives_a_rate_and_others_are_named(
    cluster: Cluster, plain_cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {
        "adam": (plain_cluster, "--optimizer adam"),
        "adams": (cluster, "--optimizer adams"),
        "weights": (plain_cluster, "--optimizer adam --no-save-optim"),
    }
    for name, (world, flags) in runs.items():
        world.run(TRAIN, 1, argv=f"{flags} {STEPS} --save {tmp_path / name}")
    assert main(["tune", "--from-checkpoint", str(tmp_path / "adam"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["lr"] == pytest.approx(1e-3 * told["rms_adamw"] / told["rms_adams"])
    assert "estimate" in told["origin"]
    assert main(["tune", "--from-checkpoint", str(tmp_path / "adam"), "--lr", "6e-4"]) == 0
    assert re.search(r"AdamW's --lr +0.0006\n", capsys.readouterr().out)
    for name, message in (
        ("adams", "was saved with --optimizer adams; must be adam's, which has exp_avg_sq; give"),
        ("weights", "was saved with --no-save-optim; must have Adam's state; give"),
        ("nothing", "must be a checkpoint folder of Megatron"),
    ):
        assert main(["tune", "--from-checkpoint", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err


def test_rehearsed_job_gives_a_rate_from_the_terminal(tmp_path: Path) -> None:
    job = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron_adams.launch", "--cpu-rehearsal", str(SCRIPT), *TINY_GPT.split()),
        *("--optimizer", "adams", "--use-distributed-optimizer", "--train-iters", "300"),
        *("--save", str(tmp_path / "saved")),
    ]
    command = [sys.executable, "-m", "megatron_adams.cli", "tune", "--steps", "100", "--", *job]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"suggested --lr for AdamS +0\.000\d+, AdamW's times 0\.\d+\n", done.stdout)
    assert "measured                  the job's steps 52 to 100" in done.stdout
    assert "step 100 of 100: update RMS 0." in done.stderr
    assert not (tmp_path / "saved").exists()
