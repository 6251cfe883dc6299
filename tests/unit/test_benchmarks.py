"""benchmarks/step.py: what it times is what it says, and nothing is left out in silence."""

import argparse
import csv
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import contestants  # noqa: E402  (the files import each other by name)
import report  # noqa: E402
import step  # noqa: E402
from report import Results, Row  # noqa: E402

from megatron_adams.kernels import Mode, compile  # noqa: E402
from megatron_adams.kernels.cache import ENVIRONMENT_VARIABLE  # noqa: E402

CPU = torch.device("cpu")
NUMEL = 40_000  # more than two chunks, and no multiple of one


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path_factory.mktemp("kernels")))
        yield


def bits(tensor):
    return None if tensor is None else tensor.view(torch.uint8).clone()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (Mode("fp32", "fp32", "fp32", "none"), 20),
        (Mode("fp32", "bf16", "fp32", "fp32"), 22),
        (Mode("fp32", "bf16", "fp32", "remainder"), 20),
        (Mode("bf16", "bf16", "bf16", "remainder"), 14),
        (Mode("bf16", "bf16", "bf16", "none"), 10),
        (Mode("bf16", "e4m3", "fp32", "fp32"), 19),
        # Gradient, exp_avg and master, or param, are read twice.
        (Mode("bf16", "bf16", "fp16", "fp16"), 2 + 2 + 8 + (2 + 2 + 2)),
        (Mode("bf16", "bf16", "e4m3", "none"), 2 + 4 + 2 + (2 + 2 + 1)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_bytes_per_param_are_those_of_the_design(mode, expected):
    assert contestants.bytes_per_param(mode) == expected


@pytest.mark.parametrize("mode", contestants.MODES, ids=lambda mode: mode.name)
def test_stream_passes_over_all_tensors_and_changes_no_number(mode):
    tensors = contestants.make_tensors(mode, NUMEL, CPU)
    if not contestants.reads_param(mode):
        tensors.param.view(torch.uint8).fill_(255)
    before = {name: bits(getattr(tensors, name)) for name in ("grad", "param", "exp_avg", "main")}
    contestants.stream(tensors).step()
    if not contestants.reads_param(mode):
        # It gets the low bits of the main param, everywhere.
        width = tensors.param.element_size()
        low = tensors.main.view(torch.uint8).view(NUMEL, -1)[:, :width]
        assert torch.equal(tensors.param.view(torch.uint8).view(NUMEL, width), low)
        del before["param"]
    for name, old in before.items():
        new = bits(getattr(tensors, name))
        assert (new is None and old is None) or torch.equal(new, old), name


@pytest.mark.parametrize("mode", contestants.MODES, ids=lambda mode: mode.name)
def test_stream_compiles_for_a_gpu(mode):
    source = (BENCHMARKS / "stream.cpp").read_text()
    image = compile.compile_cuda(source, contestants.stream_defines(mode), "sm_90")
    assert b"stream_update" in image and b"stream_measure" in image


@pytest.mark.parametrize("mode", contestants.MODES, ids=lambda mode: mode.name)
def test_adams_steps_in_every_mode(mode):
    tensors = contestants.make_tensors(mode, NUMEL, CPU)
    before = {name: bits(getattr(tensors, name)) for name in ("grad", "exp_avg", "param", "main")}
    contestants.adams(tensors).step()
    assert torch.equal(bits(tensors.grad), before["grad"])
    assert not torch.equal(bits(tensors.exp_avg), before["exp_avg"])
    master = "param" if tensors.main is None else "main"
    assert not torch.equal(bits(getattr(tensors, master)), before[master])


def test_peers_with_master_weights_write_the_model_params():
    tensors = contestants.make_tensors(contestants.MIXED, NUMEL, CPU)
    tensors.param.fill_(float("nan"))
    for peer in contestants.peers_of(tensors, {}):
        peer.step()
        assert torch.equal(tensors.param, tensors.main.bfloat16()), peer.name
        assert peer.bytes_per_param == (26 if "Lion" in peer.name else 34)
        tensors.param.fill_(float("nan"))


def test_more_is_written_between_steps_than_the_caches_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "_CPU_CACHES", tmp_path)
    assert step.evicted_bytes(CPU) == 2**28  # nothing is known of them
    for index, size in enumerate(("48K", "491520K", "2048K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert step.evicted_bytes(CPU) == 2 * 480 * 2**20
    assert step.evicted_bytes(torch.device("cuda")) == 2**28


def test_run_measures_every_contestant_and_names_what_it_cannot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it fails
    monkeypatch.setattr(step, "evicted_bytes", lambda device: 2**20)
    modes = [contestants.FP32.name, contestants.BF16_REMAINDER.name]
    args = ["--device", "cpu", "--out", str(tmp_path), "--sizes", "16k", "32k", "--rounds", "2"]
    step.main([*args, "--modes", *modes])
    results = report.read(tmp_path / "step.json")
    torch_adamw = ["torch AdamW, fused", "torch AdamW, foreach"]
    assert [(row.numel, row.mode, row.name) for row in results.rows] == [
        (numel, mode, name)
        for numel in (16_000, 32_000)
        for mode, names in zip(modes, (torch_adamw, [report.REFERENCE]), strict=True)
        for name in ("AdamS", "stream", *names)
    ]
    assert all(len(row.times_s) == 2 and min(row.times_s) > 0 for row in results.rows)
    assert set(results.missing) == {
        peer.name for peer in contestants.PEERS if peer.package != "torch"
    }
    assert "not installed" in results.missing["DeepSpeedCPUAdam"]
    assert results.missing["Apex FusedAdam"] == "does not run on cpu"
    printed = capsys.readouterr().out
    for name in results.missing:
        assert f"{name}: not measured" in printed
    assert (tmp_path / "step.md").read_text() in printed
    assert len(list(csv.reader((tmp_path / "step.csv").open()))) == 1 + len(results.rows)
    assert (tmp_path / "step.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "step.json").read_text())["facts"]["rounds"] == "2"


def test_peer_that_fails_is_named_and_the_others_go_on(monkeypatch):
    def fail(tensors):
        raise RuntimeError("no such operator\nand a long trace")

    broken = contestants.Peer("broken", ("cpu",), "torch", (contestants.FP32,), fail, 2)
    monkeypatch.setattr(contestants, "PEERS", (broken, contestants.PEERS[0]))
    missing = {}
    tensors = contestants.make_tensors(contestants.FP32, 64, CPU)
    names = [peer.name for peer in contestants.peers_of(tensors, missing)]
    assert names == ["torch AdamW, fused"]
    assert missing == {"broken in g32-p32-m32-w0": "failed (RuntimeError: no such operator)"}


def test_contestants_take_turns_and_warm_up_is_not_counted():
    order = []
    pair = [contestants.Contestant(name, lambda n=name: order.append(n), 1) for name in "ab"]

    class Clock:
        def time_s(self, run):
            run()
            return float(len(order))

    times = step.measure(pair, Clock(), 3)
    rounds = ["".join(order[index : index + 2]) for index in range(0, 10, 2)]
    assert set(rounds) == {"ab", "ba"}
    for name in "ab":
        counted = [index + 1.0 for index, run in enumerate(order) if run == name and index >= 4]
        assert times[name] == counted and len(counted) == 3


def test_table_relates_times_round_by_round():
    rows = [
        Row(1000, "m", "AdamS", 10, [1e-6, 2e-6, 30e-6]),
        Row(1000, "m", "stream", 10, [1e-6, 1e-6, 10e-6]),
        Row(1000, "m", report.REFERENCE, 20, [2e-6, 4e-6, 60e-6]),
    ]
    first, second, third = report.table(Results({}, {}, rows))
    named = dict(zip(report.COLUMNS, first, strict=True))
    assert named["ms"] == "0.002" and named["GB/s"] == "5.0"
    assert named["time / stream"] == "2.000" and named["time / AdamS"] == "1.000"
    assert named["time / fp32 AdamS"] == "0.500" and named["bytes / fp32 AdamS"] == "0.500"
    assert second[-2:] == third[-2:] == ("", "")


@pytest.mark.parametrize(("text", "numel"), [("64", 64), ("1M", 10**6), ("16k", 16_000)])
def test_sizes(text, numel):
    assert step.parse_size(text) == numel


@pytest.mark.parametrize("text", ["0", "17", "-16"])
def test_sizes_that_are_no_vectors_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="multiple of 16"):
        step.parse_size(text)


def test_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(argparse.ArgumentTypeError, match="g32-pb16-m32-w32"):
        step.parse_mode("g32")
