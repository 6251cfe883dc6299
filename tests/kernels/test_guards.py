"""Counting and scaling updates: every backend has the bits of update.py, and update.py is right.

The kernel without guards is another one: the rest of this folder tests it.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_adams.kernels import Batch, PointerTable, cuda, foreach, host, multi_tensor_adams
from megatron_adams.kernels.modes import Mode
from megatron_adams.kernels.table import CHUNK, POINTERS
from megatron_adams.update import (
    adams_update_,
    count_squares,
    update_bound,
    update_factors,
    update_rms,
)
from tests.harness.thinning import thinned
from tests.kernels import batteries
from tests.kernels.checks import (
    FORMS,
    MISALIGNED,
    SCALARS,
    THIRD,
    differences,
    expected,
    make_batch,
    scalar_cases,
    with_guards,
)
from tests.kernels.emulator import EmulatedDriver
from tests.kernels.test_backends import EVERY_FORM, FORMS_OF_MODES, REPRESENTATIVES

FP32 = Mode("fp32", "fp32", "fp32", "none")
BACKENDS = {
    "host": lambda batch, scalars, **kind: host.run(batch, scalars, PointerTable(), **kind),
    "foreach": foreach.run,
    "emulated": lambda batch, scalars, **kind: cuda.run(
        batch, scalars, PointerTable(), EmulatedDriver(order=3), **kind
    ),
}
# What is asked of a guarded kernel: (guards of the batch, only counting).
KINDS = {
    "count": ({"sums": True}, True),
    "update_and_count": ({"sums": True}, False),
    "scale": ({"factors": True}, False),
    "scale_and_count": ({"sums": True, "factors": True}, False),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def check_kind(mode, kind, scalars, sizes=batteries.SMALL_SIZES, **options):
    guards, only_count = KINDS[kind]
    for name, run in BACKENDS.items():
        batch = with_guards(make_batch(mode, sizes, **options), **guards)
        want = expected(batch, scalars, only_count=only_count)
        run(batch, scalars, only_count=only_count)
        assert not differences(batch, want), name


@pytest.mark.parametrize("mode", THIRD, ids=lambda mode: mode.name)
@torch.no_grad()
def test_every_mode_gives_the_bits_of_the_oracle(mode):
    cases = scalar_cases()
    check_kind(mode, "count", cases["l2"], offsets=MISALIGNED, seed=1)
    check_kind(mode, "scale_and_count", cases["device_scalars"], special=True, seed=2)


@every_kind
@pytest.mark.parametrize("case", scalar_cases())
@pytest.mark.parametrize("mode", REPRESENTATIVES, ids=lambda mode: mode.name)
@torch.no_grad()
def test_every_way_of_asking_gives_the_bits_of_the_oracle(mode, case, kind):
    check_kind(mode, kind, scalar_cases()[case], sizes=(0, 5, 4099, CHUNK + 5), seed=3)


@pytest.mark.parametrize(
    ("mode", "form"),
    thinned(EVERY_FORM, full=[each for each in EVERY_FORM if each not in FORMS_OF_MODES]),
    ids=lambda value: getattr(value, "name", value),
)
@torch.no_grad()
def test_what_is_counted_and_scaled_is_the_update_in_its_form(mode, form):
    for kind in ("count", "scale_and_count"):
        check_kind(mode, kind, FORMS[form], special=True, seed=8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", REPRESENTATIVES, ids=lambda mode: mode.name)
@torch.no_grad()
def test_a_factor_of_one_and_counting_change_no_bit(mode, backend):
    plain, counted = (make_batch(mode, special=True, seed=4) for _ in range(2))
    ones = list(torch.ones(len(plain.params)))
    counted = replace(with_guards(counted, sums=True), update_factors=ones)
    BACKENDS[backend](plain, SCALARS)
    BACKENDS[backend](counted, SCALARS)
    assert not differences(replace(counted, update_sums=None, update_factors=None), plain)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_what_is_counted_first_is_what_the_update_counts(backend):
    first, second = (
        with_guards(make_batch(REPRESENTATIVES[4], seed=5), sums=True) for _ in range(2)
    )
    BACKENDS[backend](first, SCALARS, only_count=True)
    BACKENDS[backend](second, SCALARS)
    assert torch.equal(torch.stack(first.update_sums), torch.stack(second.update_sums))


@torch.no_grad()
def test_counting_reads_gradient_and_exp_avg_alone_without_l2_decay():
    """8 bytes a param in fp32: where the params are, there is no memory."""
    mode = Mode("fp32", "bf16", "fp32", "fp32")
    for name in ("decoupled", "no_decay", "bias_correction"):
        scalars = scalar_cases()[name]
        for backend, driver in ((host, ()), (cuda, (EmulatedDriver(),))):
            batch = with_guards(make_batch(mode, (CHUNK + 100, 77), seed=6), sums=True)
            want = expected(batch, scalars, only_count=True)
            table = PointerTable()
            backend.run(batch, scalars, table, *driver, only_count=True)
            for sums in batch.update_sums:
                sums.fill_(5)
            for pointer in ("param", "main"):
                table.rows[2 + POINTERS.index(pointer)] = 4096  # aligned, and nobody's
            backend.launch(table, scalars, *driver, only_count=True)
            assert not differences(batch, want)


@torch.no_grad()
def test_more_than_2_to_the_32_elements_are_counted():
    mode = Mode("bf16", "bf16", "bf16", "fp32")
    numel = 2**32 + 77
    make = batteries._untouched
    huge = {
        "params": make(numel, torch.bfloat16),
        "grads": make(numel, torch.bfloat16),
        "exp_avgs": make(numel, torch.bfloat16),
        "main_params": make(numel, torch.float32),
    }
    last = slice(numel // CHUNK * CHUNK, numel)
    huge["grads"][last] = 1.0
    batch = with_guards(Batch(**{name: [tensor] for name, tensor in huge.items()}), sums=True)
    assert batch.mode == mode._replace(is_guarded=True)
    driver = EmulatedDriver(blocks=[0, numel // CHUNK])
    cuda.run(batch, SCALARS, PointerTable(), driver, only_count=True)
    value = torch.full((77,), 0.1 / 0.05**0.5)
    assert abs(batch.update_sums[0][0].item() - 5 - count_squares(value)[0].item()) <= 77


def test_a_square_is_rounded_to_2_to_the_minus_20_and_never_overflows():
    values = torch.tensor([0.0, -1.0, 0.5, 1e-5, 30.0, 32.0, -1e4, 3e38])
    want = np.minimum(np.rint(values.double().numpy() ** 2 * 2**20), 2**30 - 64)
    for value, units in zip(values, want, strict=True):
        assert count_squares(value).tolist() == [units, 0], value
    assert count_squares(values).tolist() == [want.sum(), 0]
    assert (2**30 - 64) * 2**33 < 2**63
    # As the docstring says: what an update can be is below that.
    for step in (1, 2, 10):
        assert update_bound(beta1=0.9, beta2=0.999, step=step, bias_correction=True) < 32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@torch.no_grad()
def test_an_element_that_is_not_finite_makes_the_rms_nan_and_leaves_factors_alone(value):
    # A NaN whose payload is largest, too.
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for update in (torch.tensor([1.0, value]), torch.cat((nan, torch.ones(1)))):
        sums = count_squares(update)
        assert 0 < sums[1] < len(update) and 2**20 <= sums[0] < 2**32
        rms = update_rms(sums, torch.tensor(len(update)))
        assert rms.isnan()
        assert update_factors(rms, max_rms=0.1) == update_factors(rms, match_rms=0.1) == 1
    for name, run in BACKENDS.items():
        batch = with_guards(make_batch(FP32, (100, 100)), sums=True)
        batch.grads[0][7] = value
        batch.update_sums[0].zero_()
        run(batch, SCALARS, only_count=True)
        # An infinite gradient: inf / inf.
        assert batch.update_sums[0][1] == 1 and batch.update_sums[1][1] == 5, name


def test_the_rms_is_that_of_float64_to_the_resolution():
    generator = torch.Generator().manual_seed(0)
    for scale in (3.0, 0.7, 0.2, 0.01):
        update = torch.randn(20_000, generator=generator) * scale
        rms = update_rms(count_squares(update), torch.tensor(update.numel())).item()
        exact = np.sqrt(np.mean(update.double().numpy() ** 2))
        # 2^-21 in the mean square, fp32's rounding of each square, and of the root.
        assert abs(rms**2 - exact**2) <= 2.0**-21 + 4 * 2.0**-24 * exact**2
    assert update_rms(torch.zeros(2, dtype=torch.int64), torch.tensor(0)) == 0


def test_factors_cap_or_match():
    rms = torch.tensor([0.0, 0.05, 0.1, 0.2, 3.0, float("nan")])
    cap = update_factors(rms, max_rms=0.1)
    assert cap.tolist() == pytest.approx([1, 1, 1, 0.5, 1 / 30, 1])
    assert cap[2] == 1
    match = update_factors(rms, match_rms=0.2)
    assert match.tolist() == pytest.approx([1, 4, 2, 1, 1 / 15, 1])
    # A factor that is no fp32 number would make a param infinite.
    assert update_factors(torch.tensor([1e-45]), match_rms=1.0) == 1


@torch.no_grad()
def test_the_sum_of_shards_is_that_of_the_whole():
    generator = torch.Generator().manual_seed(1)
    grad, exp_avg = torch.randn(2, 10_007, generator=generator)
    options = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 1, "lr": 0.1}

    def count(parts):
        sums = torch.zeros(2, dtype=torch.int64)
        for part in parts:
            args = (torch.zeros_like(grad[part]), grad[part], exp_avg[part].clone())
            adams_update_(*args, **options, update_sums=sums)
        return sums.tolist()

    whole = count([slice(None)])
    assert whole == count([slice(5000, None), slice(0, 13), slice(13, 5000)])
    assert whole[0] > 0


@pytest.mark.parametrize("backend", ["host", "foreach"])
@torch.no_grad()
def test_guards_are_arguments_of_the_public_function(backend):
    batch = with_guards(make_batch(FP32, (40, 3)), sums=True, factors=True)
    want = expected(batch, SCALARS)
    names = {"lr", "beta1", "beta2", "eps", "weight_decay"}
    multi_tensor_adams(
        batch.params,
        batch.grads,
        batch.exp_avgs,
        **{name: getattr(SCALARS, name) for name in names},
        step=1,
        update_sums=batch.update_sums,
        update_factors=batch.update_factors,
        backend=backend,
    )
    assert not differences(batch, want)


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("update_sums", [torch.zeros(2, dtype=torch.int64)], "1 update_sums for 2 params"),
        ("update_sums", list(torch.zeros(2, 1, dtype=torch.int64)), "2 torch.int64 elements"),
        ("update_sums", list(torch.zeros(2, 2)), "2 torch.int64 elements"),
        ("update_sums", list(torch.zeros(2, 2, dtype=torch.int64).T), "side by side"),
        ("update_factors", list(torch.zeros(2, 2)), "1 torch.float32 elements"),
        ("update_factors", list(torch.zeros(2).double()), "1 torch.float32 elements"),
    ],
)
def test_guards_that_no_kernel_can_read_are_refused(name, column, message):
    batch = replace(make_batch(FP32, (4, 5)), **{name: column})
    with pytest.raises(ValueError, match=message):
        batch.check()


def test_a_replay_reads_the_factors_on_the_device():
    batch = with_guards(make_batch(FP32, (100,)), factors=True)
    table, driver = PointerTable(), EmulatedDriver()
    cuda.run(batch, SCALARS, table, driver)
    recording = EmulatedDriver(is_recording=True)
    cuda.run(batch, SCALARS, table, recording)
    batch.update_factors[0].fill_(0.25)
    want = expected(batch, SCALARS)
    recording.replay()
    assert not differences(batch, want)
