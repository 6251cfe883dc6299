"""torch.cuda's stand-in on a CPU.

`STAND_INS` is the whole list of faked names, each with the code that needs it: a file of
Megatron-Core 0.19.2, or one that starts with torch/. What torch.cuda itself does in Python on top
of those names runs as it is. Imports torch and flags.py.
"""

from __future__ import annotations

import functools
import logging
import os
import pkgutil
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.utils._device

from megatron_adams.cpu_rehearsal.flags import RehearsalError

# Hopper, because its rules are the strictest: CUDA_DEVICE_MAX_CONNECTIONS=1 with TP, for one.
_CAPABILITY = (9, 0)


class _DeviceProperties(NamedTuple):
    """What `torch.cuda.get_device_properties` answers; 80 GiB, because Megatron only prints it."""

    name: str = "CPU rehearsal"
    major: int = _CAPABILITY[0]
    minor: int = _CAPABILITY[1]
    total_memory: int = 80 * 2**30
    multi_processor_count: int = 132
    warp_size: int = 32


class _Stream:
    """A stream on which everything has already happened, in program order."""

    cuda_stream = stream_id = device_index = priority = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, -1)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: _Event) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record(self)
        return event

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


class _Event:
    """An event that has happened as soon as it is recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.recorded_at_s = 0.0

    def record(self, stream: _Stream | None = None) -> None:
        self.recorded_at_s = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait(self, stream: _Stream | None = None) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds, as CUDA's."""
        return 1e3 * (end.recorded_at_s - self.recorded_at_s)


class _DeviceGenerator:
    """The GPU's random number generator: two CPU generators, saved and restored as one.

    In-place functions, which initialize parameters under Megatron's RNG tracker, see a CPU tensor
    and draw from the CPU's generator: its state is part of the GPU's. Factories with a GPU device,
    and dropout, draw from `own`. Otherwise Megatron's JIT warm-up, whose shapes depend on the
    layout, would move the CPU's generator, and with `--use-cpu-initialization` TP1 and TP2 would
    start from different weights. Data loaders, which only the first TP rank has, draw from `data`:
    otherwise its CPU generator would run ahead of the other TP ranks'.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.own = torch.Generator(device="cpu")
        self.data = torch.Generator(device="cpu")

    def manual_seed(self, seed: int) -> _DeviceGenerator:
        for generator in (torch.default_generator, self.own, self.data):
            generator.manual_seed(seed)
        return self

    def seed(self) -> int:
        self.manual_seed(torch.default_generator.seed())
        return self.initial_seed()

    def initial_seed(self) -> int:
        return self.own.initial_seed()

    def get_state(self) -> torch.Tensor:
        return torch.cat([torch.default_generator.get_state(), self.own.get_state()])

    def set_state(self, state: torch.Tensor) -> None:
        in_place, own = state.chunk(2)
        # Clones, because set_state of a view at an offset crashes (torch 2.15).
        torch.default_generator.set_state(in_place.clone())
        self.own.set_state(own.clone())


_generator = _DeviceGenerator()


def _is_gpu(device: object) -> bool:
    """Whether a `device` argument means a GPU: 'cuda', 'cuda:1', a torch.device, or an index."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.partition(":")[0] == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _is_cpu(device: object) -> bool:
    return device == "cpu" or device == torch.device("cpu")


def _to_cpu(device: Any) -> Any:
    return torch.device("cpu") if _is_gpu(device) else device


# Builders of stand-ins: each takes the original and returns a new function object, because Dynamo
# keeps its rules by function identity and refuses one function under two names.
_Builder = Callable[[Any], Any]


def _returns(value: Any) -> _Builder:
    return lambda original: lambda *args, **kwargs: value


def _returns_new(factory: Callable[[], Any]) -> _Builder:
    return lambda original: lambda *args, **kwargs: factory()


def _replaced_by(value: Any) -> _Builder:
    return lambda original: value


def _on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory whose GPU device means the CPU, and which pins no memory."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return factory


def _random_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """A random factory that draws from the GPU's generator where a GPU is asked for."""
    factory = _on_cpu(original)

    @functools.wraps(original)
    def random_factory(*args: Any, **kwargs: Any) -> Any:
        if _is_gpu(kwargs.get("device")) and kwargs.get("generator") is None:
            kwargs["generator"] = _generator.own
        return factory(*args, **kwargs)

    return random_factory


def _draws_from_data_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    """A data loader's method that leaves the CPU's generator, which is the GPU's, where it was."""

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        state = torch.default_generator.get_state()
        torch.default_generator.set_state(_generator.data.get_state())
        try:
            return original(*args, **kwargs)
        finally:
            _generator.data.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(state)

    return method


def _dropout(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def dropout(
        input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or not 0.0 < p < 1.0:
            return original(input, p, training, inplace)
        keep = torch.empty_like(input).bernoulli_(1.0 - p, generator=_generator.own)
        return (input.mul_ if inplace else input.mul)(keep.div_(1.0 - p))

    return dropout


def _tensor_to(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs["device"] if "device" in kwargs else args[0] if args else None
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(device)
        elif args:
            args = (_to_cpu(device), *args[1:])
        moved = original(self, *args, **kwargs)
        return moved.clone() if moved is self and _is_cpu(device) else moved

    return to


def _tensor_cpu(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A copy, as from a GPU: a checkpoint's staging would follow the live tensor otherwise."""

    @functools.wraps(original)
    def cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(self, *args, **kwargs).clone()

    return cpu


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """'torch.cuda.FloatTensor' for fp32 and so on; converts where a type is given."""

    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return original(self, dtype, *args, **kwargs)

    return type_


def _returns_self(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def unchanged(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    return unchanged


def _device_context_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, device: Any) -> None:
        original(self, _to_cpu(torch.device(device)))

    return init


def _compile(original: Callable[..., Any]) -> Callable[..., Any]:
    """Nothing is compiled: importing Dynamo alone takes seconds."""

    @functools.wraps(original)
    def compile(model: Any = None, **kwargs: Any) -> Any:
        return model if model is not None else lambda model: model

    return compile


def _set_device(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def set_device(device: Any) -> None:
        index = torch.device(device).index
        if index is None:
            return
        if not 0 <= index < _num_devices():
            raise RuntimeError(
                f"device {index}: a rehearsal has {_num_devices()}, one a local rank"
            )
        _current_device[0] = index

    return set_device


_current_device = [0]
_default_stream = _Stream()


def _num_devices() -> int:
    """Return the local world size, so that `set_device(local_rank)` works."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


class StandIn(NamedTuple):
    """One faked name, how its replacement is built from the original, and what needs it."""

    name: str
    build: _Builder
    needed_by: str


def _group(needed_by: str, build: _Builder, *names: str) -> list[StandIn]:
    return [StandIn(name, build, needed_by) for name in names]


# fmt: off
_FACTORIES = (
    "arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full",
    "linspace", "logspace", "ones", "scalar_tensor", "sparse_coo_tensor", "tensor", "tril_indices",
    "triu_indices", "zeros",
)
_LIKE_FACTORIES = ("empty", "full", "ones", "rand", "randint", "randn", "zeros")
_NEW_FACTORIES = ("empty", "empty_strided", "full", "ones", "tensor", "zeros")
# fmt: on

_CREATES_ON_DEVICE = (
    "core/tensor_parallel/layers.py:ColumnParallelLinear, training/training.py:training_log"
)

STAND_INS: tuple[StandIn, ...] = (
    # Device.
    StandIn(
        "torch.cuda.is_available", _returns(True), "training/initialize.py:initialize_megatron"
    ),
    StandIn(
        "torch.cuda._initialized",
        _replaced_by(True),
        "torch/cuda/__init__.py:is_initialized",
    ),
    # Asking for a GPU once forbids CUDA in forked children; here there is no context to spoil.
    StandIn(
        "torch.cuda._is_in_bad_fork",
        _returns(False),
        "torch/cuda/__init__.py:is_initialized",
    ),
    StandIn(
        "torch.cuda.device_count",
        _returns_new(_num_devices),
        "training/initialize.py:_initialize_distributed",
    ),
    StandIn("torch.cuda.set_device", _set_device, "training/initialize.py:_initialize_distributed"),
    StandIn(
        "torch.cuda.current_device",
        _returns_new(lambda: _current_device[0]),
        "core/parallel_state.py",
    ),
    StandIn(
        "torch.cuda.random.device_count",
        _returns_new(_num_devices),
        "torch/cuda/random.py:manual_seed_all",
    ),
    StandIn(
        "torch.cuda.random.current_device",
        _returns_new(lambda: _current_device[0]),
        "torch/cuda/random.py",
    ),
    StandIn("torch.cuda._exchange_device", _returns(-1), "torch/cuda/__init__.py:device"),
    StandIn("torch.cuda._maybe_exchange_device", _returns(-1), "torch/cuda/__init__.py:device"),
    StandIn(
        "torch.cuda.get_device_capability",
        _returns(_CAPABILITY),
        "training/arguments.py:validate_args",
    ),
    StandIn(
        "torch.cuda.get_device_properties",
        _returns(_DeviceProperties()),
        "training/utils/common_utils.py:get_device_arch_version",
    ),
    StandIn(
        "torch.cuda.get_device_name",
        _returns(_DeviceProperties().name),
        "training/gpu_sniff_test.py",
    ),
    StandIn(
        "torch.accelerator.current_accelerator",
        _returns(None),
        "torch/distributed/distributed_c10d.py, torch/utils/data/dataloader.py:_BaseDataLoaderIter",
    ),
    # Streams and events.
    StandIn(
        "torch.cuda.Stream", _replaced_by(_Stream), "core/distributed/distributed_data_parallel.py"
    ),
    StandIn("torch.cuda.Event", _replaced_by(_Event), "core/utils.py:StragglerDetector"),
    StandIn("torch.cuda.stream", _returns_new(nullcontext), "training/training.py:get_model"),
    StandIn(
        "torch.cuda.current_stream",
        _returns(_default_stream),
        "core/distributed/param_and_grad_buffer.py",
    ),
    StandIn(
        "torch.cuda.default_stream", _returns(_default_stream), "core/transformer/cuda_graphs.py"
    ),
    StandIn("torch.cuda.set_stream", _returns(None), "core/transformer/cuda_graphs.py"),
    StandIn("torch.cuda.synchronize", _returns(None), "core/timers.py:Timer"),
    StandIn(
        "torch.cuda.is_current_stream_capturing",
        _returns(False),
        "core/transformer/moe/token_dispatcher.py",
    ),
    # Random numbers: torch.cuda's functions work on this one tuple.
    StandIn(
        "torch.cuda.default_generators",
        lambda original: (_generator,) * _num_devices(),
        "core/tensor_parallel/random.py:_set_cuda_rng_state, torch/cuda/random.py",
    ),
    StandIn(
        "torch.nn.functional.dropout",
        _dropout,
        "core/fusions/fused_bias_dropout.py, torch/nn/modules/dropout.py",
    ),
    *_group(
        "training/datasets/data_samplers.py:build_pretraining_data_loader",
        _draws_from_data_generator,
        "torch.utils.data.dataloader._BaseDataLoaderIter.__init__",
        "torch.utils.data.dataloader._BaseDataLoaderIter.__next__",
    ),
    *_group(
        "training/initialize.py:_warmup_jit_function", _random_on_cpu, "torch.rand", "torch.randn"
    ),
    *_group(
        "training/gpu_sniff_test.py",
        _random_on_cpu,
        "torch.randint",
        "torch.randperm",
        "torch.normal",
    ),
    # Memory statistics; what else torch.cuda reports is computed from memory_stats.
    *_group(
        "training/training.py:training_log, training/utils/common_utils.py:report_memory",
        _returns_new(lambda: defaultdict(int)),
        "torch.cuda.memory_stats",
        "torch.cuda.memory.memory_stats",
    ),
    *_group(
        "core/distributed/distributed_data_parallel.py, training/training.py:train_step",
        _returns(None),
        "torch.cuda.empty_cache",
        "torch.cuda.memory.empty_cache",
        "torch.cuda.reset_peak_memory_stats",
        "torch.cuda.memory.reset_peak_memory_stats",
    ),
    StandIn(
        "torch.cuda.device_memory_used", _returns(0), "training/utils/common_utils.py:report_memory"
    ),
    # Factories.
    *_group(
        _CREATES_ON_DEVICE,
        _on_cpu,
        *(f"torch.{name}" for name in _FACTORIES),
        *(f"torch.{name}_like" for name in _LIKE_FACTORIES),
        *(f"torch.Tensor.new_{name}" for name in _NEW_FACTORIES),
    ),
    StandIn(
        "torch.utils._device.DeviceContext.__init__",
        _device_context_init,
        "torch/utils/_device.py:DeviceContext",
    ),
    # Tensors.
    StandIn(
        "torch.Tensor.to", _tensor_to, "core/transformer/moe/moe_utils.py:maybe_move_tensor_to_cpu"
    ),
    StandIn(
        "torch.Tensor.cpu",
        _tensor_cpu,
        "core/optimizer/distrib_optimizer.py:get_parameter_state_dp_zero",
    ),
    StandIn(
        "torch.Tensor.cuda",
        _returns_self,
        "training/training.py:get_model",
    ),
    StandIn("torch.Tensor.pin_memory", _returns_self, "torch/utils/data/_utils/pin_memory.py"),
    StandIn(
        "torch.Tensor.record_stream", _returns(None), "core/pipeline_parallel/combined_1f1b.py"
    ),
    StandIn(
        "torch.Tensor.is_cuda",
        lambda original: property(lambda self: self.device.type == "cpu"),
        "core/transformer/moe/moe_utils.py:maybe_move_tensor_to_cpu",
    ),
    StandIn(
        "torch.Tensor.type",
        _tensor_type,
        "core/optimizer/distrib_optimizer.py:DistributedOptimizer",
    ),
    # Compilation.
    StandIn("torch.compile", _compile, "core/jit.py:jit_fuser"),
)


def install(*, force: bool = False) -> None:
    """Replace torch.cuda by the stand-in in this process, once; later calls do nothing.

    Args:
        force: also where a GPU is visible; nothing will run on it.

    Raises:
        RehearsalError: a GPU is visible and `force` is not set, or Megatron is already imported,
            which keeps some of the names that it has imported.
    """
    if _installed:
        return
    if torch.cuda.is_available() and not force:
        raise RehearsalError(
            f"{torch.cuda.device_count()} GPU(s) visible, which a CPU rehearsal would not use: "
            "run without --cpu-rehearsal, hide them (CUDA_VISIBLE_DEVICES=), or give "
            "--force-cpu-rehearsal"
        )
    if "megatron.core" in sys.modules:
        raise RehearsalError(
            "megatron.core is already imported: install the CPU rehearsal before it"
        )
    # Before torch.compile's importers, and for the processes that this one spawns.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Caches the original factories, which is what `with torch.device(...)` compares with.
    torch.utils._device._device_constructors()
    for name, build, _ in STAND_INS:
        owner_name, _, attribute = name.rpartition(".")
        owner = pkgutil.resolve_name(owner_name)
        original = getattr(owner, attribute)
        setattr(owner, attribute, build(original))
        _installed[name] = original
    warnings.filterwarnings(
        "ignore", message="'pin_memory' argument is set as true but no accelerator"
    )
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_moves_no_cpu_rng)


_installed: dict[str, Any] = {}


def _moves_no_cpu_rng(record: logging.LogRecord) -> bool:
    """Drop the RNG tracker's warning: the CPU's generator belongs to the GPU (_DeviceGenerator)."""
    return record.getMessage() != "CPU RNG state changed within GPU RNG context"
