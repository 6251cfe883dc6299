"""A stand-in for CUDA graphs: torch.cuda.CUDAGraph and torch.cuda.graph on the CPU.

As on a GPU, a capture carries nothing out and a replay runs no Python of the captured code: what is
recorded are the ATen and c10d operations with the very tensors that they had, and the launches of
AdamS's kernel with the very pointers. Values that a capture computes are NaN until the first
replay. A host that would wait for the device, or hand it data, ends the capture by
`HostSyncError`, as the driver's errors would. What is not modelled: the memory pool of a graph,
streams, NCCL, and the driver's own rules of what may be captured.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from megatron_adams.kernels import host

_Work: Any = torch._C._distributed_c10d.Work

# Operations whose result the host reads, or whose shape it has to wait for; and data that comes
# from the host.
_SYNCS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::lift_fresh",
    "c10d::barrier",
}
# What waits for the device, or reads its memory, without an operation.
_SYNCING_METHODS = ("cpu", "numpy", "tolist", "pin_memory")


class HostSyncError(RuntimeError):
    """What a GPU's driver would refuse during a capture."""


class CUDAGraph:
    """What was captured, to be replayed.

    Attributes:
        recorded: the name of each operation and launch, in their order.
        num_replays: how often `replay` was called.
    """

    def __init__(self) -> None:
        self.recorded: list[str] = []
        self._steps: list[Callable[[], None]] = []
        self.num_replays = 0

    def append(self, name: str, step: Callable[[], None]) -> None:
        self.recorded.append(name)
        self._steps.append(step)

    @torch.no_grad()
    def replay(self) -> None:
        self.num_replays += 1
        for step in self._steps:
            step()


captured: list[CUDAGraph] = []
"""All graphs of this process."""
_capturing: list[CUDAGraph] = []


@contextmanager
def _graph(graph: CUDAGraph, *_: Any, **__: Any) -> Iterator[None]:
    """torch.cuda.graph."""
    assert not graph.recorded, "a graph is captured once"
    captured.append(graph)
    _capturing.append(graph)
    try:
        with _Recorder(graph):
            yield
    finally:
        _capturing.pop()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _SYNCS:
            raise HostSyncError(f"{name} during the capture of a CUDA graph")
        if name.startswith("profiler::"):
            return func(*args, **kwargs)
        if name.startswith("c10d::"):
            return self._record_collective(func, args, kwargs)
        if func._schema.is_mutable:
            self._graph.append(name, lambda: func(*args, **kwargs))
            return _written_arguments(func, args, kwargs)
        result = func(*args, **kwargs)
        memory = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        fresh = [
            t for t in tree_leaves(result) if isinstance(t, Tensor) and _storage(t) not in memory
        ]
        if fresh:
            self._graph.append(name, lambda: _copy_into(result, func(*args, **kwargs)))
            for tensor in fresh:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
        return result

    def _record_collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        def communicate() -> None:
            for leaf in tree_leaves(func(*args, **kwargs)):
                if isinstance(leaf, torch.ScriptObject):
                    _Work.unbox(leaf).wait()

        self._graph.append(func._schema.name, communicate)

        # All ranks capture: it takes place, on copies, and gives the caller something to wait for.
        def copy(leaf: Any) -> Any:
            return leaf.clone() if isinstance(leaf, Tensor) else leaf

        return func(*tree_map(copy, args), **tree_map(copy, kwargs))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _copy_into(old: Any, new: Any) -> None:
    for target, source in zip(tree_leaves(old), tree_leaves(new), strict=True):
        target.copy_(source)


def _written_arguments(func: Any, args: Any, kwargs: Any) -> Any:
    """What an in-place or out= operation returns: the arguments that it would have written."""
    given = {}
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs[argument.name]
            given[frozenset(argument.alias_info.before_set)] = value
    returned = [given[frozenset(r.alias_info.before_set)] for r in func._schema.returns]
    return None if not returned else returned[0] if len(returned) == 1 else tuple(returned)


class _Library:
    """The library of a kernel, whose launches are recorded during a capture."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __getitem__(self, entry_point: str) -> Callable[..., None]:
        function = self._library[entry_point]

        def launch(*arguments: Any) -> None:
            if _capturing:
                _capturing[-1].append(entry_point, lambda: function(*arguments))
            else:
                function(*arguments)

        return launch


@contextmanager
def installed() -> Iterator[None]:
    """Put the stand-in in the place of torch.cuda's CUDA graphs."""
    load = host.load
    is_initialized: Callable[[], bool] = torch.cuda.is_initialized
    # Names that host.py has imported: those that it calls.
    update_table, update_gradients = (
        vars(host)[name] for name in ("update_table", "update_gradients")
    )

    def refusing(name: str, original: Any) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            if _capturing:
                raise HostSyncError(f"{name} during the capture of a CUDA graph")
            return original(*args, **kwargs)

        return method

    replaced = [
        (torch.cuda, "CUDAGraph", CUDAGraph),
        (torch.cuda, "graph", _graph),
        (torch.cuda, "graph_pool_handle", lambda: (0, 0)),
        (torch.cuda, "is_initialized", lambda: bool(_capturing) or is_initialized()),
        (torch.cuda, "is_current_stream_capturing", lambda: bool(_capturing)),
        (torch.cuda, "synchronize", refusing("synchronize", torch.cuda.synchronize)),
        *(
            (torch.Tensor, name, refusing(name, getattr(torch.Tensor, name)))
            for name in _SYNCING_METHODS
        ),
        (host, "load", lambda mode: _Library(load(mode))),
        (
            host,
            "update_table",
            lambda batch, table: update_table(batch, table, is_capturing=bool(_capturing)),
        ),
        (
            host,
            "update_gradients",
            lambda table, grads: update_gradients(table, grads, is_capturing=bool(_capturing)),
        ),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)
