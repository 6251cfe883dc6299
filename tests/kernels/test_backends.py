"""Every backend gives the bits of update.py: host, foreach, and the GPU's kernel, emulated."""

import itertools

import pytest
import torch

from megatron_adams.kernels import PointerTable, cuda, foreach, host
from megatron_adams.kernels.cache import KernelCache
from megatron_adams.kernels.compile import (
    HOST_ARCHS,
    host_arch,
    host_compiler,
    host_recipe,
    load_library,
)
from megatron_adams.kernels.modes import ALL_MODES, Mode
from tests.harness.thinning import thinned
from tests.kernels.checks import (
    FORMS,
    MISALIGNED,
    SIZES,
    THIRD,
    check,
    check_all,
    make_batch,
    scalar_cases,
)
from tests.kernels.emulator import EmulatedDriver

# Every kind of state, and of the tensors' widths.
REPRESENTATIVES = (
    Mode("fp32", "fp32", "fp32", "none"),
    Mode("bf16", "bf16", "bf16", "remainder"),
    Mode("fp16", "fp16", "e4m3", "none"),
    Mode("bf16", "bf16", "fp32", "fp32"),
    Mode("fp32", "e4m3", "fp16", "fp16"),
    Mode("bf16", "e5m2", "e4m3", "fp32"),
)


def run_emulated(batch, scalars):
    cuda.run(batch, scalars, PointerTable(), EmulatedDriver())


def run_host(batch, scalars):
    host.run(batch, scalars, PointerTable())


every_mode = pytest.mark.parametrize(
    "mode",
    thinned(ALL_MODES, full=[mode for mode in ALL_MODES if mode not in THIRD]),
    ids=lambda mode: mode.name,
)
BACKENDS = {"host": run_host, "foreach": foreach.run, "emulated": run_emulated}


@every_mode
@torch.no_grad()
def test_every_mode_gives_the_bits_of_the_oracle(mode):
    cases = scalar_cases()
    for name, offsets in (("device_scalars", (0,)), ("l2", MISALIGNED)):
        wrong = check_all(
            BACKENDS,
            lambda offsets=offsets: make_batch(mode, offsets=offsets, seed=1),
            cases[name],
        )
        assert not wrong, name


@every_mode
@torch.no_grad()
def test_special_numbers_give_the_bits_of_the_oracle(mode):
    scalars = scalar_cases()["decoupled"]
    assert not check_all(
        BACKENDS, lambda: make_batch(mode, (4096, 17), special=True, seed=2), scalars, steps=1
    )


@pytest.mark.parametrize("case", scalar_cases())
@pytest.mark.parametrize("mode", REPRESENTATIVES, ids=lambda mode: mode.name)
@torch.no_grad()
def test_every_way_of_asking_for_a_step_gives_the_bits_of_the_oracle(mode, case):
    scalars = scalar_cases()[case]
    assert not check_all(BACKENDS, lambda: make_batch(mode, seed=3), scalars)


# Each mode with one of the three forms; --full: with all.
FORMS_OF_MODES = list(zip(REPRESENTATIVES, itertools.cycle(FORMS)))
EVERY_FORM = [*itertools.product(REPRESENTATIVES, FORMS)]


@pytest.mark.parametrize(
    ("mode", "form"),
    thinned(EVERY_FORM, full=[each for each in EVERY_FORM if each not in FORMS_OF_MODES]),
    ids=lambda value: getattr(value, "name", value),
)
@torch.no_grad()
def test_every_form_of_the_update_gives_the_bits_of_the_oracle(mode, form):
    for special in (False, True):
        wrong = check_all(
            BACKENDS,
            lambda special=special: make_batch(mode, offsets=MISALIGNED, special=special, seed=6),
            FORMS[form],
            steps=1 if special else 2,
        )
        assert not wrong, special


@torch.no_grad()
def test_the_loops_for_avx2_have_every_form(monkeypatch):
    arch = "x86-64-v3" if host_arch() in HOST_ARCHS[1:] else host_arch()
    for form, main in (("nesterov", "remainder"), ("cautious", "none"), ("cautious", "remainder")):
        mode, scalars = Mode("bf16", "bf16", "bf16", main), FORMS[form]
        recipe = host_recipe(scalars.kernel_of(mode), arch, host_compiler())
        library = load_library(KernelCache().get(*recipe), mode.name)
        monkeypatch.setattr(host, "load", lambda _, library=library: library)
        batch = make_batch(mode, offsets=MISALIGNED, special=True, seed=7)
        assert not check(run_host, batch, scalars, steps=1), (form, main)


@pytest.mark.parametrize("main", ["none", "remainder"])
@pytest.mark.parametrize("grad", ["fp32", "bf16"])
@torch.no_grad()
def test_every_level_of_the_cpu_gives_the_bits_of_the_oracle(grad, main, monkeypatch):
    # With AVX2 and without AVX-512, these modes have loops of their own.
    mode, highest = Mode(grad, "bf16", "bf16", main), host_arch()
    archs = [highest]
    if highest in HOST_ARCHS:
        archs = ["x86-64", *HOST_ARCHS[: HOST_ARCHS.index(highest) + 1]]
    kernels, compiler, cases = KernelCache(), host_compiler(), scalar_cases()
    for arch in archs:
        library = load_library(kernels.get(*host_recipe(mode, arch, compiler)), mode.name)
        monkeypatch.setattr(host, "load", lambda _, library=library: library)
        for case in ("decoupled", "l2", "bias_correction"):
            batch = make_batch(mode, offsets=MISALIGNED, special=True, seed=5)
            assert not check(run_host, batch, cases[case], steps=1), (arch, case)


@pytest.mark.parametrize("num_threads", [2, 7])
@torch.no_grad()
def test_threads_of_the_host_do_not_show_in_the_bits(num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for mode in REPRESENTATIVES:
            batch = make_batch(mode, (100_000, *SIZES), offsets=MISALIGNED, seed=4)
            assert not check(run_host, batch, scalar_cases()["decoupled"]), mode.name
    finally:
        torch.set_num_threads(before)
