"""The machine code that NVRTC makes: wide accesses, nothing in local memory, few registers."""

from collections import Counter
from functools import cache
from itertools import product

import pytest
from cuda.bindings import nvrtc

from megatron_adams.kernels import compile as compiling
from megatron_adams.kernels.modes import Mode
from megatron_adams.kernels.tuning import tuning_of
from tests.harness.thinning import thinned
from tests.kernels import sass
from tests.kernels.checks import FORMS, OTHERS, PAIRS
from tests.kernels.test_backends import FORMS_OF_MODES

if sass.cuobjdump() is None:
    pytest.skip("no triton, whose wheel has cuobjdump", allow_module_level=True)

# Every mode on sm_90, and every second one on the other architectures; --full: all of them.
HALVES = [*product(sass.ARCHS, (PAIRS[::2], PAIRS[1::2]))]
COMPILED = [
    ("sm_90", PAIRS),
    *(half for half in HALVES if half[0] != "sm_90"),
    *product(sass.ARCHS, (OTHERS,)),
]
NOT_COMPILED = [each for each in COMPILED if each[1] in (PAIRS[1::2], OTHERS)]


def name_of(value: object) -> str:
    return value if isinstance(value, str) else f"{len(value)} modes"


# At least four blocks of 256 threads on a multiprocessor.
MAX_REGISTERS = 64
# Bytes. With more registers allowed, NVRTC 13.0 spills in another kernel.
SPILLED = {("sm_100", "g32-p16-m16-w0", "adams_measure"): 8}


@pytest.fixture(scope="module")
def cubins(_own_cache):
    """(modes, arch) -> the modes' cubins."""
    return cache(sass.compile_all)


@pytest.mark.parametrize(
    ("arch", "modes"),
    thinned(COMPILED, full=NOT_COMPILED),
    ids=name_of,
)
@pytest.mark.timeout(600)
def test_nothing_is_spilled_and_registers_are_few(cubins, arch, modes):
    for mode, image in cubins(modes, arch).items():
        used = sass.resources(image)
        assert used.keys() == set(mode.entry_points), mode.name
        for entry_point, (registers, stack, local) in used.items():
            spilled = SPILLED.get((arch, mode.name, entry_point), 0)
            assert (stack, local) == (spilled, 0), (mode.name, entry_point)
            assert registers <= MAX_REGISTERS, (mode.name, entry_point, registers)


def guarded(modes):
    return tuple(mode._replace(is_guarded=True) for mode in modes)


GUARDED = guarded(PAIRS)
OTHERS_GUARDED = guarded(OTHERS)
COUNTING = [
    *(("sm_80", GUARDED[::3]), ("sm_90", GUARDED), ("sm_100", GUARDED[::3])),
    ("sm_90", OTHERS_GUARDED),
]


@pytest.mark.parametrize(("arch", "modes"), thinned(COUNTING, full=COUNTING[3:]), ids=name_of)
@pytest.mark.timeout(600)
def test_kernels_that_count_and_scale_spill_nothing(cubins, arch, modes):
    for mode, image in cubins(modes, arch).items():
        used = sass.resources(image)
        assert used.keys() == {*mode.entry_points, *mode.count_entry_points}, mode.name
        for entry_point, (registers, stack, local) in used.items():
            assert (stack, local) == (0, 0), (mode.name, entry_point)
            assert registers <= MAX_REGISTERS, (mode.name, entry_point, registers)


@pytest.mark.timeout(600)
def test_kernels_of_other_numerators_spill_nothing(cubins):
    modes = tuple(FORMS[form].kernel_of(mode) for mode, form in FORMS_OF_MODES)
    for mode, image in cubins((*modes, *guarded(modes)), "sm_90").items():
        for entry_point, (registers, stack, local) in sass.resources(image).items():
            assert (stack, local) == (0, 0), (mode.name, entry_point)
            assert registers <= MAX_REGISTERS, (mode.name, entry_point, registers)


@pytest.mark.timeout(600)
def test_counting_loads_groups_and_stores_no_tensor(cubins):
    for mode in GUARDED[::2]:
        image = cubins(GUARDED, "sm_90")[mode]
        # Those of an update; but master weights only where L2 decay is asked for.
        assert sass.found_accesses(image, "adams_rms").loads >= _wide(
            sass.expected_accesses(mode, "adams_rms").loads
        ), mode.name
        names = [name.split(".") for name in sass.instructions(image, "adams_rms")]
        assert not {name[0] for name in names} & {"LD", "ST", "LDL", "STL", "STG"}, mode.name
        assert any("64" in name for name in names if name[0] in ("REDG", "RED", "ATOMG"))


def _wide(accesses):
    """Those of more than 32 bits, which single elements have none of."""
    return Counter({bits: count for bits, count in accesses.items() if bits > 32})


# Reading the machine code of one takes longer than compiling it.
@pytest.mark.parametrize(("arch", "modes"), thinned(HALVES, full=HALVES[1::2]), ids=name_of)
@pytest.mark.timeout(600)
def test_a_group_is_moved_in_as_few_accesses_as_there_can_be(cubins, arch, modes):
    for mode in modes:
        for entry_point in mode.entry_points[:2] if arch == "sm_90" else ("adams_update",):
            if entry_point == "adams_finish":
                continue
            image = cubins(PAIRS if arch == "sm_90" else modes, arch)[mode]
            found = sass.found_accesses(image, entry_point)
            want = sass.expected_accesses(mode, entry_point)
            # The table's pointers are loaded in 64 bits, too; and the compiler may write the loop
            # of adams_measure, which is short, more than once.
            assert found.loads >= _wide(want.loads), (mode.name, entry_point)
            assert _wide(found.stores) == _wide(want.stores), (mode.name, entry_point)
            if entry_point == "adams_update":
                assert found.loads[128] == want.loads[128], mode.name
            # Not of unknown memory (LD, ST), nor of a thread's own (LDL, STL).
            names = {name.split(".")[0] for name in sass.instructions(image, entry_point)}
            assert not names & {"LD", "ST", "LDL", "STL"}, mode.name


@pytest.mark.timeout(600)
def test_alternatives_spill_nothing_unless_they_are_told_and_move_their_groups():
    for tuning in sass.ALTERNATIVES:
        for mode, image in sass.compile_all(sass.SHOWN_MODES[::3], "sm_90", tuning).items():
            used = sass.resources(image)["adams_update"]
            if tuning.min_blocks is None:
                assert (used.stack, used.local) == (0, 0), (mode.name, tuning)
            found = sass.found_accesses(image, "adams_update")
            want = sass.expected_accesses(mode, "adams_update", tuning)
            assert _wide(found.stores) == _wide(want.stores), (mode.name, tuning)
            assert found.loads[128] == want.loads[128], (mode.name, tuning)


def test_multiplication_and_addition_are_not_contracted():
    for mode in (Mode("fp32", "fp32", "fp32", "none"), Mode("bf16", "e4m3", "fp16", "fp16")):
        flags = compiling.cuda_flags({**mode.defines(), **tuning_of(mode).defines()})
        text = _ptx(flags)
        assert "fma" not in text
        assert "mad.f32" not in text and ".ftz" not in text and ".approx" not in text
        assert "div.rn.f32" in text and "sqrt.rn.f32" in text
        # What is looked for is there when it may be.
        assert "fma.rn.f32" in _ptx([*flags, "--fmad=true"])


def _ptx(flags):
    arguments = [flag.encode() for flag in ("--gpu-architecture=sm_90", *flags)]
    text = compiling.source_text("device.cu").encode()
    error, program = nvrtc.nvrtcCreateProgram(text, b"device.cu", 0, None, None)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    assert nvrtc.nvrtcCompileProgram(program, len(arguments), arguments) == (error,)
    _, size = nvrtc.nvrtcGetPTXSize(program)
    ptx = bytearray(size)
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(program)
    return ptx.decode()
