"""Checks of a kernel's sources, that the tests run on the product and mutate.py on planted faults.

Each takes a `Subject` and raises AssertionError where it is wrong.
"""

import ctypes
import hashlib
import itertools
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_adams.kernels import cuda, host
from megatron_adams.kernels.batch import Batch, Scalars
from megatron_adams.kernels.compile import load_library, source_text
from megatron_adams.kernels.modes import Mode
from megatron_adams.kernels.table import CHUNK, PointerTable
from megatron_adams.precision import split_master, to_fp8
from megatron_adams.update import count_squares
from tests.kernels.checks import (
    DTYPES,
    MISALIGNED,
    check,
    differences,
    expected,
    in_form_of,
    make_batch,
    scalar_cases,
    with_guards,
)
from tests.kernels.emulator import SOURCE, EmulatedDriver, build, load_once

# Every way from tensors to elements, in few elements.
SMALL_SIZES = (0, 1, 7, 33, 0, 4099, CHUNK - 1, CHUNK + 5, 2 * CHUNK, 18, 0)


@dataclass(frozen=True)
class Subject:
    """What is checked: the product's sources and functions, or changed ones."""

    source: Path = SOURCE
    load: Callable[[Mode], ctypes.CDLL] = load_once
    run: Callable[[Batch, Scalars, PointerTable, cuda.Driver], None] = cuda.run
    run_host: Callable[[Batch, Scalars, PointerTable], None] = host.run
    new_table: Callable[[], PointerTable] = PointerTable

    def driver(self, **attributes: object) -> EmulatedDriver:
        return EmulatedDriver(load=self.load, **attributes)

    def emulate(self, order: int = 0) -> Callable[[Batch, Scalars], None]:
        """A backend for checks.py."""
        return lambda batch, scalars: self.run(
            batch, scalars, self.new_table(), self.driver(order=order)
        )


def check_steps(subject: Subject, mode: Mode) -> None:
    """Ways of asking for a step, alignments, special numbers and orders of execution."""
    cases = scalar_cases()
    for number, (name, offsets, special) in enumerate(
        (
            ("device_scalars", (0,), False),
            ("l2", MISALIGNED, True),
            ("decoupled", (0,), True),
            ("found_inf", (0,), False),
        )
    ):
        batch = make_batch(mode, SMALL_SIZES, offsets=offsets, special=special, seed=number)
        scalars = in_form_of(mode, cases[name])
        found = check(subject.emulate(number), batch, scalars, steps=1 if special else 2)
        assert not found, (name, found)


def check_host(subject: Subject, mode: Mode) -> None:
    """The same of the host form, on two threads."""
    cases = scalar_cases()
    for number, (name, special) in enumerate(
        (("device_scalars", False), ("l2", False), ("decoupled", True), ("found_inf", False))
    ):
        batch = make_batch(mode, SMALL_SIZES, offsets=MISALIGNED, special=special, seed=number)
        found = check(
            lambda batch, scalars: subject.run_host(batch, scalars, subject.new_table()),
            batch,
            in_form_of(mode, cases[name]),
            steps=1 if special else 2,
        )
        assert not found, (name, found)


def check_guards(subject: Subject, mode: Mode, *, of_host: bool = False) -> None:
    """Counting the squares of updates, before an update and in it, and scaling updates."""
    cases = scalar_cases()
    # So large an update that the scales of the state depend on its factor.
    cases["huge_lr"] = replace(cases["no_decay"], lr=1e5)
    for number, (name, guards, only_count, special) in enumerate(
        (
            ("device_scalars", {"sums": True}, True, False),
            ("l2", {"sums": True}, True, False),
            ("decoupled", {"sums": True}, False, True),
            ("decoupled", {"sums": True, "factors": True}, False, True),
            ("huge_lr", {"factors": True}, False, False),
            ("found_inf", {"sums": True}, True, False),
        )
    ):
        batch = make_batch(
            mode, SMALL_SIZES, offsets=(0,) if number % 2 else MISALIGNED, special=special
        )
        batch = with_guards(batch, **guards)
        want = expected(batch, cases[name], only_count=only_count)
        if of_host:
            subject.run_host(batch, cases[name], subject.new_table(), only_count=only_count)
        else:
            driver = subject.driver(order=number)
            subject.run(batch, cases[name], subject.new_table(), driver, only_count=only_count)
        found = differences(batch, want)
        assert not found, (name, guards, found)


def check_one_tensor_misaligned(subject: Subject, mode: Mode) -> None:
    """The vector loop is entered only where all tensors of an index have 16-byte alignment."""
    num_columns = 3 if mode.main == "none" else 4
    for column, offset in itertools.product(range(num_columns), (1, 2, 4, 8)):
        offsets = [offset if i == column else 0 for i in range(num_columns)]
        batch = make_batch(mode, (100,), offsets=offsets, seed=5)
        found = check(subject.emulate(), batch, scalar_cases()["decoupled"], steps=1)
        assert not found, (offsets, found)


def check_neighbours(subject: Subject, mode: Mode) -> None:
    """What lies in memory before and behind a tensor is not written."""
    sizes = (1, 5, 16, 33, 4097, CHUNK, CHUNK + 17)
    batch = make_batch(mode, sizes, offsets=(16,), seed=6)
    guarded = []
    for _, column in batch.columns():
        for i, tensor in enumerate(column or ()):
            storage = torch.zeros(tensor.numel() + 32, dtype=_bits_dtype(tensor))
            storage[16:-16] = tensor.view(storage.dtype)
            column[i] = storage[16:-16].view(tensor.dtype)
            guarded.append(storage)
    assert not check(subject.emulate(), batch, scalar_cases()["decoupled"], steps=1)
    for storage in guarded:
        assert not storage[:16].any() and not storage[-16:].any()


def _bits_dtype(tensor: Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]


def check_far_elements(subject: Subject) -> None:
    """Tensors of more than 2^32 elements, in address space without memory; a few chunks run."""
    mode = Mode("bf16", "bf16", "bf16", "fp32")
    numel = 2**32 + 2**31 + 777
    first_chunk = 2  # behind two small tensors
    small = make_batch(mode, (5, 100), seed=7)
    huge = {
        name: _untouched(numel, column[0].dtype)
        for name, column in small.columns()
        if column is not None
    }
    last = numel // CHUNK
    chunks = (0, 1, 2**31 // CHUNK - 1, 2**31 // CHUNK, 2**32 // CHUNK, last - 1, last)
    windows = [slice(chunk * CHUNK, min((chunk + 1) * CHUNK, numel)) for chunk in chunks]
    columns = {name: [tensor[w] for w in windows] for name, tensor in huge.items()}
    views = _batch(columns)
    values = make_batch(mode, [view.numel() for view in views.params], seed=8)
    for (_, targets), (_, sources) in zip(views.columns(), values.columns(), strict=True):
        for target, source in zip(targets or (), sources or (), strict=True):
            target.copy_(source)

    lists = dict(small.columns())
    batch = _batch({name: [*lists[name], tensor] for name, tensor in huge.items()})
    driver = subject.driver(blocks=[first_chunk + chunk for chunk in chunks])
    scalars = scalar_cases()["decoupled"]
    want = expected(views, scalars)
    subject.run(batch, scalars, subject.new_table(), driver)
    assert [launch.num_blocks for launch in driver.launches] == [first_chunk + last + 1]
    found = differences(views, want)
    assert not found, found


def _batch(columns: dict[str, list[Tensor]]) -> Batch:
    return Batch(**columns)


# Of Linux; Python 3.12's mmap does not name it.
_MAP_NORESERVE = 0x4000


def _untouched(numel: int, dtype: torch.dtype) -> Tensor:
    """A tensor of zeros that takes memory only where it is touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


# Loops over the codecs of element.h; {codec} by its name there.
_CODECS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "E4M3": "e4m3", "E5M2": "e5m2"}
_EXPORTS = """
extern "C" void decode_{codec}(const void* stored, float* values, long long count) {{
    using adams::{codec};
    for (long long i = 0; i < count; ++i) {{
        const auto number = static_cast<const {codec}::Storage*>(stored)[i];
        values[i] = {codec}::decode(adams::word_of(number));
    }}
}}
extern "C" void encode_{codec}(const float* values, void* stored, long long count) {{
    using adams::{codec};
    for (long long i = 0; i < count; ++i) {{
        adams::write_word(static_cast<{codec}::Storage*>(stored)[i], {codec}::encode(values[i]));
    }}
}}
"""
_REMAINDERS = """
static void split_stored(float master, unsigned short& high, unsigned short& low) {
    adams::Word high_word, low_word;
    adams::split(master, high_word, low_word);
    adams::write_word(high, high_word);
    adams::write_word(low, low_word);
}
extern "C" void split_all(const float* masters, unsigned short* high, unsigned short* low,
                          long long count) {
    for (long long i = 0; i < count; ++i) split_stored(masters[i], high[i], low[i]);
}
// How many fp32 numbers do not come back from their halves; every `stride`th is tried. A NaN must
// come back as one, in both halves.
extern "C" long long count_lost(long long stride) {
    long long lost = 0;
#pragma omp parallel for reduction(+ : lost)
    for (long long bits = 0; bits < (1ll << 32); bits += stride) {
        const float master = adams::float_of(int(unsigned(bits)));
        unsigned short high, low;
        split_stored(master, high, low);
        const float joined = adams::join(adams::word_of(high), adams::word_of(low));
        const bool is_nan = adams::magnitude(joined) > 0x7f800000 && (high & 0x7fff) > 0x7f80;
        lost += adams::magnitude(master) > 0x7f800000
                    ? !is_nan
                    : adams::bits_of(joined) != adams::bits_of(master);
    }
    return lost;
}
"""


_SQUARES = """
extern "C" void count_each(const float* updates, long long* sums, long long count) {
    for (long long i = 0; i < count; ++i) {
        adams::Squares squares = {0, 0};
        adams::Squares::add(squares, updates[i]);
        sums[2 * i] = squares.sum;
        sums[2 * i + 1] = squares.num_not_finite;
    }
}
"""


def element_library(subject: Subject, folder: Path) -> ctypes.CDLL:
    """The functions of element.h for one element, in loops."""
    text = source_text("element.h", subject.source)
    text += "".join(_EXPORTS.format(codec=codec) for codec in _CODECS) + _REMAINDERS + _SQUARES
    output = folder / f"element-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    flags = (
        "-std=c++17",
        "-O3",
        "-march=native",
        "-shared",
        "-fPIC",
        "-fopenmp",
    )
    build(text, Mode("fp32", "fp32", "fp32", "none"), flags, output)
    return load_library(output.read_bytes(), "element")


def check_codecs(library: ctypes.CDLL) -> None:
    """Every encoding is read, and numbers near each border of two are rounded, as by torch."""
    for codec, name in _CODECS.items():
        dtype = DTYPES[name]
        if dtype == torch.float32:
            continue
        width = 8 * dtype.itemsize
        bits = torch.arange(2**width, dtype=torch.int32)
        integers = bits.to(torch.uint8) if width == 8 else bits.to(torch.uint16).view(torch.int16)
        stored = integers.view(dtype)
        decoded = torch.empty(stored.numel())
        _call(library[f"decode_{codec}"], stored, decoded)
        assert _are_same(decoded, stored.float()), f"{codec}::decode"

        values = _near_borders(decoded[decoded.isfinite()].unique())
        encoded = torch.empty(values.numel(), dtype=dtype)
        _call(library[f"encode_{codec}"], values, encoded)
        want = to_fp8(values, dtype) if width == 8 else values.to(dtype)
        wrong = ~_same(encoded.float(), want.float())
        assert not wrong.any(), (f"{codec}::encode", values[wrong][:5], encoded[wrong][:5])


def _near_borders(numbers: Tensor) -> Tensor:
    """All numbers, the middle between each two, what comes after the last, and what lies beside."""
    beyond = numbers[-1] + (numbers[-1] - numbers[-2]) * torch.tensor([0.5, 1.0, 1.5, 2.0])
    points = torch.cat((numbers, (numbers[1:] + numbers[:-1]) / 2, beyond, -beyond))
    infinity = torch.tensor(float("inf"))
    special = torch.tensor(
        (0.0, -0.0, 1e-45, -1e-45, 1.17549435e-38, 1e-30, 3.4028235e38, float("inf"), float("nan"))
    )
    # Rounded as a number, the first two would become infinity and the last two a number.
    nans = torch.tensor((0x7F800001, -0x7FFFFF, 0x7FFFFFFF, -1), dtype=torch.int32)
    return torch.cat(
        (
            *(points, points.nextafter(infinity), points.nextafter(-infinity)),
            *(special, -special, nans.view(torch.float32)),
        )
    )


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())


def _are_same(a: Tensor, b: Tensor) -> bool:
    return bool(_same(a, b).all())


def _call(function: Callable[..., None], source: Tensor, target: Tensor) -> None:
    function(
        ctypes.c_void_p(source.data_ptr()),
        ctypes.c_void_p(target.data_ptr()),
        ctypes.c_longlong(source.numel()),
    )


def check_squares(library: ctypes.CDLL) -> None:
    """What an update counts for, around each border of two numbers of units, and of no number."""
    units = torch.cat((torch.arange(2000.0), 2.0 ** torch.arange(11, 32)))
    updates = _near_borders(((units * 2.0**-20).sqrt()).unique())
    sums = torch.empty(updates.numel(), 2, dtype=torch.int64)
    _call(library.count_each, updates, sums)
    want = torch.stack([count_squares(update) for update in updates])
    wrong = (sums != want).any(dim=1)
    assert not wrong.any(), (updates[wrong][:5], sums[wrong][:5], want[wrong][:5])
    assert want[:, 1].any() and (want[:, 0] == 2**30 - 64).any()


def check_remainders(library: ctypes.CDLL, stride: int = 1) -> None:
    """Every `stride`th fp32 number comes back from its halves, which are those of split_master."""
    function = library.count_lost
    function.restype = ctypes.c_longlong
    lost = function(ctypes.c_longlong(stride))
    assert lost == 0, f"{lost} of {2**32 // stride} numbers are not what they were"

    masters = torch.arange(-(2**31), 2**31, 16411).to(torch.int32).view(torch.float32)
    high = torch.empty(masters.numel(), dtype=torch.int16)
    low = torch.empty_like(high)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (masters, high, low))
    library.split_all(*pointers, ctypes.c_longlong(masters.numel()))
    want_high, want_low = split_master(masters)
    assert torch.equal(high, want_high.view(torch.int16))
    assert torch.equal(low, want_low)


def check_launches(subject: Subject, modes: Sequence[Mode]) -> None:
    """The table is kept while pointers and sizes are, and a capture may not write one."""
    for mode in modes:
        sizes = [3] * 258 + [CHUNK + 1]
        batch = make_batch(mode, sizes, seed=9)
        table, driver = subject.new_table(), subject.driver()
        scalars = scalar_cases()["decoupled"]
        for num_steps in (1, 2):
            want = expected(batch, scalars)
            subject.run(batch, scalars, table, driver)
            assert not differences(batch, want)
            assert table.num_builds == 1
            names = [launch.entry_point for launch in driver.launches]
            assert names == [*mode.entry_points] * num_steps
        grids = {launch.entry_point: launch.num_blocks for launch in driver.launches}
        assert grids.pop("adams_finish", 2) == 2
        assert set(grids.values()) == {260}

        capturing = subject.driver(is_recording=True)
        subject.run(batch, scalars, table, capturing)
        assert len(capturing.launches) == len(mode.entry_points)
        moved = replace(batch, grads=[grad.clone() for grad in batch.grads])
        for changed in (moved, replace(batch, params=batch.params[:-1])):
            with pytest.raises(RuntimeError, match="CUDA graph"):
                subject.run(changed, scalars, table, capturing)
        assert len(capturing.launches) == len(mode.entry_points)
        for num_builds, changed in ((2, moved), (3, _shorter(moved))):
            want = expected(changed, scalars)
            subject.run(changed, scalars, table, driver)
            assert table.num_builds == num_builds
            assert not differences(changed, want)

        empty = make_batch(mode, (0, 0))
        subject.run(empty, scalars, subject.new_table(), idle := subject.driver())
        assert not idle.launches


def _shorter(batch: Batch) -> Batch:
    """The same tensors, one element less of the last."""
    columns = {
        name: None if column is None else [*column[:-1], column[-1][:-1]]
        for name, column in batch.columns()
    }
    return replace(batch, **columns)


def check_replay(subject: Subject, mode: Mode) -> None:
    """Recorded launches take the device's scalars as they are when they are replayed."""
    batch = make_batch(mode, (100, CHUNK + 3), seed=10)
    scalars = scalar_cases()["device_scalars"]
    table, driver = subject.new_table(), subject.driver()
    subject.run(batch, replace(scalars, found_inf=torch.ones(1)), table, driver)
    recording = subject.driver(is_recording=True)
    before = expected(batch, replace(scalars, found_inf=torch.ones(1)))
    subject.run(batch, scalars, table, recording)
    assert not differences(batch, before), "a capture executes nothing"
    for name, value in (
        ("lr", 0.5),
        ("grad_scale", 1e6),
        ("found_inf", 1.0),
        ("grad_scale", 3.0),
        ("found_inf", float("inf")),
        ("found_inf", 0.0),
        ("correction", 1.0),
        ("lr", 1e-3),
    ):
        getattr(scalars, name).fill_(value)
        want = expected(batch, scalars)
        recording.replay()
        found = differences(batch, want)
        assert not found, (name, value, found)
    assert table.num_builds == 1
