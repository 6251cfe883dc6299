"""What step.py times: AdamS in every mode, its memory stream, and the optimizers of others.

A contestant's `step` updates tensors that all contestants of a mode share, so that all of them
meet the same pages; each has its own state, but for the stream, which leaves every number as it is.
"""

import ctypes
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_adams import AdamS
from megatron_adams.kernels import Fp8Scaling, Mode, PointerTable, compile, multi_tensor_adams
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
"""Megatron's default bf16 training."""
REMAINDER = Mode("fp32", "bf16", "fp32", "remainder")
BF16_REMAINDER = Mode("bf16", "bf16", "bf16", "remainder")
MODES = (
    FP32,
    MIXED,
    REMAINDER,
    BF16_REMAINDER,
    BF16,
    Mode("bf16", "e4m3", "fp32", "fp32"),
    Mode("bf16", "bf16", "fp16", "fp16"),
    Mode("bf16", "bf16", "e4m3", "fp32"),
)

LR, BETAS, EPS, WEIGHT_DECAY = 1e-5, (0.9, 0.95), 1e-8, 0.1
HYPERPARAMETERS: dict[str, Any] = {"lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY}

Step = Callable[[], None]


@dataclass(frozen=True)
class Contestant:
    """A step to be timed.

    Attributes:
        name: in tables and plots.
        bytes_per_param: what it has to read and write; foreach implementations, and updates that
            are followed by a copy, move more than their algorithm needs, and that counts here only
            where it is a pass of its own.
    """

    name: str
    step: Step
    bytes_per_param: float


def bytes_per_param(mode: Mode) -> int:
    """What an AdamS step reads and writes of the full-size tensors, in bytes a parameter.

    Scaled state is measured before it is written, which reads everything a second time.
    """
    read, written = (sum(side.values()) for side in traffic(mode))
    return read + written + (read if mode.is_scaled else 0)


def traffic(mode: Mode) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes a parameter that one pass of a mode's kernel reads and writes, by `Batch.columns`."""
    widths = {
        "grads": DTYPES[mode.grad].itemsize,
        "params": DTYPES[mode.param].itemsize,
        "exp_avgs": DTYPES[mode.exp_avg].itemsize,
        "main_params": {"none": 0, "remainder": 2, "fp16": 2, "fp32": 4}[mode.main],
    }
    is_read = {**widths, "params": widths["params"] if reads_param(mode) else 0}
    return is_read, {**widths, "grads": 0}


def reads_param(mode: Mode) -> bool:
    """Whether the master weight is in the param, wholly or in part."""
    return mode.main in ("none", "remainder")


class Tensors(NamedTuple):
    """The tensors of a mode, one of each kind; (numel,) each."""

    mode: Mode
    grad: Tensor
    param: Tensor
    exp_avg: Tensor
    main: Tensor | None
    exp_avg_scale: Tensor | None
    main_scale: Tensor | None
    fp8: Fp8Scaling | None


def make_tensors(mode: Mode, numel: int, device: torch.device) -> Tensors:
    """Random gradients and weights, and an exp_avg like one of training; every page written."""
    generator = torch.Generator(device).manual_seed(0)

    def random(scale: float) -> Tensor:
        return torch.randn(numel, generator=generator, device=device).mul_(scale)

    main = exp_avg_scale = main_scale = fp8 = None
    exp_avg = random(1e-3)
    if mode.exp_avg in ("fp16", "e4m3"):
        exp_avg, exp_avg_scale = encode_scaled(exp_avg, DTYPES[mode.exp_avg])
    master = random(0.02)
    if mode.main == "remainder":
        param, main = split_master(master)
    elif mode.param[0] == "e":
        param = to_fp8(master, DTYPES[mode.param])
        one = torch.ones(3, device=device)
        fp8 = Fp8Scaling(one[:1], one[1:2], one[2:])
    else:
        param = master.to(DTYPES[mode.param])
    if mode.main == "fp32":
        main = master
    elif mode.main == "fp16":
        main, main_scale = encode_scaled(master, torch.float16)
    return Tensors(
        mode,
        random(1e-2).to(DTYPES[mode.grad]),
        param,
        exp_avg.to(DTYPES[mode.exp_avg]),
        main,
        exp_avg_scale,
        main_scale,
        fp8,
    )


def adams(tensors: Tensors) -> Contestant:
    """AdamS: the optimizer where it has the mode, otherwise the function that its step calls."""
    mode = tensors.mode
    backend = "cuda" if tensors.grad.is_cuda else "host"
    if mode in (FP32, MIXED):
        master = tensors.param if tensors.main is None else tensors.main
        optimizer, parameter = _over(
            master,
            tensors.grad,
            lambda params: AdamS(params, eps=EPS, kernel=backend, **HYPERPARAMETERS),
        )
        if tensors.main is not None:
            optimizer.model_params[parameter] = tensors.param
        optimizer.state[parameter]["exp_avg"] = tensors.exp_avg
        return Contestant("AdamS", optimizer.step, bytes_per_param(mode))

    def one(tensor: Any) -> list[Any] | None:
        return None if tensor is None else [tensor]

    table = PointerTable()

    @torch.no_grad()
    def step() -> None:
        multi_tensor_adams(
            [tensors.param],
            [tensors.grad],
            [tensors.exp_avg],
            one(tensors.main),
            lr=LR,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            step=1,
            exp_avg_scales=one(tensors.exp_avg_scale),
            main_scales=one(tensors.main_scale),
            fp8_scaling=one(tensors.fp8),
            backend=backend,
            table=table,
        )

    return Contestant("AdamS", step, bytes_per_param(mode))


def stream(tensors: Tensors) -> Contestant:
    """The same tensors read and written in the same passes, with next to no arithmetic."""
    mode = tensors.mode
    source = (Path(__file__).parent / "stream.cpp").read_text("utf-8")
    defines = stream_defines(mode)
    numel = tensors.grad.numel()
    seen = torch.zeros(1, dtype=torch.int32, device=tensors.grad.device)
    columns = (tensors.grad, tensors.param, tensors.exp_avg, tensors.main)
    addresses = [0 if column is None else column.data_ptr() for column in columns]
    entry_points = ["stream_measure"] * mode.is_scaled + ["stream_update"]

    if tensors.grad.is_cuda:
        from cuda.core import Device, LaunchConfig, ObjectCode, Stream, launch

        from megatron_adams.kernels.cuda import arch_of

        Device(tensors.grad.device.index or 0).set_current()
        module = ObjectCode.from_cubin(
            compile.compile_cuda(source, defines, arch_of(tensors.grad.device))
        )
        kernels = [module.get_kernel(name) for name in entry_points]
        config = LaunchConfig(grid=-(-numel // 16384), block=256)
        values = [ctypes.c_longlong(numel), *addresses, ctypes.c_uint(0), seen.data_ptr()]

        def step() -> None:
            current = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
            for kernel in kernels:
                launch(current, config, kernel, *values)

    else:
        compiler = compile.host_compiler()
        if compiler is None:
            raise RuntimeError("no C++ compiler for the stream: install g++ or clang++")
        image = compile.compile_host(source, defines, compiler, compile.host_arch())
        library = compile.load_library(image, "stream")
        arguments = [
            ctypes.c_longlong(numel),
            *map(ctypes.c_void_p, addresses),
            ctypes.c_uint(0),
            ctypes.c_void_p(seen.data_ptr()),
            ctypes.c_int(torch.get_num_threads()),
        ]

        def step() -> None:
            # seen is used: it must live as long as this function.
            assert seen.numel() == 1
            for name in entry_points:
                library[name](*arguments)

    return Contestant("stream", step, bytes_per_param(mode))


def stream_defines(mode: Mode) -> dict[str, str]:
    """The macros of stream.cpp."""
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
        name: in tables and plots.
        device: "cpu", "cuda" or both.
        package: what has to be importable.
        modes: for which `build` works.
        build: makes it for tensors.
        num_states: tensors of state that an update reads and writes.
    """

    name: str
    devices: tuple[str, ...]
    package: str
    modes: tuple[Mode, ...]
    build: Callable[[Tensors], Step]
    num_states: int

    def contestant(self, tensors: Tensors) -> Contestant:
        mode = tensors.mode
        read, written = traffic(mode)
        more_states = 2 * (self.num_states - 1) * DTYPES[mode.exp_avg].itemsize
        # A copy reads the masters once more.
        copy = 4 if mode == MIXED and self.build is not transformer_engine_adam else 0
        moved = sum(read.values()) + sum(written.values()) + more_states + copy
        return Contestant(self.name, self.build(tensors), moved)


def _over(
    tensor: Tensor, grad: Tensor, make: Callable[[list[Tensor]], Any]
) -> tuple[Any, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(tensor)
    parameter.grad = grad
    return make([parameter]), parameter


def with_copy(make: Callable[[list[Tensor]], Any]) -> Callable[[Tensors], Step]:
    """Of a torch optimizer; where the masters are tensors of their own, it is followed by the copy
    into the model's params, as in Megatron."""

    def build(tensors: Tensors) -> Step:
        if tensors.main is None:
            return _over(tensors.param, tensors.grad, make)[0].step
        optimizer, _ = _over(tensors.main, tensors.grad, make)
        main, param = tensors.main, tensors.param

        def step() -> None:
            optimizer.step()
            param.copy_(main)

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


def transformer_engine_adam(tensors: Tensors) -> Step:
    from transformer_engine.pytorch.optimizers import FusedAdam

    mode = tensors.mode
    parameter = torch.nn.Parameter(tensors.param)
    if mode == FP32:
        parameter.grad = tensors.grad
        return FusedAdam([parameter], **HYPERPARAMETERS).step
    parameter.decoupled_grad = tensors.grad
    return FusedAdam(
        [parameter],
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
        tensors.param, tensors.grad, lambda params: FusedAdam(params, **HYPERPARAMETERS)
    )
    return optimizer.step


BOTH, CPU, CUDA = ("cpu", "cuda"), ("cpu",), ("cuda",)
_PLAIN = (FP32, MIXED, BF16)
PEERS = (
    Peer("torch AdamW, fused", BOTH, "torch", _PLAIN, torch_adamw(fused=True), 2),
    Peer("torch AdamW, foreach", BOTH, "torch", _PLAIN, torch_adamw(foreach=True), 2),
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


def peers_of(tensors: Tensors, missing: dict[str, str]) -> Iterator[Contestant]:
    """Those that have the mode and run here; why another does not is put into `missing`."""
    mode = tensors.mode
    device = tensors.grad.device.type
    for peer in PEERS:
        if mode not in peer.modes:
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
        except Exception as exc:  # libraries fail in ways of their own: a build, a driver, a dtype
            reason = str(exc).partition("\n")[0]
            missing[f"{peer.name} in {mode.name}"] = f"failed ({type(exc).__name__}: {reason})"
            continue
        yield contestant
