"""From Adam's state to AdamS's, without Megatron: state dicts, and what `convert` refuses."""

import argparse
import copy
import io
import pickle
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_adams import AdamS
from megatron_adams.checkpoint import (
    TRACKER,
    DamagedCheckpointError,
    contradict,
    convert,
    is_adam_group,
    state_dict_from_adam,
)
from megatron_adams.checkpoint.conversion import _copy
from megatron_adams.cli import main


def trained(optimizer_class: type[torch.optim.Optimizer], **options) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (5, 3)]
    optimizer = optimizer_class(
        [{"params": params[:1], "tag": "first"}, {"params": params[1:]}], lr=1e-2, **options
    )
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("optimizer_class", "is_decoupled"), [(torch.optim.AdamW, True), (torch.optim.Adam, False)]
)
def test_adams_goes_on_from_adams_momentum(optimizer_class, is_decoupled):
    adam = trained(optimizer_class, amsgrad=True, weight_decay=0.3)
    saved = adam.state_dict()
    before = copy.deepcopy(saved)
    adams = trained(AdamS, eps=1e-6, weight_decay=0.1)
    adams.load_state_dict(state_dict_from_adam(saved))
    assert all(map(is_adam_group, saved["param_groups"]))
    for (param, state), old in zip(adams.state.items(), before["state"].values(), strict=True):
        assert set(state) == {"exp_avg"}
        assert torch.equal(state["exp_avg"], old["exp_avg"])
        assert param.shape == old["exp_avg"].shape
    for group in adams.param_groups:
        # The step and the rate are the checkpoint's, all else is this optimizer's.
        assert (group["step"], group["lr"]) == (3, 1e-2)
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-6, 0.1)
        assert group["adam_w_mode"] is is_decoupled
        assert "amsgrad" not in group
    assert adams.param_groups[0]["tag"] == "first"
    assert saved["state"].keys() == before["state"].keys()
    assert set(saved["state"][0]) == set(before["state"][0])  # the caller's is left as it is


def test_weight_decay_can_be_said_to_be_another():
    saved = trained(torch.optim.AdamW).state_dict()
    groups = state_dict_from_adam(saved, adam_w_mode=False)["param_groups"]
    assert [group["adam_w_mode"] for group in groups] == [False, False]


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, AdamS])
def test_state_of_others_than_adam_is_refused(optimizer_class):
    with pytest.raises(ValueError, match="was not written by Adam"):
        state_dict_from_adam(trained(optimizer_class).state_dict())


def test_parameter_without_momentum_is_named():
    saved = trained(torch.optim.AdamW).state_dict()
    del saved["state"][1]["exp_avg"]
    with pytest.raises(ValueError, match=r"the state of parameter 1 has .*must have exp_avg"):
        state_dict_from_adam(saved)


# convert


def legacy(root: Path, optimizer: str = "adam", step: int = 7) -> Path:
    """What Megatron's --ckpt-format torch leaves of a run without the distributed optimizer."""
    folder = root / f"iter_{step:07d}" / "mp_rank_00"
    folder.mkdir(parents=True)
    adam = trained(torch.optim.AdamW).state_dict()
    state = {"args": argparse.Namespace(optimizer=optimizer), "optimizer": adam, "iteration": step}
    torch.save(state, folder / "model_optim_rng.pt")
    (root / TRACKER).write_text(str(step))
    return folder / "model_optim_rng.pt"


def fails(capsys: pytest.CaptureFixture[str], source: Path, destination: Path) -> str:
    assert main(["convert", str(source), str(destination)]) == 1
    return capsys.readouterr().err


def test_checkpoint_of_adams_is_not_converted_again(tmp_path, capsys):
    legacy(tmp_path / "source", "adams")
    words = fails(capsys, tmp_path / "source", tmp_path / "end")
    assert "--optimizer adams; must be adam's, and this one needs no conversion" in words
    assert not (tmp_path / "end").exists()


def test_checkpoint_of_another_optimizer_is_refused(tmp_path, capsys):
    legacy(tmp_path / "source", "sgd")
    assert "saved with --optimizer sgd; must be adam's" in fails(
        capsys, tmp_path / "source", tmp_path / "end"
    )


def test_folder_that_is_no_checkpoint_is_refused(tmp_path, capsys):
    assert "must be a checkpoint folder of Megatron" in fails(capsys, tmp_path, tmp_path / "end")
    (tmp_path / TRACKER).write_text("12")
    assert "iter_0000012: must be a" in fails(capsys, tmp_path, tmp_path / "end")


def test_destination_in_use_is_refused(tmp_path, capsys):
    legacy(tmp_path / "source")
    (tmp_path / "end").mkdir()
    (tmp_path / "end" / "something").touch()
    assert "must be a new or an empty folder" in fails(
        capsys, tmp_path / "source", tmp_path / "end"
    )
    assert [path.name for path in (tmp_path / "end").iterdir()] == ["something"]


def test_damaged_source_is_refused(tmp_path, capsys):
    path = legacy(tmp_path / "source")
    path.write_bytes(path.read_bytes()[:-100])
    assert "model_optim_rng.pt is truncated; the checkpoint is incomplete" in fails(
        capsys, tmp_path / "source", tmp_path / "end"
    )
    with pytest.raises(DamagedCheckpointError):
        convert(tmp_path / "source", tmp_path / "end")


def test_checkpoint_folder_itself_can_be_named(tmp_path):
    path = legacy(tmp_path / "source")
    done = convert(path.parents[1], tmp_path / "end")
    assert done.folder == tmp_path / "end" / "iter_0000007"
    assert (tmp_path / "end" / TRACKER).read_text() == "7"
    assert done.bytes_before == path.stat().st_size
    assert done.bytes_after == (done.folder / "mp_rank_00" / path.name).stat().st_size


def test_refusal_names_the_ways_to_go_on():
    adams = trained(AdamS)
    with pytest.raises(ValueError, match=r"--adams-from-adam.*state_dict_from_adam.*--no-load-op"):
        adams.load_state_dict(trained(torch.optim.AdamW).state_dict())


def test_destination_inside_the_source_is_refused(tmp_path, capsys):
    folder = legacy(tmp_path / "source").parents[1]
    assert "is inside the source" in fails(capsys, tmp_path / "source", folder / "end")
    assert not (folder / "end").exists()


def test_checkpoint_without_state_of_the_optimizer_is_refused(tmp_path, capsys):
    path = legacy(tmp_path / "source")
    args = argparse.Namespace(optimizer="adam", no_save_optim=True)
    torch.save({"args": args, "iteration": 7}, path)
    words = fails(capsys, tmp_path / "source", tmp_path / "end")
    assert "--no-save-optim: there is no momentum to go on from" in words
    torch.save({"iteration": 7}, path)
    words = fails(capsys, tmp_path / "source", tmp_path / "end")
    assert "was saved with --optimizer None" in words


def test_rank_without_trainable_parameters_is_converted(tmp_path):
    path = legacy(tmp_path / "source")
    frozen = path.parents[1] / "mp_rank_01" / path.name
    frozen.parent.mkdir()
    state = {"args": argparse.Namespace(optimizer="adam"), "model": {"weight": torch.ones(3)}}
    torch.save(state, frozen)
    done = convert(tmp_path / "source", tmp_path / "end")
    converted = torch.load(done.folder / "mp_rank_01" / path.name, weights_only=False)
    assert (converted["args"].optimizer, converted.keys()) == ("adams", state.keys())
    assert torch.equal(converted["model"]["weight"], torch.ones(3))


@pytest.mark.parametrize("name", ["of adams", "end", "it's; new"])
def test_what_comes_after_a_conversion_can_be_pasted_into_a_shell(tmp_path, capsys, name):
    legacy(tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / name)]) == 0
    _, _, arguments = capsys.readouterr().out.partition("resume with ")
    assert shlex.split(arguments) == ["--optimizer", "adams", "--load", str(tmp_path / name)]


def test_killed_conversion_is_not_taken_for_a_checkpoint(tmp_path, capsys):
    legacy(tmp_path / "source")
    code = (
        "import os, signal, sys, torch\n"
        "save = torch.save\n"
        "def half(value, path):\n"
        "    save(value, path); os.truncate(path, os.path.getsize(path) // 2)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = half\n"
        "from megatron_adams.cli import main\n"
        "main(['convert', *sys.argv[1:]])\n"
    )
    end = tmp_path / "end"
    command = [sys.executable, "-c", code, str(tmp_path / "source"), str(end)]
    assert subprocess.run(command, timeout=120, check=False).returncode == -signal.SIGKILL
    # Neither a tracker, nor a folder of an iteration.
    assert [path.name for path in end.iterdir()] == [".iter_0000007.incomplete"]
    assert "must be a new or an empty folder" in fails(capsys, tmp_path / "source", end)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
def test_only_main_params_of_other_weights_contradict(dtype):
    main_params = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 0.02
    scale = 448 / main_params.abs().max() if dtype == torch.float8_e4m3fn else 1
    weights = (main_params * scale).to(dtype).float() / scale
    assert not contradict(weights, main_params)
    assert contradict(weights, main_params.roll(1))
    # Biases that have hardly moved from zero, below fp16's smallest number; nothing at all.
    assert not contradict((main_params * 1e-7).half(), main_params * 1e-7)
    assert not contradict(weights[:0], main_params[:0])


def test_source_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    (tmp_path / "old").write_bytes(b"123")
    with (
        open(tmp_path / "old", "rb") as old,
        open(tmp_path / "new", "wb") as new,
        pytest.raises(DamagedCheckpointError, match="old: became shorter"),
    ):
        _copy(old, new, 5)


def test_checkpoint_that_cannot_be_looked_into_is_left_to_megatron(tmp_path):
    """Where another optimizer than adams loads it, which the plugin is to leave as it was."""
    from megatron_adams.megatron.training.checkpoint import refuse_adams_checkpoint

    path = legacy(tmp_path)
    settings = {"optimizer": "adam", "ckpt_step": None, "finetune": False, "no_load_optim": False}
    args = argparse.Namespace(**settings)
    for state in ({"args": pickle.Pickler, "iteration": 7}, {"iteration": 7}):
        torch.save(state, path)
        refuse_adams_checkpoint(tmp_path, args)
    torch.save({"args": argparse.Namespace(optimizer="adams")}, path)
    with (
        torch.serialization.safe_globals([argparse.Namespace]),
        pytest.raises(ValueError, match=r"--optimizer adam: the checkpoint .* saved by adams"),
    ):
        refuse_adams_checkpoint(tmp_path, args)


def test_conversion_that_fails_leaves_no_checkpoint(tmp_path, monkeypatch, capsys):
    legacy(tmp_path / "source")

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    assert "No space left on device" in fails(capsys, tmp_path / "source", tmp_path / "end")
    assert list((tmp_path / "end").iterdir()) == []


def test_objects_of_a_missing_megatron_are_named(tmp_path, capsys):
    class Gone:
        def __reduce__(self):
            return __import__("importlib").import_module, ("megatron_that_is_gone",)

    path = legacy(tmp_path / "source")
    buffer = io.BytesIO()
    torch.save({"args": Gone()}, buffer, pickle_module=pickle)
    path.write_bytes(buffer.getvalue())
    words = fails(capsys, tmp_path / "source", tmp_path / "end")
    assert "megatron_that_is_gone" in words and "install megatron-core" in words
