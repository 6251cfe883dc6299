"""Killed runs go on from the last complete checkpoint; a damaged one is an error, on every rank."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.argv import ADAMS, DISTRIBUTED, choose
from tests.harness.cluster import Cluster, Outcome
from tests.harness.compare import assert_continues

TRAIN = "tests.distributed.cases:train"
KILLED = "tests.distributed.checkpoint_cases:train_killed"
FAILING = "tests.distributed.checkpoint_cases:train_failing"

STEPS = "--train-iters 8 --save-interval 3"
BASE = f"{DISTRIBUTED} {STEPS}"
LEGACY = f"{BASE} --ckpt-format torch"
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An uninterrupted run on two ranks, with checkpoints at 3, 6 and 8, in both formats."""
    folder = tmp_path_factory.mktemp("whole")
    run = cluster.run(TRAIN, 2, argv=f"{BASE} --save {folder / 'torch_dist'}")
    cluster.run(TRAIN, 2, argv=f"{LEGACY} --save {folder / 'torch'}")
    return {"ranks": run.results, "folder": folder}


@pytest.fixture
def torch_dist(whole: dict[str, Any], tmp_path: Path) -> Path:
    return shutil.copytree(whole["folder"] / "torch_dist", tmp_path / "torch_dist")


@pytest.fixture
def legacy(whole: dict[str, Any], tmp_path: Path) -> Path:
    return shutil.copytree(whole["folder"] / "torch", tmp_path / "torch")


def assert_every_rank_ended_by_itself(run: Outcome) -> None:
    """With an error, and not because the harness lost patience with a rank that hung."""
    assert all(code > 0 for code in run.codes), run.codes


# Where the run dies -> the ranks that do, and the iteration that it goes on from.
KILLS = {
    "between_saves": ([0, 1], 3),
    "with_half_a_file": ([0, 1], 3),
    "before_metadata_json": ([0], 3),
    "before_tracker": ([0], 3),
    "with_empty_tracker": ([0], 6),
    "with_empty_tracker, legacy": ([0], 6),
    "with_half_a_legacy_file": ([0], 3),
    "with_half_a_file, rank 1 alone": ([1], 3),
}


@pytest.mark.parametrize("kill", KILLS)
def test_killed_run_goes_on_from_last_complete_checkpoint(
    cluster: Cluster, whole: dict[str, Any], checkpoints: Path, kill: str
) -> None:
    ranks, resumed_at = KILLS[kill]
    point = kill.partition(",")[0]
    save = f"{LEGACY if 'legacy' in kill else BASE} --save {checkpoints}"
    killed = cluster.run(KILLED, 2, argv=save, at=point, ranks=ranks, check=False)
    assert [killed.codes[rank] for rank in ranks] == [-9] * len(ranks)
    resumed = cluster.run(TRAIN, 2, argv=f"{save} --load {checkpoints}")
    assert_continues(resumed.results, whole["ranks"], resumed_at)
    assert (checkpoints / TRACKER).read_text() == "8"
    # It has written anew what the killed run left half written.
    again = cluster.run(TRAIN, 2, argv=f"{save} {choose(checkpoints, 6)}")
    assert_continues(again.results, whole["ranks"], 6)


def test_killed_while_overwriting_goes_on_from_earlier_checkpoint(
    cluster: Cluster, whole: dict[str, Any], checkpoints: Path
) -> None:
    """A run that went back, killed while it wrote a later checkpoint anew: no mixture is loaded."""
    cluster.run(TRAIN, 2, argv=f"{BASE} --exit-interval 6 --save {checkpoints}")
    load = f"{BASE} --save {checkpoints} --load {checkpoints}"
    point = "overwriting"
    cluster.run(KILLED, 2, argv=f"{load} --ckpt-step 3", at=point, ranks=[1], check=False)
    mixture = cluster.run(TRAIN, 2, argv=f"{load} --ckpt-step 6", check=False)
    assert "iter_0000006: metadata.json is missing" in mixture.log
    resumed = cluster.run(TRAIN, 2, argv=load)
    assert_continues(resumed.results, whole["ranks"], 3)


def _truncate(name: str) -> Callable[[Path], None]:
    def truncate(folder: Path) -> None:
        path = next(folder.glob(name))
        os.truncate(path, path.stat().st_size * 9 // 10)

    return truncate


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


DAMAGES = {
    "distcp missing": (_remove("__1_0.distcp"), "__1_0.distcp is missing"),
    "distcp truncated": (_truncate("__0_0.distcp"), "__0_0.distcp has "),
    ".metadata missing": (_remove(".metadata"), ".metadata is missing"),
    ".metadata truncated": (_truncate(".metadata"), ".metadata is unreadable"),
    "metadata.json missing": (_remove("metadata.json"), "metadata.json is missing"),
    "folder missing": (shutil.rmtree, "not found, although"),
}
LEGACY_DAMAGES = {
    "model truncated": (_truncate("*/model_optim_rng.pt"), "model_optim_rng.pt is truncated"),
    "optimizer truncated": (_truncate("*/distrib_optim.pt"), "distrib_optim.pt is truncated"),
    "model missing": (_remove("mp_rank_00/model_optim_rng.pt"), "model_optim_rng.pt is missing"),
}


def _assert_refused(cluster: Cluster, base: str, folder: Path, sentence: str) -> None:
    run = cluster.run(TRAIN, 2, argv=f"{base} --load {folder}", check=False)
    assert_every_rank_ended_by_itself(run)
    for log in run.logs:
        error = log.rpartition("DamagedCheckpointError: ")[2]
        assert f"{folder}/iter_0000008: {sentence}" in error
        assert f"into {folder / TRACKER} (complete ones there: 3, 6)" in error


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused(cluster: Cluster, torch_dist: Path, damage: str) -> None:
    inflict, sentence = DAMAGES[damage]
    inflict(torch_dist / "iter_0000008")
    _assert_refused(cluster, BASE, torch_dist, sentence)


@pytest.mark.parametrize("damage", LEGACY_DAMAGES)
def test_damaged_legacy_checkpoint_is_refused(cluster: Cluster, legacy: Path, damage: str) -> None:
    inflict, sentence = LEGACY_DAMAGES[damage]
    inflict(legacy / "iter_0000008")
    _assert_refused(cluster, LEGACY, legacy, f"mp_rank_00/{sentence}")


def test_damage_of_the_step_chosen_is_found_without_tracker(
    cluster: Cluster, torch_dist: Path
) -> None:
    (torch_dist / TRACKER).unlink()
    (torch_dist / "iter_0000006" / "__1_0.distcp").unlink()
    argv = f"{BASE} --load {torch_dist} --ckpt-step 6"
    run = cluster.run(TRAIN, 2, argv=argv, check=False)
    assert_every_rank_ended_by_itself(run)
    assert all("DamagedCheckpointError: " in log for log in run.logs)


def test_legacy_checkpoint_is_not_mixed_of_two_steps(cluster: Cluster, legacy: Path) -> None:
    """Megatron takes the model of --ckpt-step and the optimizer of the tracker file's iteration."""
    run = cluster.run(TRAIN, 2, argv=f"{LEGACY} --load {legacy} --ckpt-step 3", check=False)
    assert_every_rank_ended_by_itself(run)
    assert all("part of the iteration in" in log for log in run.logs)


@pytest.mark.parametrize("text", ["", "3oo"])
def test_tracker_file_without_iteration(
    cluster: Cluster, whole: dict[str, Any], torch_dist: Path, text: str
) -> None:
    """Megatron itself exits with status 0 here: to a scheduler, a finished run."""
    (torch_dist / TRACKER).write_text(text)
    (torch_dist / "iter_0000008" / "__1_0.distcp").unlink()
    run = cluster.run(TRAIN, 2, argv=f"{BASE} --load {torch_dist}", check=False)
    if text:
        assert_every_rank_ended_by_itself(run)
        assert all("contains '3oo', must be an iteration" in log for log in run.logs)
    else:
        assert run.codes == [0, 0]
        assert_continues(run.results, whole["ranks"], 6)
        assert (torch_dist / TRACKER).read_text() == "6"


@pytest.mark.parametrize(
    ("at", "rank", "base"),
    [
        ("tensors", 1, BASE),
        ("metadata", 0, BASE),
        ("legacy_file", 0, LEGACY),
        ("tensors", 0, f"{ADAMS} {STEPS}"),
    ],
)
def test_save_that_fails_on_one_rank_ends_all(
    cluster: Cluster, checkpoints: Path, at: str, rank: int, base: str
) -> None:
    argv = f"{base} --save {checkpoints}"
    run = cluster.run(FAILING, 2, argv=argv, at=at, ranks=[rank], check=False)
    assert_every_rank_ended_by_itself(run)
    assert "No space left on device" in run.log
    assert not (checkpoints / TRACKER).exists()
