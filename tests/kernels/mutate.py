"""Plant faults in the kernel's sources and expect the tests' checks to catch each of them.

    python -m tests.kernels.mutate [words of a fault's name]

prints a table and exits with 1 if a fault survives. Each fault runs in a process of its own, as
some crash; undefined behaviour is made a crash.
"""

import multiprocessing
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from megatron_adams.kernels import compile as compiling
from megatron_adams.kernels import cuda, host
from megatron_adams.kernels.modes import Mode
from tests.kernels import batteries
from tests.kernels.batteries import Subject
from tests.kernels.emulator import FLAGS, SOURCE, build, device_text

_PACKAGE = SOURCE.parent
AVX2 = "source/bf16_avx2.h"
# Above this level, with AVX-512, and below it that file is not compiled.
AVX2_ARCH = "x86-64-v3"
HOST_ARCH = min(compiling.host_arch(), AVX2_ARCH)
_UNDEFINED_CRASHES = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
_TIMEOUT_S = 60.0

FP32 = Mode("fp32", "fp32", "fp32", "none")
BF16 = Mode("bf16", "bf16", "bf16", "none")
FP32_GRAD = Mode("fp32", "bf16", "bf16", "none")
FP16 = Mode("fp16", "fp16", "fp32", "none")
REMAINDER = Mode("bf16", "bf16", "bf16", "remainder")
BESIDE = Mode("bf16", "bf16", "fp32", "fp32")
SCALED = Mode("fp32", "e4m3", "fp16", "fp16")
FP16_STATE = Mode("bf16", "bf16", "fp16", "fp16")
E5M2 = Mode("bf16", "e5m2", "e4m3", "fp32")
FP32_GRAD_REMAINDER = Mode("fp32", "bf16", "bf16", "remainder")
NESTEROV = FP32._replace(is_nesterov=True)
CAUTIOUS = FP32._replace(is_cautious=True)
NESTEROV_BF16 = BF16._replace(is_nesterov=True)
CAUTIOUS_REMAINDER = REMAINDER._replace(is_cautious=True)
GUARDED = FP32._replace(is_guarded=True)
GUARDED_BF16 = BF16._replace(is_guarded=True)
GUARDED_FP32_GRAD = FP32_GRAD._replace(is_guarded=True)
GUARDED_REMAINDER = REMAINDER._replace(is_guarded=True)
GUARDED_SCALED = SCALED._replace(is_guarded=True)


class Fault(NamedTuple):
    """A change of one file, and the mode in which it shows."""

    name: str
    file: str
    old: str
    new: str
    mode: Mode


def _faults(file: str, *rows: tuple[str, Mode, str, str]) -> Iterator[Fault]:
    for name, mode, old, new in rows:
        yield Fault(name, file, old, new, mode)


FAULTS = (
    *_faults(
        "source/element.h",
        ("bf16: rounding constant", BF16, "bits + 0x7fffu", "bits + 0x7ffeu"),
        ("bf16: ties not to even", BF16, "((bits >> 16) & 1u)", "1u"),
        ("bf16: NaN rounded", BF16, "x != x ? 0x7fc00000u : rounded", "rounded"),
        ("16 bits: read one bit off", BF16, "Word(stored) << 16", "Word(stored) << 15"),
        ("16 bits: written one bit off", BF16, "short)(word >> 16);", "short)(word >> 15);"),
        ("8 bits: read one bit off", SCALED, "Word(stored) << 24", "Word(stored) << 23"),
        ("8 bits: written one bit off", SCALED, "char)(word >> 24);", "char)(word >> 23);"),
        ("fp16: ties not to even", FP16, "- 1 + ((finite >> shift) & 1)", ""),
        ("fp16: NaN rounded", FP16, "size > 0x7f800000 ? NAN_BITS : rounded", "rounded"),
        ("fp16: no limit", FP16, "smaller(normal, LIMIT)", "normal"),
        ("fp16: sign not written", FP16, "<< position | sign", "<< position"),
        ("fp16: sign not read", FP16, "? special : finite) | sign", "? special : finite)"),
        ("fp16: subnormals read as normal", FP16, "< (1 << MANTISSA) ?", "< 1 ?"),
        ("fp16: subnormals written as normal", FP16, "< ((rebias + 1) << 23)", "< 1"),
        ("fp16: infinity read as finite", FP16, "bits >= FIRST_SPECIAL", "bits > FIRST_SPECIAL"),
        ("e4m3: saturates too early", SCALED, "4, 3, 0x7e", "4, 3, 0x7d"),
        ("e4m3: saturates to NaN", SCALED, "4, 3, 0x7e", "4, 3, 0x7f"),
        ("e5m2: saturates to infinity", E5M2, "5, 2, 0x7b", "5, 2, 0x7c"),
        ("remainder: its sign ignored in join", REMAINDER, "Word(int(low) >> 16)", "low >> 16"),
        ("remainder: param truncated", REMAINDER, "high = bits + 0x8000u", "high = bits"),
        ("remainder: NaN carried", REMAINDER, "master != master ? 0x7fff0000u :", ""),
        ("remainder: NaN's low half", REMAINDER, "0x7fff0000u :", "0x7fffffffu :"),
        (
            "v of the new exp_avg",
            FP32,
            "const Float a = exp_avg *",
            "const Float a = (exp_avg * s.beta1 + g * s.one_minus_beta1) *",
        ),
        (
            "v: beta2 and 1 - beta2 swapped",
            FP32,
            "s.beta2 + (g * g) * s.one_minus_beta2",
            "s.one_minus_beta2 + (g * g) * s.beta2",
        ),
        (
            "exp_avg: beta1 and 1 - beta1 swapped",
            FP32,
            "exp_avg = exp_avg * s.beta1 + g * s.one_minus_beta1",
            "exp_avg = exp_avg * s.one_minus_beta1 + g * s.beta1",
        ),
        (
            "nesterov: beta1 and 1 - beta1 swapped",
            NESTEROV,
            "? exp_avg * s.beta1 + g * s.one_minus_beta1",
            "? exp_avg * s.one_minus_beta1 + g * s.beta1",
        ),
        ("nesterov: not asked for", NESTEROV, "(is_nesterov || is_cautious) n", "(is_cautious) n"),
        ("cautious: not asked for", CAUTIOUS, "(is_nesterov || is_cautious) n", "(is_nesterov) n"),
        ("cautious: moved without a gradient", CAUTIOUS, "n * g <= Float{}", "n * g < Float{}"),
        ("cautious: NaN hidden", CAUTIOUS, "<= Float{} ? Float{} : n)", "> Float{} ? n : Float{})"),
        (
            "cautious: gradient without L2's decay",
            CAUTIOUS,
            "gradient_of(grad, param, s);\n    const Float n",
            "grad * s.grad_scale;\n    const Float n",
        ),
        ("eps inside the root", FP32, "square_root(v) + s.eps", "square_root(v + s.eps)"),
        ("no eps", FP32, "square_root(v) + s.eps", "square_root(v)"),
        ("no correction in the update", FP32, "(numerator * s.correction) /", "numerator /"),
        ("no correction in v", FP32, "exp_avg * s.correction;", "exp_avg;"),
        ("grad_scale ignored", FP32, "grad * s.grad_scale", "grad"),
        ("L2 decay as decoupled", FP32, "s.decay == L2 ?", "s.decay == DECOUPLED ?"),
        ("decoupled decay with L2 too", FP32, "s.decay == DECOUPLED", "s.decay != NO_DECAY"),
        (
            "multiplication and subtraction fused",
            FP32,
            "param - u * s.lr",
            "__builtin_fmaf(-u, s.lr, param)",
        ),
        ("scale at its limit", SCALED, "0x7fffff) > (limit", "0x7fffff) >= (limit"),
        ("scale of a NaN's payload", SCALED, "amax = smaller(amax, 0x7f800000);", ""),
        ("scale of zeros", SCALED, "amax == 0 ? 127 :", "amax < 0 ? 127 :"),
        ("main: scale for its inverse", SCALED, "main_new.inverse", "main_new.forward"),
        ("exp_avg: read with the new scale", SCALED, "exp_avg_old.forward", "exp_avg_new.forward"),
        ("fp8 param: scale ignored", SCALED, "? master * scales.param", "? master"),
        (
            "param not written beside main",
            BESIDE,
            "param = ParamCodec::encode(ParamCodec",
            "ParamCodec::encode(ParamCodec",
        ),
        (
            "fp8 param: amax of the scaled master",
            SCALED,
            "larger(amax.param, magnitude(p))",
            "larger(amax.param, magnitude(p * scales.param))",
        ),
        ("exp_avg: no amax", SCALED, "larger(amax.exp_avg, magnitude(m))", "amax.exp_avg"),
        ("atomic maximum: condition reversed", SCALED, "seen < value", "seen > value"),
        ("atomic sum: subtracted", GUARDED, "fetch_add(address, value", "fetch_sub(address, value"),
        ("squares: in other units", GUARDED, "* 1048576.0f", "* 1048575.0f"),
        ("squares: truncated", GUARDED, ": largest) + 0.5f", ": largest) + 0.0f"),
        ("squares: a larger limit", GUARDED, "1073741760.0f", "1073741824.0f"),
        ("squares: NaN converted", GUARDED, "scaled < largest ? scaled : largest", "scaled"),
        ("squares: infinities not counted", GUARDED, ">= 0x7f800000 ? 1", "> 0x7f800000 ? 1"),
        ("squares: of the scaled update", GUARDED, "squares, u);", "squares, u * factor);"),
        ("factor ignored", GUARDED, "u = u * factor;", ""),
        (
            "factor in the decay too",
            GUARDED,
            "move_param(param, u, s);",
            "Scalars t = s; t.weight_decay *= factor; move_param(param, u, t);",
        ),
        (
            "factor: not when measured",
            GUARDED_SCALED,
            "s, scales.update,",
            "s, PASS == MEASURE ? 1.0f : scales.update,",
        ),
        ("counted without L2's decay", GUARDED, "|| s.decay == L2;", "|| false;"),
    ),
    *_faults(
        "source/multi_tensor.h",
        ("found_inf ignored", FP32, "(found_inf && *found_inf != 0.0f)", "(found_inf && false)"),
        ("found_inf: only 1 counts", FP32, "*found_inf != 0.0f", "*found_inf == 1.0f"),
        ("lr's pointer ignored", FP32, "lr_pointer ? *lr_pointer : lr,", "lr,"),
        ("grad_scale's pointer ignored", FP32, "? *grad_scale_pointer", "? grad_scale"),
        ("correction's pointer ignored", FP32, "? *correction_pointer", "? correction"),
        ("search: its condition off by one", FP32, "middle) > index", "middle) >= index"),
        ("search: high off by one", FP32, "high = middle;", "high = middle - 1;"),
        ("search: low off by one", FP32, "low = middle + 1;", "low = middle + 2;"),
        (
            "chunk: counted from the first tensor",
            FP32,
            "t == 0 ? 0 : Table::get(table, CHUNK_END, t - 1)",
            "0",
        ),
        ("chunk: one element short", FP32, "? int(rest) :", "? int(rest) - 1 :"),
        ("chunk: one element over", FP32, "? int(rest) :", "? int(rest) + 1 :"),
        ("chunk: rest in 32 bits", FP32, "const long long rest", "const int rest"),
        ("chunk: offset in 32 bits", FP32, "const long long offset", "const int offset"),
        ("chunk: first of the launch, not of the tensor", SCALED, "index == begin", "index == 0"),
        ("scale_inv is scale", SCALED, "1.0f / chunk.scales.param", "chunk.scales.param"),
        (
            "scale_inv not written",
            SCALED,
            "*Table::pointer<float>(table, PARAM_SCALE_INV, chunk.tensor) =",
            "[[maybe_unused]] const float unused =",
        ),
        ("amax raised where it is larger", SCALED, "if (value > *", "if (value < *"),
        (
            "amax overwritten",
            SCALED,
            "if (value > *(volatile int*)address) atomic_max(address, value)",
            "*address = value",
        ),
        (
            "main's amax in exp_avg's place",
            SCALED,
            "raise(table.amax + table.num_tensors + tensor",
            "raise(table.amax + tensor",
        ),
        (
            "fp8 param: amax not merged",
            SCALED,
            "raise(Table::pointer<int>",
            "(void)(Table::pointer<int>",
        ),
        ("exp_avg's amax not reset", SCALED, "table.amax[t] = 0;", ""),
        ("main's amax not reset", SCALED, " amax = 0;", ""),
        (
            "factors: of the first tensor",
            GUARDED,
            "Table::pointer<const float>(table, UPDATE_FACTOR, t)",
            "Table::pointer<const float>(table, UPDATE_FACTOR, 0)",
        ),
        (
            "sums: of the first tensor",
            GUARDED,
            "Table::pointer<long long>(table, UPDATE_SUM, tensor)",
            "Table::pointer<long long>(table, UPDATE_SUM, 0)",
        ),
        (
            "sums: no pointer looked at",
            GUARDED,
            "UPDATE_SUM, tensor) == 0) return;",
            "UPDATE_SUM, tensor) == 1) return;",
        ),
        (
            "factors: no pointer looked at",
            GUARDED,
            "UPDATE_FACTOR, t) != 0",
            "UPDATE_FACTOR, t) != 1",
        ),
        ("not finite: in the sum's place", GUARDED, "atomic_add(sums + 1,", "atomic_add(sums,"),
        (
            "new scale is its inverse",
            SCALED,
            "scale_for(table.amax[t], largest_scaled<ExpAvg>).forward",
            "scale_for(table.amax[t], largest_scaled<ExpAvg>).inverse",
        ),
        (
            "main's new scale of exp_avg's limit",
            SCALED,
            "scale_for(amax, largest_scaled<Main>)",
            "scale_for(amax, largest_scaled<E4M3>)",
        ),
    ),
    *_faults(
        "source/device.cu",
        ("tail skipped", FP32, "i < chunk.count; i += BLOCK", "i < done; i += BLOCK"),
        ("tail: done twice", FP32, "int i = done + threadIdx.x", "int i = done / 2 + threadIdx.x"),
        ("vector loop: last vector skipped", FP32, "i < end; i +=", "i < end - GROUP; i +="),
        (
            "vector loop: a vector over the end",
            FP32,
            "(chunk.count - begin) / WHOLE * WHOLE",
            "(chunk.count - begin + WHOLE - 1) / WHOLE * WHOLE",
        ),
        ("vector loop: stride of a block", FP32, "i += ROUND", "i += BLOCK"),
        ("alignment of grad dropped", FP32, "is_aligned(chunk.grad) && ", ""),
        ("alignment of param dropped", BESIDE, "is_aligned(chunk.param) && ", ""),
        ("alignment of exp_avg dropped", FP32, "&& is_aligned(chunk.exp_avg)", ""),
        ("alignment of main dropped", BESIDE, "(!has_main || is_aligned(chunk.main))", "true"),
        ("alignment to 8 bytes", FP32, "% 16 == 0", "% 8 == 0"),
        (
            "load: half of the words",
            REMAINDER,
            "i < UNROLL * G::PIECES; ++i) {\n        read_piece",
            "i < UNROLL * G::PIECES / 2; ++i) {\n        read_piece",
        ),
        (
            "remainder's param not loaded",
            REMAINDER,
            "if constexpr (reads_param) read",
            "if constexpr (!has_main) read",
        ),
        ("exp_avg not stored", FP32, "write_groups(chunk.exp_avg + i, exp_avg);", ""),
        (
            "main not stored",
            BESIDE,
            "if constexpr (has_main) write_groups(chunk.main + i, main);",
            "",
        ),
        (
            "param not stored beside main",
            BESIDE,
            "write_groups(chunk.param + i, param);",
            "if (!has_main) write_groups(chunk.param + i, param);",
        ),
        ("amax of one lane", SCALED, "amax.main = __reduce_max_sync(0xffffffffu, amax.main);", ""),
        ("amax of one warp", SCALED, "% warpSize == 0) merge_amax", "== 0) merge_amax"),
        (
            "a lane ends before the reduction",
            SCALED,
            "    if constexpr (PASS == MEASURE || (STORE && Param::is_fp8)) {",
            "    if (int(threadIdx.x) >= chunk.count) return;\n"
            "    if constexpr (PASS == MEASURE || (STORE && Param::is_fp8)) {",
        ),
        ("sums of 24 bits", GUARDED, "{(high << 24) + low,", "{low,"),
        ("sums: not of the low bits", GUARDED, "lane.sum & 0xffffff", "lane.sum & 0xfffffe"),
        ("sums: of one warp", GUARDED, "% warpSize == 0) merge_sq", "== 0) merge_sq"),
        ("sums: of one lane", GUARDED, "squares = of_warp(squares);", ""),
        ("sums: not of an update", GUARDED, "(STORE && is_guarded)", "false"),
        (
            "sums: of a measurement too",
            GUARDED_SCALED,
            "PASS == COUNT || (STORE && is_guarded)",
            "is_guarded",
        ),
        (
            "not finite: of one lane",
            GUARDED,
            "__reduce_add_sync(all, unsigned(lane.num_not_finite))",
            "lane.num_not_finite",
        ),
        ("counted: nothing loaded", GUARDED_REMAINDER, "|| scalars.decay == L2) {", "|| false) {"),
        (
            "counted where a step is skipped",
            GUARDED,
            "adams_rms(ADAMS_PARAMETERS) {\n    if (ADAMS_IS_SKIPPED) return;",
            "adams_rms(ADAMS_PARAMETERS) {",
        ),
        (
            "scale_inv written by other blocks",
            SCALED,
            "if (chunk.is_first &&",
            "if (!chunk.is_first &&",
        ),
        (
            "finish: last tensor left out",
            SCALED,
            "tensor < num_tensors)",
            "tensor < num_tensors - 1)",
        ),
        (
            "measured where a step is skipped",
            SCALED,
            "adams_measure(ADAMS_PARAMETERS) {\n    if (ADAMS_IS_SKIPPED) return;",
            "adams_measure(ADAMS_PARAMETERS) {",
        ),
        (
            "finished where a step is skipped",
            SCALED,
            "adams_finish(ADAMS_PARAMETERS) {\n    if (ADAMS_IS_SKIPPED) return;",
            "adams_finish(ADAMS_PARAMETERS) {",
        ),
    ),
    *_faults(
        "source/host.cpp",
        ("host: first chunk left out", FP32, "long long index = 0;", "long long index = 1;"),
        (
            "host: amax not merged",
            SCALED,
            "merge_amax<STORE>(table",
            "if (false) merge_amax<STORE>(table",
        ),
        (
            "host: maximum of the last element",
            SCALED,
            "main_amax = larger(main_amax, of_element.main);",
            "main_amax = of_element.main;",
        ),
        (
            "host: scale_inv of the first tensor only",
            SCALED,
            "STORE && chunk.is_first",
            "STORE && index == 0",
        ),
        ("host: squares of the last element", GUARDED, "sum += square.sum;", "sum = square.sum;"),
        (
            "host: not finite: of the last element",
            GUARDED,
            "num_not_finite += square.",
            "num_not_finite = square.",
        ),
        ("host: sums not of an update", GUARDED, "(STORE && is_guarded)", "false"),
        (
            "host: sums of a measurement too",
            GUARDED_SCALED,
            "PASS == COUNT || (STORE && is_guarded)",
            "is_guarded",
        ),
        (
            "host: counted where a step is skipped",
            GUARDED,
            "adams_rms(ADAMS_PARAMETERS, int num_threads) {\n    if (ADAMS_IS_SKIPPED) return;",
            "adams_rms(ADAMS_PARAMETERS, int num_threads) {",
        ),
        (
            "host: pairs: read in reverse",
            GUARDED_BF16,
            "return {both << 16, both & 0xffff0000u};",
            "return {both & 0xffff0000u, both << 16};",
        ),
        ("host: pairs: neighbours mixed", GUARDED_BF16, "(pair.high & 0xffff0000u)", "pair.high"),
        (
            "host: pairs: fp32 grads read in reverse",
            GUARDED_FP32_GRAD,
            "word_of(memory[2 * i + 1])",
            "word_of(memory[2 * i])",
        ),
        (
            "host: pairs: last of a block left out",
            GUARDED_BF16,
            "i < BLOCK / 2; ++i) {\n        move_exp_avgs",
            "i < BLOCK / 2 - 1; ++i) {\n        move_exp_avgs",
        ),
        (
            "host: pairs: first pair only",
            GUARDED_BF16,
            "move_params(i, param, main,",
            "move_params(0, param, main,",
        ),
        (
            "host: pairs: over the end",
            GUARDED_BF16,
            "if (count < BLOCK) {",
            "if (false) {",
        ),
        (
            "host: pairs: all of it twice",
            GUARDED_BF16,
            "if (count < BLOCK) {",
            "process_block<PASS>(count, grad, param, exp_avg, main, s, scales, amax, squares);\n"
            "            if (count < BLOCK) {",
        ),
        ("host: exp_avg of the first block", FP32, "chunk.exp_avg + begin", "chunk.exp_avg"),
        ("host: main of the first block", BESIDE, "chunk.main + begin", "chunk.main"),
        (
            "host: rest of a chunk left out",
            FP32,
            "begin < chunk.count; begin += BLOCK",
            "begin + BLOCK <= chunk.count; begin += BLOCK",
        ),
        (
            "host: rest of a chunk as a block",
            FP32,
            "process_block<PASS>(count,",
            "process_block<PASS>(BLOCK,",
        ),
        (
            "host: pairs: exp_avg for the numerator",
            NESTEROV_BF16,
            "numerator_of(m_high, g_high, p_high, s)",
            "m_high",
        ),
        ("host: pairs: L2 without its param", FP16_STATE, "if (s.decay == L2) {", "if (false) {"),
        (
            "host: pairs: remainder not written",
            GUARDED_REMAINDER,
            "if (has_main) write_pair(main, i, w);",
            "",
        ),
        (
            "host: pairs: squares of the last pair",
            GUARDED_REMAINDER,
            "units += of_pair.sum;",
            "units = of_pair.sum;",
        ),
        (
            "host: pairs: not finite: of the last pair",
            GUARDED_REMAINDER,
            "not_finite += of_pair",
            "not_finite = of_pair",
        ),
        (
            "host: pairs: squares of the last block",
            GUARDED_REMAINDER,
            "squares.sum += units;",
            "squares.sum = units;",
        ),
        (
            "host: pairs: not finite: dropped",
            GUARDED_REMAINDER,
            "squares.num_not_finite += not_finite;",
            "",
        ),
        ("host: squares of the last block", GUARDED, "squares.sum += sum;", "squares.sum = sum;"),
        (
            "host: not finite: of the last block",
            GUARDED,
            "squares.num_not_finite += num_not_finite;",
            "squares.num_not_finite = num_not_finite;",
        ),
        (
            "host: maximum of the last block",
            FP16_STATE,
            "amax.main = larger(amax.main, main_amax);",
            "amax.main = main_amax;",
        ),
        (
            "host: a tensor's last element left out",
            FP32,
            "i < count;",
            "i < count - 1;",
        ),
    ),
    *_faults(
        AVX2,
        (
            "avx2: read one bit off",
            BF16,
            "return {_mm256_castsi256_ps(_mm256_slli_epi32(all, 16)),",
            "return {_mm256_castsi256_ps(_mm256_slli_epi32(all, 15)),",
        ),
        ("avx2: neighbours mixed", BF16, "_mm256_and_si256(all, upper)", "all"),
        ("avx2: fp32 grads out of order", FP32_GRAD, "pd(even, 0xd8)", "pd(even, 0xe4)"),
        ("avx2: odd fp32 grads out of order", FP32_GRAD, "pd(odd, 0xd8)", "pd(odd, 0xe4)"),
        ("avx2: upper halves mixed", BF16, "16), odd, 0xaa)", "16), odd, 0xa8)"),
        ("avx2: lower halves mixed", BF16, "(odd, 16), 0xaa)", "(odd, 16), 0xa8)"),
        ("avx2: ties to odd", BF16, "_mm256_andnot_si256(", "_mm256_and_si256("),
        ("avx2: zero goes round", FP32_GRAD, "_mm256_subs_epu16(", "_mm256_sub_epi16("),
        ("avx2: truncated", BF16, "_mm256_add_epi16(halves.upper, up)", "halves.upper"),
        ("avx2: NaN rounded", FP32_GRAD, "if (__builtin_expect(has_nan(p), 0)) {", "if (false) {"),
        ("avx2: NaN's low half", FP32_GRAD_REMAINDER, "? 0x7fff0000 :", "? 0x7fffffff :"),
        ("avx2: NaN of even index only", FP32_GRAD, "ps(x.even, x.odd,", "ps(x.even, x.even,"),
        (
            "avx2: exp_avg's NaN rounded",
            FP32_GRAD,
            "with_nans_as(moved[i / 16], 0x7fc00000)",
            "moved[i / 16]",
        ),
        (
            "avx2: numerator for exp_avg",
            CAUTIOUS_REMAINDER,
            "with_nans_as(moved[i / 16],",
            "with_nans_as(numerators[i / 16],",
        ),
        (
            "avx2: exp_avg for the numerator",
            NESTEROV_BF16,
            "numerator_of(m.odd, g.odd, p.odd, s)",
            "m.odd",
        ),
        ("avx2: remainder's sign ignored", REMAINDER, "_mm256_srai_epi32(", "_mm256_srli_epi32("),
        (
            "avx2: remainder: param truncated",
            REMAINDER,
            "_mm256_add_epi16(halves.upper, _mm256_srli_epi16(halves.lower, 15))",
            "halves.upper",
        ),
        ("avx2: remainder not written", REMAINDER, "write_16(main, halves.lower);", ""),
        (
            "avx2: eps inside the root",
            BF16,
            "_mm256_sqrt_ps(v) + s.eps",
            "_mm256_sqrt_ps(v + s.eps)",
        ),
        ("avx2: L2 without its param", BF16, "if (s.decay == L2) p =", "if (false) p ="),
        ("avx2: exp_avg not written", BF16, "write_16(exp_avg + i, encode_bf16(m));", ""),
        (
            "avx2: last of a block left out",
            BF16,
            "i < COUNT; i += 16) {\n        Main",
            "i < COUNT - 16; i += 16) {\n        Main",
        ),
        (
            "avx2: divisor of the first",
            BF16,
            "divisor = divisors[i / 16];",
            "divisor = divisors[0];",
        ),
        (
            "avx2: numerator of the first",
            BF16,
            "const Sixteen n = numerators[i / 16],",
            "const Sixteen n = numerators[0],",
        ),
    ),
    *_faults(
        "table.py",
        (
            "table: chunks rounded down",
            FP32,
            "-(-size // self.chunk_size)",
            "size // self.chunk_size",
        ),
        (
            "table: a chunk too many",
            FP32,
            "-(-size // self.chunk_size)",
            "size // self.chunk_size + 1",
        ),
        (
            "table: kept though pointers changed",
            FP32,
            "(mode, device, sizes, pointers)",
            "(mode, device, sizes, 0)",
        ),
        (
            "table: kept though sizes changed",
            FP32,
            "(mode, device, sizes, pointers)",
            "(mode, device, 0, pointers)",
        ),
        ("table: written at every step", FP32, "if signature == self._signature:", "if False:"),
        ("table: written in a capture", FP32, "if is_capturing:", "if False:"),
        ("table: amax starts above zero", SCALED, "torch.zeros(2,", "torch.ones(2,"),
    ),
    *_faults(
        "cuda.py",
        (
            "launch: finish for a part of the tensors",
            SCALED,
            "-(-table.num_tensors // num_threads)",
            "table.num_tensors // num_threads",
        ),
        ("launch: of no blocks", FP32, "if table.num_chunks == 0:", "if False:"),
        (
            "launch: measured last",
            SCALED,
            "in entry_points:",
            "in reversed(entry_points):",
        ),
    ),
    *_faults(
        "cuda.py",
        ("launch: counted by an update", GUARDED, "if only_count else", "if False else"),
        ("launch: of the paper's form", NESTEROV, "scalars.kernel_of(table.mode)", "table.mode"),
    ),
    *_faults(
        "batch.py",
        (
            "arguments: grad_scale for correction",
            FP32,
            "*scalar(scalars.correction),",
            "*scalar(scalars.grad_scale),",
        ),
        (
            "arguments: 1 - beta2",
            FP32,
            "ctypes.c_float(1 - scalars.beta2)",
            "ctypes.c_float(1 - scalars.beta1)",
        ),
    ),
)


def faults_of_this_machine() -> list[Fault]:
    """All faults that are compiled here: without AVX2, those of its file are not."""
    return [fault for fault in FAULTS if fault.file != AVX2 or HOST_ARCH == AVX2_ARCH]


def planted(fault: Fault, folder: Path) -> Path:
    """Copy the kernel's sources into `folder`, with the fault if it is in one of them.

    Raises:
        ValueError: the text to be changed does not stand in the file once.
    """
    text = _changed(fault)
    shutil.copytree(SOURCE, folder, dirs_exist_ok=True)
    if fault.file.startswith("source/"):
        (folder / Path(fault.file).name).write_text(text)
    return folder


def _changed(fault: Fault) -> str:
    text = (_PACKAGE / fault.file).read_text()
    if text.count(fault.old) != 1:
        raise ValueError(
            f"fault {fault.name!r}: {fault.old!r} stands {text.count(fault.old)} times in "
            f"{fault.file}: must be once; adapt the fault to the source"
        )
    return text.replace(fault.old, fault.new)


def subject_of(fault: Fault, folder: Path) -> Subject:
    """The product with the fault. Python modules are exchanged in this process, for good."""
    source = planted(fault, folder)

    @cache
    def load(mode):
        library = folder / f"{mode.name}.so"
        build(device_text(mode, source), mode, (*FLAGS, *_UNDEFINED_CRASHES), library)
        return compiling.load_library(library.read_bytes(), mode.name)

    @cache
    def load_host(mode):
        library = folder / f"{mode.name}-host.so"
        # As above, a fault shows in small tensors: -O1 takes half of -O3's time.
        flags = ["-O1" if flag == "-O3" else flag for flag in compiling.host_flags(HOST_ARCH)]
        build(compiling.source_text("host.cpp", source), mode, flags, library)
        return compiling.load_library(library.read_bytes(), mode.name)

    host.load = load_host
    if not fault.file.endswith(".py"):
        return Subject(source=source, load=load)
    _exchange(fault.file, _changed(fault))
    run = cuda.run
    if fault.file == "cuda.py":
        run = sys.modules[cuda.__name__].run
    else:
        run = _exchange("cuda.py", (_PACKAGE / "cuda.py").read_text()).run
    return Subject(run=run, new_table=sys.modules["megatron_adams.kernels.table"].PointerTable)


def _exchange(file: str, text: str) -> ModuleType:
    name = f"megatron_adams.kernels.{Path(file).stem}"
    sys.modules[name] = module = ModuleType(name)
    exec(compile(text, file, "exec"), module.__dict__)
    return module


def checks_for(
    fault: Fault, subject: Subject, folder: Path
) -> Iterator[tuple[str, Callable[[], None]]]:
    """The checks of the tests, each by a name; the fastest first."""
    if fault.file in ("source/host.cpp", AVX2):
        yield "host steps", partial(batteries.check_host, subject, fault.mode)
        if fault.mode.is_guarded:
            yield "host guards", partial(batteries.check_guards, subject, fault.mode, of_host=True)
        return
    if fault.mode.is_guarded:
        yield "guards", partial(batteries.check_guards, subject, fault.mode)
    yield "steps", partial(batteries.check_steps, subject, fault.mode)
    yield "alignments", partial(batteries.check_one_tensor_misaligned, subject, fault.mode)
    yield "neighbours", partial(batteries.check_neighbours, subject, fault.mode)
    yield "replay", partial(batteries.check_replay, subject, fault.mode)
    yield "launches", partial(batteries.check_launches, subject, (fault.mode,))
    yield "far elements", partial(batteries.check_far_elements, subject)
    library = batteries.element_library(subject, folder)
    yield "codecs", partial(batteries.check_codecs, library)
    yield "squares", partial(batteries.check_squares, library)
    yield "remainders", partial(batteries.check_remainders, library, stride=4099)


@torch.no_grad()
def _judge(fault: Fault, folder: Path, report: Callable[[str], None]) -> None:
    """Report each check before it runs, and what it raised; "" if none raised anything."""
    subject = subject_of(fault, folder)
    for name, check in checks_for(fault, subject, folder):
        report(name)
        try:
            check()
        except compiling.CompileError as error:
            report(str(error))
            return
        except (Exception, pytest.fail.Exception) as error:
            report(f"{name}: {type(error).__name__}")
            return
    report("")


def caught_by(fault: Fault) -> str:
    """Plant a fault in a process of its own; return which check caught it, "" if none did.

    Raises:
        RuntimeError: it could not be planted, or does not compile.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_judge, args=(fault, Path(folder), sender.send))
        process.start()
        process.join(_TIMEOUT_S)
        is_hanging = process.is_alive()
        if is_hanging:
            process.kill()
            process.join()
    verdict = None
    while receiver.poll():
        verdict = receiver.recv()
    if verdict is None or "error:" in verdict:
        raise RuntimeError(f"fault {fault.name!r} could not be planted: {verdict}")
    if is_hanging:
        return f"{verdict}: hangs"
    if process.exitcode < 0:
        return f"{verdict}: {signal.Signals(-process.exitcode).name}"
    return verdict


def main() -> int:
    words = sys.argv[1:]
    faults = [
        fault for fault in faults_of_this_machine() if all(word in fault.name for word in words)
    ]
    for fault in faults:
        _changed(fault)
    torch.set_num_threads(1)  # a child of a process that has started OpenMP threads would hang
    with ThreadPoolExecutor() as pool:
        verdicts = list(pool.map(caught_by, faults))
    print("| file | fault | caught by |\n| --- | --- | --- |")
    for fault, verdict in zip(faults, verdicts, strict=True):
        print(f"| {fault.file} | {fault.name} | {verdict or '**nothing**'} |")
    survivors = verdicts.count("")
    print(f"\n{len(faults) - survivors} of {len(faults)} faults are caught.")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
