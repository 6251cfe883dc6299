"""From an AdamW checkpoint to adams: nothing is lost but exp_avg_sq, nothing starts anew."""

import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_adams.cli import main as megatron_adams_command
from tests.harness.argv import EP2, NUM_STEPS, SAVED_AT, STEPS, choose, folder_of
from tests.harness.cluster import REPO, Cluster, Outcome
from tests.harness.thinning import thinned

TRAIN = "tests.distributed.cases:train"
LOAD = "tests.distributed.cases:load_plain"
AFTER_LOAD = "tests.distributed.from_adam_cases:state_after_load"
FROM_LOAD = "tests.distributed.from_adam_cases:train_from_load"
DIFFERENCES = "tests.distributed.version_cases:differences"
COMMON = "tests.distributed.checkpoint_cases:read_common"
SAVE_AS = "tests.distributed.from_adam_cases:train_saving_as"
REFUSALS = "tests.distributed.flag_cases:refusals"

FROM_ADAM = "--optimizer adams --adams-from-adam"
DISTRIBUTED = "--use-distributed-optimizer"
FORMATS = {
    "dp_reshardable": DISTRIBUTED,
    "bf16_fully_reshardable": f"{DISTRIBUTED} --bf16 --dist-ckpt-optim-fully-reshardable",
    "fp16": f"{DISTRIBUTED} --fp16 --initial-loss-scale 1024",
    "experts": f"{DISTRIBUTED} {EP2}",
    "legacy": f"{DISTRIBUTED} --ckpt-format torch",
    "plain": "",
    "plain_bf16": "--bf16",
    "plain_legacy": "--ckpt-format torch",
}


_adam_runs: dict[tuple[Cluster, str], tuple[Outcome, Path]] = {}


def adam_run(cluster: Cluster, flags: str, folder: Path) -> Outcome:
    """AdamW's first steps, and its checkpoint in a folder that is not there yet.

    A run that an earlier test has asked for is not repeated: its checkpoint is copied. A test may
    damage its copy, and must not change the outcome.
    """
    if (cluster, flags) not in _adam_runs:
        kept = cluster.new_folder("adam")
        argv = f"--optimizer adam {flags} {STEPS} --exit-interval {SAVED_AT} --save {kept}"
        _adam_runs[cluster, flags] = cluster.run(TRAIN, 2, argv=argv), kept
    outcome, kept = _adam_runs[cluster, flags]
    shutil.copytree(kept, folder)
    return outcome


_switches: dict[tuple[Cluster, str], Outcome] = {}


def switched_run(cluster: Cluster, name: str, adam: Path) -> Outcome:
    """The rest of AdamW's run with AdamS, and what was loaded; each format is switched once."""
    if (cluster, name) not in _switches:
        argv = f"{FROM_ADAM} {FORMATS[name]} {STEPS} --load {adam}"
        _switches[cluster, name] = cluster.run(FROM_LOAD, 2, argv=argv)
    return _switches[cluster, name]


def assert_same_state(parts: list[dict[str, Any]], adam_parts: list[dict[str, Any]]) -> None:
    for part, adam_part in zip(parts, adam_parts, strict=True):
        assert part["shards"]
        for shard, adam_shard in zip(part["shards"], adam_part["shards"], strict=True):
            assert set(shard["state"]) == {"exp_avg"}
            assert adam_shard["state"]["exp_avg"].abs().sum() > 0
            assert torch.equal(shard["param"], adam_shard["param"])
            assert torch.equal(shard["state"]["exp_avg"], adam_shard["state"]["exp_avg"])


@pytest.mark.parametrize("name", FORMATS)
def test_momentum_main_params_and_step_are_adams(
    cluster: Cluster, plain_cluster: Cluster, checkpoints: Path, name: str
) -> None:
    saved = adam_run(plain_cluster, FORMATS[name], checkpoints)
    run = switched_run(cluster, name, checkpoints)
    loaded = [rank["loaded"] for rank in run.results]
    for rank, adam_rank in zip(loaded, saved.results, strict=True):
        assert_same_state(rank["parts"], adam_rank["parts"])
        assert (rank["iteration"], rank["num_steps"]) == (SAVED_AT, SAVED_AT * 8)
        for part in rank["parts"]:
            for group in part["groups"]:
                assert group["step"] == SAVED_AT - adam_rank["skipped"].count(1)
                assert group["betas"] == (0.9, 0.95)
                assert not {"amsgrad", "fused", "decoupled_weight_decay"} & set(group)
                assert group["lr"] == 1e-3
    num_params = [len(part["shards"]) for part in loaded[0]["parts"]]
    assert "adams's own" not in run.log
    lines = [line for line in run.logs[0].splitlines() if "goes on from Adam's step" in line]
    assert len(lines) == len(num_params)
    for line, number in zip(lines, num_params, strict=True):
        assert f"step {SAVED_AT}: momentum and main params of {number} of {number}" in line
        assert "exp_avg_sq dropped" in line
    # And the run goes on: with the whole batch of steps that is left.
    for rank in run.results:
        assert len(rank["grad_norms"]) == NUM_STEPS - SAVED_AT


@pytest.mark.parametrize("name", ["dp_reshardable", "legacy", "plain_bf16"])
def test_state_of_the_world_with_apex_is_taken(
    cluster: Cluster, apex_cluster: Cluster, checkpoints: Path, name: str
) -> None:
    """Its groups have the step, its state has none; and so without it."""
    saved = adam_run(apex_cluster, FORMATS[name], checkpoints)
    argv = f"{FROM_ADAM} {FORMATS[name]} {STEPS} --load {checkpoints}"
    for each in (cluster, apex_cluster):
        for rank, adam_rank in zip(
            each.run(AFTER_LOAD, 2, argv=argv).results, saved.results, strict=True
        ):
            assert_same_state(rank["parts"], adam_rank["parts"])
            assert rank["parts"][0]["groups"][0]["step"] == SAVED_AT


def test_switch_at_another_layout_and_precision_loses_no_bit(
    cluster: Cluster, plain_cluster: Cluster, tmp_path: Path
) -> None:
    flags = f"--bf16 --disable-bias-linear --train-iters {SAVED_AT} {DISTRIBUTED}"
    flags += " --dist-ckpt-optim-fully-reshardable"
    source, end = tmp_path / "source", tmp_path / "end"
    plain_cluster.run(
        TRAIN, 2, argv=f"--optimizer adam {flags} --tensor-model-parallel-size 2 --save {source}"
    )
    cluster.run(
        TRAIN,
        2,
        argv=f"{FROM_ADAM} {flags} --use-precision-aware-optimizer --load {source} --save {end}",
    )
    before, after = (
        cluster.run(LOAD, checkpoint=folder_of(root, SAVED_AT)).results[0] for root in (source, end)
    )
    kept = {k for k in before if k.startswith("optimizer.") and ".exp_avg_sq." not in k}
    assert kept == {k for k in after if k.startswith("optimizer.")}
    assert any(".exp_avg_sq." in key for key in before)
    for key in kept:
        assert torch.equal(before[key], after[key]), key


@pytest.mark.parametrize(
    "name", thinned(["dp_reshardable", "legacy", "plain_bf16"], full=("legacy",))
)
def test_flag_may_stay_for_resumes_from_adams(
    cluster: Cluster, plain_cluster: Cluster, tmp_path: Path, name: str
) -> None:
    """As in a job that is restarted with the same command."""
    adam, folder = tmp_path / "adam", tmp_path / "adams"
    adam_run(plain_cluster, FORMATS[name], adam)
    base = f"{FROM_ADAM} {FORMATS[name]} --train-iters {NUM_STEPS} --save-interval 4"
    whole = cluster.run(TRAIN, 2, argv=f"{base} --load {adam} --save {folder}").results
    argv = f"{base} {choose(folder, 4)}"
    with_flag = cluster.run(TRAIN, 2, argv=argv)
    without = cluster.run(TRAIN, 2, argv=argv.replace("--adams-from-adam", ""))
    for resumed in (with_flag, without):
        for mine, theirs in zip(resumed.results, whole, strict=True):
            assert mine["losses"] == theirs["losses"][1:]
            for name, tensor in theirs["model"].items():
                assert torch.equal(mine["model"][name], tensor), name
    said = "is adams's own, --adams-from-adam has nothing to do"
    assert (with_flag.log.count(said), without.log.count(said)) == (1, 0)
    assert "goes on from Adam" not in with_flag.log


CONTRADICTIONS = {
    "--load x --finetune": "--adams-from-adam with --finetune: that loads the weights alone",
    "--load x --no-load-optim": "--adams-from-adam with --no-load-optim: that loads the weights",
    "--load x --pretrained-checkpoint y": "--adams-from-adam with --pretrained-checkpoint: that",
    "": "--adams-from-adam without --load: must have a checkpoint of Adam's",
}


def test_flag_with_which_no_momentum_would_be_loaded_is_refused(cluster: Cluster) -> None:
    commands = [f"{FROM_ADAM} {DISTRIBUTED} {flags}" for flags in CONTRADICTIONS]
    commands += [f"--optimizer {name} --adams-from-adam --load x" for name in ("adam", "sgd")]
    words = [*CONTRADICTIONS.values()]
    words += [f"--adams-from-adam with --optimizer {name}: it belongs" for name in ("adam", "sgd")]
    for message, expected in zip(
        cluster.run(REFUSALS, 1, commands=commands).results[0], words, strict=True
    ):
        assert message is not None and message.startswith(expected)


def refused_words(cluster: Cluster, argv: str, num_ranks: int = 2) -> list[str]:
    """The last words of every rank of a run that has to fail."""
    run = cluster.run(TRAIN, num_ranks, argv=argv, check=False, timeout_s=60)
    assert run.codes == [1] * num_ranks
    return [log.rstrip().splitlines()[-1] for log in run.logs]


def test_checkpoint_without_adams_momentum_is_refused_on_every_rank(
    cluster: Cluster, plain_cluster: Cluster, tmp_path: Path
) -> None:
    """Megatron would start from random weights, or the optimizer anew."""
    argv = f"{DISTRIBUTED} {STEPS} --exit-interval {SAVED_AT}"
    others = {"sgd": f"--optimizer sgd {STEPS} --exit-interval {SAVED_AT}"}
    others["no_optim"] = f"--optimizer adam {argv} --no-save-optim"
    others["adam"] = f"--optimizer adam {argv}"
    for name, flags in others.items():
        plain_cluster.run(TRAIN, 2, argv=f"{flags} --save {tmp_path / name}")
    adam = tmp_path / "adam"
    Path(folder_of(adam, SAVED_AT)).rename(adam / "release")
    (adam / "latest_checkpointed_iteration.txt").write_text("release")
    expected = {
        "nothing": "latest_checkpointed_iteration.txt not found, the run would start from random",
        "sgd": "was saved with --optimizer sgd; must be adam's",
        "no_optim": "was saved with --no-save-optim: there is no momentum",
        "adam": "Megatron loads the weights alone of",
    }
    for name, words in expected.items():
        flags = f"{FROM_ADAM} {DISTRIBUTED} {STEPS} --load {tmp_path / name}"
        for line in refused_words(cluster, flags):
            assert line.startswith("ValueError: --adams-from-adam: ") and words in line


def edit_metadata(folder: str, drop: Callable[[str], bool]) -> list[str]:
    """Take what `drop` chooses out of a torch_dist checkpoint; return the keys."""
    metadata = FileSystemReader(folder).read_metadata()
    dropped = [key for key in metadata.state_dict_metadata if drop(key)]
    for key in dropped:
        del metadata.state_dict_metadata[key]
    for index in [index for index in metadata.storage_data if index.fqn in dropped]:
        del metadata.storage_data[index]
    (Path(folder) / ".metadata").write_bytes(pickle.dumps(metadata))
    return dropped


def take_momentum_for_main_param(folder: str, name: str) -> None:
    """Have a torch_dist checkpoint's entry of a main param name the place of its momentum."""
    metadata = FileSystemReader(folder).read_metadata()
    places = {(index.fqn, index.offset): place for index, place in metadata.storage_data.items()}
    for index in metadata.storage_data:
        if index.fqn == f"optimizer.state.param.{name}":
            momentum = f"optimizer.state.exp_avg.{name}"
            metadata.storage_data[index] = places[momentum, index.offset]
    (Path(folder) / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("tensor", ["exp_avg", "param"])
def test_tensor_that_the_checkpoint_lacks_is_named(
    cluster: Cluster, plain_cluster: Cluster, checkpoints: Path, tensor: str
) -> None:
    """Whatever Megatron has been told about tensors that are missing."""
    flags = f"{DISTRIBUTED} --dist-ckpt-optim-fully-reshardable {STEPS}"
    adam_run(plain_cluster, flags, checkpoints)
    key = f"optimizer.state.{tensor}.decoder.layers.mlp.linear_fc2.weight"
    assert edit_metadata(folder_of(checkpoints, SAVED_AT), key.__eq__)
    base = f"{FROM_ADAM} {flags} --load {checkpoints} --dist-ckpt-strictness"
    words = refused_words(cluster, f"{base} ignore_all")
    expected = f"the checkpoint has no {tensor} of module.decoder.layers."
    assert any(expected in line and "mlp.linear_fc2.weight, which" in line for line in words)
    assert all(key in line for line in refused_words(cluster, f"{base} assume_ok_unexpected"))


def test_momentum_that_a_plain_checkpoint_lacks_is_numbered(
    cluster: Cluster, plain_cluster: Cluster, checkpoints: Path
) -> None:
    adam_run(plain_cluster, FORMATS["plain_legacy"], checkpoints)
    path = Path(folder_of(checkpoints, SAVED_AT)) / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    num_params = len(state["optimizer"]["state"])
    del state["optimizer"]["state"][3]
    torch.save(state, path)
    words = f"has no momentum of 1 of {num_params} parameters (number 3 and so on)"
    argv = f"{FROM_ADAM} {FORMATS['plain_legacy']} {STEPS} --load {checkpoints}"
    assert all(words in line for line in refused_words(cluster, argv))


@pytest.mark.parametrize("flags", ["--bf16", "--bf16 --use-precision-aware-optimizer"])
def test_main_params_of_other_weights_are_refused(
    cluster: Cluster, plain_cluster: Cluster, tmp_path: Path, flags: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As stock Adam saves them where a bucket is padded at its end and another follows.

    Where Megatron's own save is right, the checkpoint gets its momentum for its main params.
    """
    layout = f"{DISTRIBUTED} --pipeline-model-parallel-size 2 --dist-ckpt-optim-fully-reshardable"
    adam = tmp_path / "adam"
    adam_run(plain_cluster, f"{layout} --bf16", adam)
    if "bucket padding" in cluster.run(DIFFERENCES).results[0]["differences"]:
        take_momentum_for_main_param(folder_of(adam, SAVED_AT), "embedding.word_embeddings.weight")
    words = "the main params of {}embedding.word_embeddings.weight are not those of its weights"
    argv = f"{FROM_ADAM} {layout} {flags} {STEPS} --load {adam}"
    refused = refused_words(cluster, argv)
    assert words.format("module.module.") in refused[0]
    assert megatron_adams_command(["convert", str(adam), str(tmp_path / "end")]) == 1
    assert words.format("") in capsys.readouterr().err
    assert not list((tmp_path / "end").iterdir())


def test_checkpoint_of_an_earlier_megatron_is_taken_and_converted(
    cluster: Cluster, plain_cluster: Cluster, tmp_path: Path
) -> None:
    """Before 0.19, what is no tensor is in a file of its own, common.pt."""
    adam, earlier, converted = tmp_path / "adam", tmp_path / "earlier", tmp_path / "adams"
    adam_run(plain_cluster, "", adam)
    common = cluster.run(COMMON, checkpoint=folder_of(adam, SAVED_AT)).results[0]
    del common["keys"]
    shutil.copytree(adam, earlier)
    folder = folder_of(earlier, SAVED_AT)
    dropped = edit_metadata(folder, lambda key: key.startswith("common_state"))
    # An earlier Megatron has written it so itself.
    assert bool(dropped) is not (Path(folder) / "common.pt").exists()
    torch.save(common, Path(folder) / "common.pt")
    assert megatron_adams_command(["convert", str(earlier), str(converted)]) == 0
    runs = [
        cluster.run(TRAIN, 2, argv=f"{flags} {STEPS} --load {root}").results
        for flags, root in (
            (FROM_ADAM, adam),
            (FROM_ADAM, earlier),
            ("--optimizer adams", converted),
        )
    ]
    for run in runs[1:]:
        for mine, theirs in zip(run, runs[0], strict=True):
            assert mine["losses"] == theirs["losses"]
            assert [p["groups"] for p in mine["parts"]] == [p["groups"] for p in theirs["parts"]]
    # Adam itself goes on from it with the plugin registered as without.
    for each in (cluster, plain_cluster):
        run = each.run(TRAIN, 2, argv=f"--optimizer adam {STEPS} --load {earlier}")
        assert len(run.results[0]["losses"]) == NUM_STEPS - SAVED_AT


def test_gathered_state_of_an_earlier_megatron_is_converted(
    cluster: Cluster, plain_cluster: Cluster, tmp_path: Path
) -> None:
    """dp_zero_gather_scatter, which keeps a distributed optimizer's tensors in one object."""
    adam, converted = tmp_path / "adam", tmp_path / "adams"
    argv = f"--optimizer adam {DISTRIBUTED} {STEPS} --exit-interval {SAVED_AT} --save {adam}"
    saved = plain_cluster.run(SAVE_AS, 2, argv=argv, kind="dp_zero_gather_scatter")
    assert megatron_adams_command(["convert", str(adam), str(converted)]) == 0
    num_params = sum(s["param"].numel() for r in saved.results for p in r["parts"]
                     for s in p["shards"])  # fmt: skip
    sizes = [sum(p.stat().st_size for p in root.rglob("*.distcp")) for root in (adam, converted)]
    assert sizes[0] - sizes[1] == pytest.approx(4 * num_params, rel=0.01)
    for flags, root in ((FROM_ADAM, adam), ("--optimizer adams", converted)):
        loaded = cluster.run(AFTER_LOAD, 2, argv=f"{flags} {DISTRIBUTED} {STEPS} --load {root}")
        for rank, adam_rank in zip(loaded.results, saved.results, strict=True):
            assert_same_state(rank["parts"], adam_rank["parts"])


@pytest.mark.parametrize(
    "flags", thinned([DISTRIBUTED, "", "--bf16", "--ckpt-format torch"], full=["--bf16"])
)
def test_learning_rate_may_change_at_the_switch(
    cluster: Cluster, plain_cluster: Cluster, checkpoints: Path, flags: str
) -> None:
    adam_run(plain_cluster, f"{flags} --decoupled-lr 2e-3", checkpoints)
    argv = (
        f"{FROM_ADAM} {flags} --lr 5e-4 --decoupled-lr 1e-3 --override-opt_param-scheduler "
        f"{STEPS} --load {checkpoints}"
    )
    run = cluster.run(TRAIN, 2, argv=argv)
    rates = {
        (group["lr"], group["max_lr"])
        for part in run.results[0]["parts"]
        for group in part["groups"]
    }
    assert rates == {(5e-4, 5e-4), (1e-3, 1e-3)}


@pytest.mark.parametrize("name", ["dp_reshardable", "bf16_fully_reshardable", "experts", "legacy",
                                  "plain_bf16", "plain_legacy"])  # fmt: skip
def test_converted_checkpoint_resumes_as_with_the_flag(
    cluster: Cluster,
    plain_cluster: Cluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    adam, converted = tmp_path / "adam", tmp_path / "adams"
    adam_run(plain_cluster, FORMATS[name], adam)
    before = {p: p.read_bytes() for p in adam.rglob("*") if p.is_file()}
    assert megatron_adams_command(["convert", str(adam), str(converted)]) == 0
    told = capsys.readouterr().out.splitlines()
    num_saved = int(told[-1].split(" saved")[0].split()[-1].replace(",", ""))
    sizes = [
        sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and p.parent != root)
        for root in (adam, converted)
    ]
    assert num_saved == sizes[0] - sizes[1] > 0
    assert before == {p: p.read_bytes() for p in adam.rglob("*") if p.is_file()}
    flags = f"{FORMATS[name]} {STEPS}"
    mine = cluster.run(TRAIN, 2, argv=f"--optimizer adams {flags} --load {converted}")
    theirs = switched_run(cluster, name, adam)
    for my_rank, their_rank in zip(mine.results, theirs.results, strict=True):
        assert my_rank["losses"] == their_rank["losses"]
        for part, their_part in zip(my_rank["parts"], their_rank["parts"], strict=True):
            assert part["groups"] == their_part["groups"]
        for key, tensor in their_rank["model"].items():
            assert torch.equal(my_rank["model"][key], tensor), key
    if "legacy" not in name:
        common = cluster.run(COMMON, checkpoint=folder_of(converted, SAVED_AT)).results[0]
        assert common["args"].optimizer == "adams"
        assert not [key for key in common["keys"] if "exp_avg_sq" in key]


@pytest.mark.parametrize(
    "name",
    thinned(["dp_reshardable", "legacy", "plain", "plain_legacy"], full=("legacy", "plain")),
)
def test_adam_is_told_that_it_cannot_go_on_from_adams(
    cluster: Cluster, checkpoints: Path, name: str
) -> None:
    flags = f"{FORMATS[name]} {STEPS}"
    cluster.run(TRAIN, 2, argv=f"--optimizer adams {flags} --save {checkpoints}")
    argv = f"--optimizer adam {flags} {choose(checkpoints, SAVED_AT)}"
    refused = cluster.run(TRAIN, 2, argv=argv, check=False)
    assert all(refused.codes)
    for log in refused.logs:
        assert "saved by adams, which keeps exp_avg and no exp_avg_sq" in log
        assert "--no-load-optim or --finetune" in log
    taken = cluster.run(TRAIN, 2, argv=f"{argv} --no-load-optim")
    assert len(taken.results[0]["grad_norms"]) == NUM_STEPS - SAVED_AT


@pytest.mark.parametrize("num_offloaded", thinned([20, 100], full=[100]))
def test_switch_keeps_the_loss(cluster: Cluster, tmp_path: Path, num_offloaded: int) -> None:
    """On the quickstart's text: the next 100 steps are no worse than the last 50 and 0.05 nats."""
    sys.path.insert(0, str(REPO / "examples" / "pretrain_gpt"))
    try:
        from prepare_data import prepare
    finally:
        sys.path.pop(0)
    dataset = prepare(None, tmp_path / "data")
    adam, num_adam, num_adams = tmp_path / "adam", 200, 100
    base = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 128 "
        "--max-position-embeddings 128 --micro-batch-size 8 --global-batch-size 16 "
        "--position-embedding-type rope --no-rope-fusion --disable-bias-linear "
        "--attention-dropout 0 --hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 257 "
        f"--train-data-path {dataset.train_prefix} --valid-data-path {dataset.held_out_prefix} "
        f"--data-cache-path {tmp_path / 'index'} --no-create-attention-mask-in-dataloader "
        "--lr-decay-style constant --weight-decay 0.1 --clip-grad 1 --use-cpu-initialization "
        "--eval-iters 0 --eval-interval 1000 --save-interval 1000 --log-interval 50 "
        f"--num-workers 0 {DISTRIBUTED} --train-iters {num_adam + num_adams} "
    )
    first = cluster.run(
        TRAIN,
        2,
        base=base,
        argv=f"--optimizer adam --lr 1e-3 --adam-beta2 0.95 --exit-interval {num_adam} "
        f"--save {adam}",
    )
    switch = f"{FROM_ADAM} --lr 5e-4 --override-opt_param-scheduler --load {adam}"
    offload = "--use-precision-aware-optimizer --optimizer-cpu-offload"
    switched = cluster.run(TRAIN, 2, base=base, argv=switch)
    # A bit that differs shows in the losses of the next few steps.
    stop = f"--exit-interval {num_adam + num_offloaded}"
    offloaded = cluster.run(TRAIN, 2, base=base, argv=f"{switch} {offload} {stop}")
    before, after, same = (run.results[-1]["losses"] for run in (first, switched, offloaded))
    assert same == after[:num_offloaded]
    assert (len(before), len(after)) == (num_adam, num_adams)
    print(f"last 50 of AdamW {np.mean(before[-50:]):.3f}, next 100 {np.mean(after):.3f}")
    assert np.mean(after) <= np.mean(before[-50:]) + 0.05
    # Nor is there a jump: worse in no ten steps than the noise of single batches.
    tens = [np.mean(after[i : i + 10]) for i in range(0, num_adams, 10)]
    assert max(tens) <= np.mean(before[-50:]) + 0.15
