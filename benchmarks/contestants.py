"""What step.py times: AdamS in every mode, its memory stream, a copy, and other optimizers.

The contestants of a mode share the tensors that their `step` updates, so that all of them use the
same pages of memory. Each has its own state. The stream needs none, because it leaves every number
as it is.
"""

import ctypes
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import multi_tensor_adam
import torch
from launcher import Kernel
from torch import Tensor
from workloads import Workload

from megatron_adams import AdamS
from megatron_adams.kernels import (
    Batch,
    Fp8Scaling,
    Mode,
    PointerTable,
    Scalars,
    compile,
    multi_tensor_adams,
)
from megatron_adams.kernels.tuning import Tuning
from megatron_adams.precision import encode_scaled, split_master, to_fp8

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
FP32 = Mode("fp32", "fp32", "fp32", "none")
BF16 = Mode("bf16", "bf16", "bf16", "none")
MIXED = Mode("fp32", "bf16", "fp32", "fp32")
"""The mode of Megatron's default bf16 training."""
REMAINDER = Mode("fp32", "bf16", "fp32", "remainder")
BF16_REMAINDER = Mode("bf16", "bf16", "bf16", "remainder")
FP8_PARAMS = Mode("bf16", "e4m3", "fp32", "fp32")
FP16_STATE = Mode("bf16", "bf16", "fp16", "fp16")
MODES = (
    FP32,
    MIXED,
    REMAINDER,
    BF16_REMAINDER,
    BF16,
    FP8_PARAMS,
    FP16_STATE,
    Mode("bf16", "bf16", "e4m3", "fp32"),
)

LR, BETAS, EPS, WEIGHT_DECAY = 1e-5, (0.9, 0.95), 1e-8, 0.1
HYPERPARAMETERS: dict[str, Any] = {"lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY}

ADAMS, TUNED, STREAM, COPY = "AdamS", "AdamS, tuned", "stream", "copy"
# The forms of AdamS other than the paper's, and their arguments.
FORMS: dict[str, dict[str, bool]] = {
    "AdamS, cautious": {"cautious": True},
    "AdamS, Nesterov": {"nesterov": True},
}
FUSED, FOREACH = "torch AdamW, fused", "torch AdamW, foreach"
APEX_SHAPE = "Adam in Apex's launch shape"
# How many bytes a copy reads, and writes: more than any cache holds.
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}

Step = Callable[[], object]


@dataclass(frozen=True)
class Contestant:
    """A step to be timed.

    Attributes:
        name: its name in tables and plots.
        step: the function that is timed.
        num_bytes: the bytes that it has to read and write. A copy that follows the update counts.
            What a foreach implementation moves more than its algorithm needs does not.
    """

    name: str
    step: Step
    num_bytes: float


def bytes_per_param(mode: Mode) -> int:
    """Return how many bytes per parameter an AdamS step reads and writes, scalars left out.

    Scaled state is measured before it is written, so everything is read twice.
    """
    read, written = (sum(side.values()) for side in traffic(mode))
    return read + written + (read if mode.is_scaled else 0)


def traffic(mode: Mode) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes per parameter that one pass reads and writes, by `Batch.columns`."""
    widths = _widths(mode)
    is_read = {**widths, "params": widths["params"] if reads_param(mode) else 0}
    return is_read, {**widths, "grads": 0}


def _widths(mode: Mode) -> dict[str, int]:
    return {
        "grads": DTYPES[mode.grad].itemsize,
        "params": DTYPES[mode.param].itemsize,
        "exp_avgs": DTYPES[mode.exp_avg].itemsize,
        "main_params": {"none": 0, "remainder": 2, "fp16": 2, "fp32": 4}[mode.main],
    }


def reads_param(mode: Mode) -> bool:
    """Whether param holds the main param or its upper half."""
    return mode.main in ("none", "remainder")


class Tensors(NamedTuple):
    """The tensors of a mode, one list for each kind. Those with one index are (numel,) each."""

    mode: Mode
    grads: list[Tensor]
    params: list[Tensor]
    exp_avgs: list[Tensor]
    mains: list[Tensor] | None
    exp_avg_scales: list[Tensor] | None
    main_scales: list[Tensor] | None
    fp8: list[Fp8Scaling] | None

    @property
    def device(self) -> torch.device:
        return self.grads[0].device

    @property
    def numel(self) -> int:
        return sum(grad.numel() for grad in self.grads)

    def batch(self) -> Batch:
        return Batch(
            params=self.params,
            grads=self.grads,
            exp_avgs=self.exp_avgs,
            main_params=self.mains,
            exp_avg_scales=self.exp_avg_scales,
            main_scales=self.main_scales,
            fp8_scaling=self.fp8,
        )


def make_tensors(mode: Mode, numels: Sequence[int], device: torch.device) -> Tensors:
    """Make random gradients and params, and an exp_avg as in training. Every page is written."""
    generator = torch.Generator(device).manual_seed(0)
    columns = zip(*(_make_one(mode, numel, generator) for numel in numels), strict=True)
    return Tensors(mode, *(None if column[0] is None else list(column) for column in columns))


def _make_one(mode: Mode, numel: int, generator: torch.Generator) -> tuple[Any, ...]:
    """Make one tensor for each list of `Tensors`."""
    device = generator.device

    def random(scale: float) -> Tensor:
        shape = (numel,)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(
            scale
        )

    main = exp_avg_scale = main_scale = fp8 = None
    exp_avg = random(1e-3)
    if mode.exp_avg in ("fp16", "e4m3"):
        exp_avg, exp_avg_scale = encode_scaled(exp_avg, DTYPES[mode.exp_avg])
    master = random(0.02)
    if mode.main == "remainder":
        param, main = split_master(master)
    elif mode.param[0] == "e":
        param = to_fp8(master, DTYPES[mode.param])
        one = torch.ones(3, device=device, dtype=torch.float32)
        fp8 = Fp8Scaling(one[:1], one[1:2], one[2:])
    else:
        param = master.to(DTYPES[mode.param])
    if mode.main == "fp32":
        main = master
    elif mode.main == "fp16":
        main, main_scale = encode_scaled(master, torch.float16)
    grad = random(1e-2).to(DTYPES[mode.grad])
    exp_avg = exp_avg.to(DTYPES[mode.exp_avg])
    return grad, param, exp_avg, main, exp_avg_scale, main_scale, fp8


def adams(tensors: Tensors, name: str = ADAMS) -> Contestant:
    """Return AdamS as a contestant: for fp32 and mixed, the optimizer; else what its step calls.

    Args:
        name: ADAMS, or for fp32 and mixed also a key of FORMS.
    """
    mode = tensors.mode
    backend = "cuda" if tensors.device.type == "cuda" else "host"
    num_bytes = bytes_per_param(mode) * tensors.numel
    if mode in (FP32, MIXED):
        optimizer, parameters = _over(
            tensors.mains or tensors.params,
            tensors.grads,
            lambda params: AdamS(
                params, eps=EPS, kernel=backend, **HYPERPARAMETERS, **FORMS.get(name, {})
            ),
        )
        for index, parameter in enumerate(parameters):
            if tensors.mains is not None:
                optimizer.model_params[parameter] = tensors.params[index]
            optimizer.state[parameter]["exp_avg"] = tensors.exp_avgs[index]
        return Contestant(name, optimizer.step, num_bytes)

    table = PointerTable()

    @torch.no_grad()
    def step() -> None:
        multi_tensor_adams(
            tensors.params,
            tensors.grads,
            tensors.exp_avgs,
            tensors.mains,
            lr=LR,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            step=1,
            exp_avg_scales=tensors.exp_avg_scales,
            main_scales=tensors.main_scales,
            fp8_scaling=tensors.fp8,
            backend=backend,
            table=table,
        )

    return Contestant(ADAMS, step, num_bytes)


SCALARS = Scalars(
    lr=LR,
    grad_scale=1.0,
    correction=1.0,
    found_inf=None,
    beta1=BETAS[0],
    beta2=BETAS[1],
    eps=EPS,
    weight_decay=WEIGHT_DECAY,
    decoupled_weight_decay=True,
)


def adams_kernel(
    name: str, tensors: Tensors, tuning: Tuning | None = None, chunk: int | None = None
) -> Contestant:
    """Return a contestant that only launches the kernel, with the given constants.

    Args:
        tuning, chunk: None means the product's.
    """
    from megatron_adams.kernels import cuda
    from megatron_adams.kernels.batch import update_table

    driver = make_driver(tensors.device, tensors.mode, tuning)
    table = PointerTable() if chunk is None else PointerTable(chunk)
    update_table(tensors.batch(), table)

    @torch.no_grad()
    def step() -> None:
        # This uses `tensors`, because the table does not keep them alive.
        assert table.num_tensors == len(tensors.params)
        cuda.launch(table, SCALARS, driver)

    return Contestant(name, step, bytes_per_param(tensors.mode) * tensors.numel)


def make_driver(device: torch.device, mode: Mode, tuning: Tuning | None) -> Any:
    """Return what launches the CUDA kernel: a GPU's driver or, for a CPU, the tests' emulator.

    The emulator shows that a script runs to its end. Its times mean nothing.
    """
    if device.type == "cuda":
        from megatron_adams.kernels.cuda import CudaDriver

        return CudaDriver(tuning)
    from tests.kernels import emulator

    library = emulator.load_emulator(mode, tuning=tuning)
    return emulator.EmulatedDriver(load=lambda _: library, constants=tuning)


def copy(device: torch.device, num_bytes: int) -> Contestant:
    """Return a copy within the device's memory, which bandwidths are compared with.

    Args:
        num_bytes: how much is read; as much is written.
    """
    shape = (num_bytes // 4,)
    source = torch.ones(shape, dtype=torch.float32, device=device)
    target = torch.zeros(shape, dtype=torch.float32, device=device)
    return Contestant(COPY, partial(target.copy_, source), 2 * num_bytes)


def stream(tensors: Tensors) -> Contestant:
    """Return a loop with the memory accesses of AdamS's passes and almost no arithmetic."""
    mode = tensors.mode
    (grad,), (param,), (exp_avg,) = tensors.grads, tensors.params, tensors.exp_avgs
    (main,) = tensors.mains or (None,)
    numel = grad.numel()
    seen = torch.zeros(1, dtype=torch.int32, device=grad.device)
    addresses = [0 if t is None else t.data_ptr() for t in (grad, param, exp_avg, main)]
    entry_points = ["stream_measure"] * mode.is_scaled + ["stream_update"]
    arguments = [
        ctypes.c_longlong(numel),
        *map(ctypes.c_void_p, addresses),
        ctypes.c_uint(0),
        ctypes.c_void_p(seen.data_ptr()),
    ]

    if grad.is_cuda:
        from megatron_adams.kernels.cuda import arch_of

        image = _stream_cubin(mode, arch_of(grad.device))
        kernels = [Kernel(image, name) for name in entry_points]

        def step() -> None:
            # This uses `seen`, which must live as long as this function.
            assert seen.numel() == 1
            for kernel in kernels:
                kernel.launch(-(-numel // 16384), 256, arguments)

    else:
        compiler = compile.host_compiler()
        if compiler is None:
            raise RuntimeError("no C++ compiler for the stream: install g++ or clang++")
        image = compile.compile_host(
            stream_source(), stream_defines(mode), compiler, compile.host_arch()
        )
        library = compile.load_library(image, "stream")
        arguments.append(ctypes.c_int(torch.get_num_threads()))

        def step() -> None:
            assert seen.numel() == 1
            for name in entry_points:
                library[name](*arguments)

    return Contestant(STREAM, step, bytes_per_param(mode) * numel)


def stream_source() -> str:
    return (Path(__file__).parent / "stream.cpp").read_text("utf-8")


@cache
def _stream_cubin(mode: Mode, arch: str) -> bytes:
    return compile.compile_cuda(stream_source(), stream_defines(mode), arch)


def stream_defines(mode: Mode) -> dict[str, str]:
    """Return the macros of stream.cpp for a mode."""
    _, width = traffic(mode)
    types = {1: "U8", 2: "U16", 4: "U32", 0: "U8"}
    return {
        "STREAM_GRAD": types[DTYPES[mode.grad].itemsize],
        "STREAM_PARAM": types[width["params"]],
        "STREAM_EXP_AVG": types[width["exp_avgs"]],
        "STREAM_MAIN": types[width["main_params"]],
        "STREAM_HAS_MAIN": str(int(mode.main != "none")),
        "STREAM_READS_PARAM": str(int(reads_param(mode))),
    }


@dataclass(frozen=True)
class Peer:
    """An optimizer of another library.

    Attributes:
        name: its name in tables and plots.
        devices: "cpu", "cuda" or both.
        package: the package that must be importable.
        modes: the modes that `build` works for.
        build: makes the optimizer's step for given tensors.
        num_states: how many tensors of state an update reads and writes.
        num_temporaries: how many tensors as large as the main params it makes during a step.
    """

    name: str
    devices: tuple[str, ...]
    package: str
    modes: tuple[Mode, ...]
    build: Callable[[Tensors], Step]
    num_states: int
    num_temporaries: int = 0

    def contestant(self, tensors: Tensors) -> Contestant:
        mode = tensors.mode
        read, written = traffic(mode)
        more_states = 2 * (self.num_states - 1) * DTYPES[mode.exp_avg].itemsize
        # A copy reads the main params once more.
        copied = 4 if mode == MIXED and self.build is not transformer_engine_adam else 0
        moved = sum(read.values()) + sum(written.values()) + more_states + copied
        return Contestant(self.name, self.build(tensors), moved * tensors.numel)

    def bytes_held(self, mode: Mode) -> int:
        """Return the bytes per parameter that it needs in addition to the shared tensors."""
        return (self.num_states + self.num_temporaries) * DTYPES[mode.exp_avg].itemsize


def _over(
    tensors: list[Tensor], grads: list[Tensor], make: Callable[[list[Any]], Any]
) -> tuple[Any, list[torch.nn.Parameter]]:
    parameters = [torch.nn.Parameter(tensor) for tensor in tensors]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    return make(parameters), parameters


def with_copy(make: Callable[[list[Any]], Any]) -> Callable[[Tensors], Step]:
    """Make a builder of steps from a torch optimizer.

    If there are main params, the step ends with their copy to the model's params, as in Megatron.
    """

    def build(tensors: Tensors) -> Step:
        if tensors.mains is None:
            return _over(tensors.params, tensors.grads, make)[0].step
        mains, params = tensors.mains, tensors.params
        optimizer, _ = _over(mains, tensors.grads, make)

        @torch.no_grad()
        def step() -> None:
            optimizer.step()
            if len(params) == 1:
                params[0].copy_(mains[0])
            else:
                torch._foreach_copy_(params, mains)

        return step

    return build


def torch_adamw(**kwargs: Any) -> Callable[[Tensors], Step]:
    return with_copy(lambda params: torch.optim.AdamW(params, **HYPERPARAMETERS, **kwargs))


def deepspeed(module: str, name: str) -> Callable[[Tensors], Step]:
    def make(params: list[Tensor]) -> Any:
        kwargs = dict(HYPERPARAMETERS)
        if name.startswith("DeepSpeedCPU"):
            kwargs["fp32_optimizer_states"] = params[0].dtype == torch.float32
        return getattr(importlib.import_module(module), name)(params, **kwargs)

    return with_copy(make)


def apex_shape_adam(tensors: Tensors) -> Step:
    _check_apex_shape(tensors.device)

    def make(params: list[Any]) -> multi_tensor_adam.MultiTensorAdam:
        plain = [param.detach() for param in params]
        return multi_tensor_adam.MultiTensorAdam(plain, tensors.grads, eps=EPS, **HYPERPARAMETERS)

    return with_copy(make)(tensors)


# Every process checks it once, before it is timed.
_check_apex_shape = cache(multi_tensor_adam.check)


def transformer_engine_adam(tensors: Tensors) -> Step:
    from transformer_engine.pytorch.optimizers import FusedAdam

    mode = tensors.mode
    parameters = [torch.nn.Parameter(param) for param in tensors.params]
    for parameter, grad in zip(parameters, tensors.grads, strict=True):
        if mode == FP32:
            parameter.grad = grad
        else:
            parameter.decoupled_grad = grad
    if mode == FP32:
        return FusedAdam(parameters, **HYPERPARAMETERS).step
    return FusedAdam(
        parameters,
        **HYPERPARAMETERS,
        master_weights=True,
        use_decoupled_grad=True,
        store_param_remainders=mode.main == "remainder",
        exp_avg_dtype=DTYPES[mode.exp_avg],
        exp_avg_sq_dtype=DTYPES[mode.exp_avg],
    ).step


def apex_adam(tensors: Tensors) -> Step:
    from apex.optimizers import FusedAdam

    optimizer, _ = _over(
        tensors.params, tensors.grads, lambda params: FusedAdam(params, **HYPERPARAMETERS)
    )
    return optimizer.step


BOTH, CPU, CUDA = ("cpu", "cuda"), ("cpu",), ("cuda",)
_PLAIN = (FP32, MIXED, BF16)
PEERS = (
    Peer(FUSED, BOTH, "torch", _PLAIN, torch_adamw(fused=True), 2),
    Peer(FOREACH, BOTH, "torch", _PLAIN, torch_adamw(foreach=True), 2, num_temporaries=2),
    Peer(APEX_SHAPE, CUDA, "cuda.bindings", (FP32, MIXED), apex_shape_adam, 2),
    Peer(
        "DeepSpeedCPUAdam",
        CPU,
        "deepspeed",
        _PLAIN,
        deepspeed("deepspeed.ops.adam", "DeepSpeedCPUAdam"),
        2,
    ),
    Peer(
        "Lion, DeepSpeedCPULion",
        CPU,
        "deepspeed",
        _PLAIN,
        deepspeed("deepspeed.ops.lion", "DeepSpeedCPULion"),
        1,
    ),
    Peer(
        "Lion, DeepSpeed FusedLion",
        CUDA,
        "deepspeed",
        (FP32, MIXED),
        deepspeed("deepspeed.ops.lion", "FusedLion"),
        1,
    ),
    Peer(
        "TransformerEngine FusedAdam",
        CUDA,
        "transformer_engine.pytorch",
        (FP32, MIXED, REMAINDER, BF16_REMAINDER),
        transformer_engine_adam,
        2,
    ),
    Peer("Apex FusedAdam", CUDA, "apex.optimizers", (FP32,), apex_adam, 2),
)


def peers_of(
    tensors: Tensors, missing: dict[str, str], without: frozenset[str] = frozenset()
) -> Iterator[Contestant]:
    """Yield the peers that have the mode and run here; say in `missing` why others do not.

    Args:
        without: the names of peers to leave out.
    """
    mode = tensors.mode
    device = tensors.device.type
    for peer in PEERS:
        if mode not in peer.modes or peer.name in without:
            continue
        if device not in peer.devices:
            missing[peer.name] = f"does not run on {device}"
            continue
        try:
            importlib.import_module(peer.package)
        except ImportError as exc:
            missing[peer.name] = f"not installed ({exc})"
            continue
        try:
            contestant = peer.contestant(tensors)
            contestant.step()
        except Exception as exc:  # each library fails in its own way: a build, a driver, a dtype
            reason = str(exc).partition("\n")[0]
            missing[f"{peer.name} in {mode.name}"] = f"failed ({type(exc).__name__}: {reason})"
            continue
        yield contestant


def bytes_needed(workload: Workload, mode: Mode, device: str, without: frozenset[str]) -> int:
    """Return about how much memory a group of contestants needs."""
    per_param = sum(_widths(mode).values())
    # While they are made, there are fp32 numbers, too.
    per_param += max(
        8,
        sum(
            peer.bytes_held(mode)
            for peer in PEERS
            if mode in peer.modes and device in peer.devices and peer.name not in without
        ),
    )
    return per_param * workload.numel
