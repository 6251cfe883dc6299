"""The GPU form of the kernel, executed on the CPU: what test_backends.py does not show of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adams.kernels import PointerTable, cuda
from megatron_adams.kernels.batch import Batch
from megatron_adams.kernels.modes import ALL_MODES, Mode
from megatron_adams.kernels.table import CHUNK
from tests.kernels import batteries
from tests.kernels.batteries import Subject
from tests.kernels.checks import (
    MISALIGNED,
    SCALARS,
    check,
    differences,
    expected,
    make_batch,
    scalar_cases,
)
from tests.kernels.test_backends import REPRESENTATIVES, run_emulated, run_host

SUBJECT = Subject()
REPRESENTATIVE = pytest.mark.parametrize("mode", REPRESENTATIVES, ids=lambda mode: mode.name)


@REPRESENTATIVE
@pytest.mark.parametrize("order", [1, 2, 3])
@torch.no_grad()
def test_the_order_of_blocks_warps_and_lanes_does_not_show(mode, order):
    for offsets in ((0,), MISALIGNED):
        batch = make_batch(mode, batteries.SMALL_SIZES, offsets=offsets, special=order == 3)
        assert not check(SUBJECT.emulate(order), batch, SCALARS, steps=1)


@REPRESENTATIVE
@torch.no_grad()
def test_any_alignment_of_each_tensor(mode):
    batteries.check_one_tensor_misaligned(SUBJECT, mode)


@REPRESENTATIVE
@torch.no_grad()
def test_the_memory_around_a_tensor_is_not_written(mode):
    batteries.check_neighbours(SUBJECT, mode)


@settings(max_examples=80, deadline=None)
@given(
    mode=st.sampled_from(ALL_MODES),
    case=st.sampled_from(sorted(scalar_cases())),
    sizes=st.lists(
        st.one_of(st.integers(0, 70), st.integers(CHUNK - 20, 2 * CHUNK + 20)),
        min_size=1,
        max_size=12,
    ),
    offsets=st.lists(st.integers(0, 16), min_size=1, max_size=7),
    special=st.booleans(),
    order=st.integers(0, 100),
    seed=st.integers(0, 2**16),
)
@torch.no_grad()
def test_any_batch_gives_the_bits_of_the_oracle(mode, case, sizes, offsets, special, order, seed):
    # Two backends on the same numbers, so that host and GPU are compared too, NaN for NaN.
    scalars = scalar_cases()[case]
    batches = [
        make_batch(mode, sizes, offsets=offsets, special=special, seed=seed) for _ in range(2)
    ]
    want = expected(batches[0], scalars)
    SUBJECT.emulate(order)(batches[0], scalars)
    run_host(batches[1], scalars)
    assert not differences(batches[0], want)
    assert not differences(batches[1], want)


@pytest.mark.parametrize("correction", [1.0, 2.5])
@pytest.mark.parametrize("decoupled", [True, False])
@torch.no_grad()
def test_a_step_is_the_formula_in_float64(correction, decoupled):
    batch = make_batch(Mode("fp32", "fp32", "fp32", "none"), (CHUNK + 100,), seed=11)
    if not decoupled:
        # No cancellation in grad + decay * param: what remains could be all rounding error.
        batch.params[0].copysign_(batch.grads[0])
    scalars = replace(
        SCALARS, grad_scale=0.5, correction=correction, decoupled_weight_decay=decoupled
    )
    beta1, beta2, lr, decay = scalars.beta1, scalars.beta2, scalars.lr, scalars.weight_decay
    p, g, m = (column[0].double().numpy() for column in (batch.params, batch.grads, batch.exp_avgs))
    g = g * scalars.grad_scale + (0 if decoupled else decay * p)
    denominator = np.sqrt(beta2 * (correction * m) ** 2 + (1 - beta2) * g**2) + scalars.eps
    new_m = beta1 * m + (1 - beta1) * g
    decayed = decay * p if decoupled else 0
    new_p = p - lr * (correction * new_m / denominator + decayed)

    run_emulated(batch, scalars)

    got_p, got_m = (column[0].double().numpy() for column in (batch.params, batch.exp_avgs))
    # Half an ulp for each rounding, of a scalar too: at most 3 in g, so 6 in a term of exp_avg; 8
    # more in the root and the rest of the update; one where param is written. In a sum each counts
    # relative to the terms, which may cancel.
    half_ulp = 2.0**-24
    m_error = 6 * half_ulp * (beta1 * np.abs(m) + (1 - beta1) * np.abs(g))
    terms = correction * (beta1 * np.abs(m) + (1 - beta1) * np.abs(g)) / denominator
    p_error = half_ulp * (1.01 * np.abs(new_p) + 14 * lr * (terms + np.abs(decayed)))
    assert (np.abs(got_m - new_m) <= m_error).all()
    assert (np.abs(got_p - new_p) <= p_error).all()


@torch.no_grad()
def test_more_than_2_to_the_32_elements():
    batteries.check_far_elements(SUBJECT)


@pytest.mark.parametrize("mode", REPRESENTATIVES[::4], ids=lambda mode: mode.name)
@torch.no_grad()
def test_many_tiny_tensors_in_one_launch(mode):
    sizes = [i * i % 7 for i in range(1500)]
    wide = make_batch(mode, (sum(sizes) + 16,), offsets=(1, 2), seed=12)
    batch = Batch(
        **{
            name: None if column is None else list(column[0][: sum(sizes)].split(sizes))
            for name, column in wide.columns()
        },
        **_scales(wide, len(sizes)),
    )
    driver = SUBJECT.driver()
    want = expected(batch, SCALARS)
    cuda.run(batch, SCALARS, PointerTable(), driver)
    assert not differences(batch, want)
    assert len(driver.launches) == len(mode.entry_points)


def _scales(batch, count):
    """Each tensor's scales, repeated."""

    def copies(column):
        return None if column is None else [column[0].clone() for _ in range(count)]

    fp8 = batch.fp8_scaling
    return {
        "exp_avg_scales": copies(batch.exp_avg_scales),
        "main_scales": copies(batch.main_scales),
        "fp8_scaling": fp8 and [type(fp8[0])(*(x.clone() for x in fp8[0])) for _ in range(count)],
    }


@REPRESENTATIVE
@torch.no_grad()
def test_nothing_but_zero_size_tensors_launches_nothing(mode):
    for sizes in ((0,), (0, 0, 0)):
        batch = make_batch(mode, sizes)
        driver = SUBJECT.driver()
        want = expected(batch, SCALARS)
        cuda.run(batch, SCALARS, PointerTable(), driver)
        assert driver.launches == []
        run_host(batch, SCALARS)
        assert not differences(batch, want)


@pytest.fixture(scope="module")
def element_library(tmp_path_factory):
    return batteries.element_library(SUBJECT, tmp_path_factory.mktemp("element"))


def test_every_encoding_and_every_rounding_is_torchs(element_library):
    batteries.check_codecs(element_library)


def test_what_an_update_counts_for_is_that_of_the_oracle(element_library):
    batteries.check_squares(element_library)


def test_all_fp32_numbers_come_back_from_a_param_and_its_remainder(element_library):
    batteries.check_remainders(element_library)
