"""multi_tensor_adams refuses what it cannot do, before anything is written."""

import logging
from dataclasses import replace

import pytest
import torch

import megatron_adams.kernels as kernels
from megatron_adams.kernels import CompileError, Mode, PointerTable, host, multi_tensor_adams
from megatron_adams.kernels.batch import is_dense
from tests.kernels.checks import copy_batch, differences, expected, make_batch, scalar_cases

FP32 = Mode("fp32", "fp32", "fp32", "none")
FP8 = Mode("bf16", "e4m3", "fp16", "fp16")
MIXED = Mode("fp32", "bf16", "fp32", "fp32")
CPU = torch.device("cpu")


def call(batch, backend="host", **kwargs):
    options = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    multi_tensor_adams(
        batch.params,
        batch.grads,
        batch.exp_avgs,
        batch.main_params,
        exp_avg_scales=batch.exp_avg_scales,
        main_scales=batch.main_scales,
        fp8_scaling=batch.fp8_scaling,
        backend=backend,
        **{**options, **kwargs},
    )


@pytest.mark.parametrize("mode", [FP32, FP8, Mode("fp32", "bf16", "e4m3", "remainder")])
@pytest.mark.parametrize("backend", ["host", "foreach"])
@pytest.mark.parametrize("table", [None, PointerTable()])
@torch.no_grad()
def test_call_gives_the_bits_of_the_oracle(mode, backend, table):
    batch = make_batch(mode, (5, 0, 40))
    want = expected(batch, scalar_cases()["decoupled"])
    call(batch, backend, table=table)
    assert not differences(batch, want)


@pytest.mark.parametrize("backend", ["host", "foreach"])
@torch.no_grad()
def test_bias_correction_is_a_flag_with_a_step_or_a_tensor(backend):
    first, second, third = (make_batch(FP32, (40,)) for _ in range(3))
    want = expected(first, scalar_cases()["bias_correction"])
    call(first, backend, step=3, bias_correction=True)
    call(second, backend, bias_correction=torch.tensor(1 / (1 - 0.9**3)))
    assert not differences(first, want)
    assert not differences(second, want)
    call(third, backend, step=3)
    assert differences(third, want)


def change(**columns):
    def apply(batch):
        return replace(batch, **{name: make(batch) for name, make in columns.items()})

    return apply


REFUSED = {
    "fewer grads": (FP32, change(grads=lambda b: b.grads[:1]), r"1 grads for 2 params"),
    "mixed dtypes": (
        FP32,
        change(exp_avgs=lambda b: [b.exp_avgs[0], b.exp_avgs[1].bfloat16()]),
        r"exp_avgs have dtypes \['torch.bfloat16', 'torch.float32'\]: must be one",
    ),
    "unequal shapes": (
        FP32,
        change(grads=lambda b: [b.grads[0], b.grads[1][1:]]),
        r"grads\[1\] has shape \(7,\) and its param \(8,\)",
    ),
    "two devices": (
        FP32,
        change(grads=lambda b: [grad.to("meta") for grad in b.grads]),
        r"grads lie on \['meta'\] and params\[0\] on cpu",
    ),
    "unlike strides": (
        FP32,
        change(
            params=lambda b: [p.reshape(-1, 1, 4).transpose(0, 2) for p in b.params],
            grads=lambda b: [g.reshape(4, 1, -1).clone() for g in b.grads],
            exp_avgs=lambda b: [m.reshape(4, 1, -1).clone() for m in b.exp_avgs],
        ),
        r"grads of shape \(4, 1, 1\) with strides|grads of shape \(4, 1, 2\) with strides",
    ),
    "holes": (
        FP32,
        lambda b: change(**{n: lambda b, n=n: [t[::2] for t in getattr(b, n)] for n in COLUMNS})(b),
        r"without holes; use backend='foreach'",
    ),
    "missing scales": (
        FP8,
        change(exp_avg_scales=lambda b: None),
        r"exp_avg_scales missing",
    ),
    "scales for nothing": (
        FP32,
        change(main_scales=lambda b: [torch.ones(1)] * 2),
        r"main_scales given",
    ),
    "fp64 scale": (
        FP8,
        change(main_scales=lambda b: [scale.double() for scale in b.main_scales]),
        r"main_scales: each must have one fp32 element",
    ),
    "fp8 without a master": (
        FP8,
        change(main_params=lambda b: None, main_scales=lambda b: None),
        r"params torch.float8_e4m3fn.*main_params None: no kernel is for these",
    ),
}
COLUMNS = ("params", "grads", "exp_avgs")


@pytest.mark.parametrize("case", REFUSED)
@torch.no_grad()
def test_lists_that_do_not_fit_are_refused(case):
    mode, make, message = REFUSED[case]
    batch = make(make_batch(mode, (4, 8)))
    before = copy_batch(batch, "cpu") if "two devices" not in case else None
    with pytest.raises(ValueError, match=message):
        call(batch)
    assert before is None or not differences(batch, before)


@pytest.mark.parametrize("column", ["params", "grads", "exp_avgs", "main_params", "main_scales"])
@torch.no_grad()
def test_tensors_whose_memory_has_not_their_value_are_refused(column):
    batch = make_batch(FP8 if column == "main_scales" else MIXED, (4, 8))
    negated = [torch._neg_view(tensor) for tensor in getattr(batch, column)]
    before = [tensor.clone() for tensor in batch.exp_avgs]
    with pytest.raises(ValueError, match=rf"{column}: one is the negative of what its memory has"):
        call(replace(batch, **{column: negated}))
    assert all(map(torch.equal, batch.exp_avgs, before))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"backend": "cuda"}, r"kernel='cuda' for tensors on cpu: must be 'host', 'foreach'"),
        ({"backend": "triton"}, r"kernel='triton': must be one of"),
        ({"lr": torch.ones(2)}, r"lr has 2 elements: must have one"),
        ({"found_inf": torch.ones(1, dtype=torch.float64)}, r"found_inf is torch.float64: must be"),
    ],
)
def test_scalars_and_backends_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        call(make_batch(FP32, (4,)), **kwargs)


def test_table_is_written_again_only_when_a_tensor_moved():
    batch, table = make_batch(FP32, (4, 70000)), PointerTable()
    for _ in range(3):
        call(batch, table=table)
    assert (table.num_builds, table.num_chunks) == (1, 6)
    moved = replace(batch, grads=[grad.clone() for grad in batch.grads])
    want = expected(moved, scalar_cases()["decoupled"])
    call(moved, table=table)
    assert table.num_builds == 2
    assert not differences(moved, want)


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(3, 4), True),
        (torch.empty(3, 4).t(), True),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.empty(3, 4)[:, :2], False),
        (torch.empty(3, 1).expand(3, 4), False),
        (torch.empty(()), True),
        (torch.empty(0, 4).t(), True),
    ],
)
def test_dense_is_without_holes_in_any_order(tensor, dense):
    assert is_dense(tensor) == dense


class TestSelection:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        for function in (
            kernels.select_backend,
            kernels._warn_of_fallback,
            kernels._log_choice,
            host.load,
        ):
            function.cache_clear()
        yield
        kernels.select_backend.cache_clear()
        host.load.cache_clear()

    def test_own_backend_is_chosen_and_logged_once(self, caplog):
        caplog.set_level(logging.INFO, logger="megatron_adams")
        assert kernels.select_backend(CPU, FP32) == "host"
        assert kernels.select_backend(CPU, FP8) == "host"
        assert kernels.select_backend(CPU, FP32, "foreach") == "foreach"
        assert [r.message for r in caplog.records if "backend" in r.message] == [
            "AdamS: host backend for tensors on cpu",
            "AdamS: foreach backend for tensors on cpu",
        ]

    def test_other_devices_have_foreach(self):
        assert kernels.select_backend(torch.device("meta"), FP32) == "foreach"
        with pytest.raises(
            ValueError, match=r"kernel='host' for tensors on meta: must be 'foreach'"
        ):
            kernels.select_backend(torch.device("meta"), FP32, "host")

    def test_without_a_compiler_one_warning_and_foreach(self, caplog, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("MEGATRON_ADAMS_CACHE_DIR", str(tmp_path / "empty"))
        caplog.set_level(logging.WARNING, logger="megatron_adams")
        assert kernels.select_backend(CPU, FP32) == "foreach"
        assert kernels.select_backend(CPU, FP8) == "foreach"
        assert len(caplog.records) == 1
        assert "no C++ compiler" in caplog.text
        assert "install one" in caplog.text
        with pytest.raises(CompileError, match=r"no C\+\+ compiler"):
            kernels.select_backend(CPU, FP32, "host")
