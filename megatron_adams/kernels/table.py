"""The table of tensors that a kernel reads: pointers and sizes, in the memory of its device.

Its layout is that of `Field` in source/multi_tensor.h.
"""

from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megatron_adams.kernels.modes import Mode

# Elements of a chunk, which is what one block of a GPU takes: a multiple of 16. On a GPU, tensors
# of all sizes are updated faster in smaller ones (benchmarks/results has the sweep).
CHUNK = 16384
GPU_CHUNK = 4096

# The rows behind NUMEL and CHUNK_END, in their order there.
POINTERS = (
    "grad",
    "param",
    "exp_avg",
    "main",
    "param_scale",
    "param_amax",
    "param_scale_inv",
    "exp_avg_scale",
    "main_scale",
    "update_sum",
    "update_factor",
)


# NUMEL and CHUNK_END come before the pointers, of which grad is the first.
_GRAD_ROW = 2


class PointerTable:
    """The table of one call site; it is written again only when a pointer or a size changed.

    Where the gradients alone have moved, `move_gradients` writes their row.

    It keeps no tensor alive.

    Args:
        chunk_size: elements of a chunk, a multiple of 16. None: GPU_CHUNK on a GPU, else CHUNK.

    Attributes:
        chunk_size: of the tensors that the table describes.
        mode: the dtypes of the tensors.
        device: where they are, and `rows`.
        rows: (2 + len(POINTERS), num_tensors) int64 on the kernel's device.
        amax: (2, num_tensors) int32 there; the kernel's workspace, zero between steps.
        num_chunks: of all tensors together.
        num_builds: how often the whole table was written.
    """

    mode: Mode
    device: torch.device

    def __init__(self, chunk_size: int | None = None) -> None:
        assert chunk_size is None or chunk_size % 16 == 0
        self._given_chunk_size = chunk_size
        self.chunk_size = chunk_size or CHUNK
        self.rows = torch.empty(0, dtype=torch.int64, device="cpu")
        self.amax = torch.empty(0, dtype=torch.int32, device="cpu")
        self.num_tensors = self.num_chunks = self.num_builds = 0
        self._signature: object = None
        self._on_host = self.rows
        # Where `rows` and `amax` were allocated, on a GPU.
        self._rows_stream: torch.cuda.Stream | None = None
        self._amax_stream: torch.cuda.Stream | None = None
        self._pointers: list[list[int] | None] = []

    def update(
        self,
        tensors: Sequence[Sequence[Tensor] | None],
        *,
        mode: Mode,
        device: torch.device,
        is_capturing: bool = False,
    ) -> None:
        """Describe these tensors.

        Args:
            tensors: for each name of POINTERS, the tensors, or None where the mode has none. They
                must outlive the launch.
            mode: their dtypes.
            device: whose memory the table lies in.
            is_capturing: whether a CUDA graph is being captured on the current stream.
        Raises:
            RuntimeError: the table would have to be copied to the device during a capture.
        """
        grads = tensors[0]
        assert grads is not None
        sizes = [grad.numel() for grad in grads]
        pointers = [
            None if column is None else [tensor.data_ptr() for tensor in column]
            for column in tensors
        ]
        signature = (mode, device, sizes, pointers)
        if signature == self._signature:
            return
        _refuse_capture(is_capturing)
        self.chunk_size = self._given_chunk_size or (GPU_CHUNK if device.type == "cuda" else CHUNK)
        chunk_ends = list(accumulate(-(-size // self.chunk_size) for size in sizes))
        nothing = [0] * len(sizes)
        table = torch.tensor(
            [sizes, chunk_ends, *(column or nothing for column in pointers)],
            dtype=torch.int64,
            device="cpu",
        )
        self.mode, self.device = mode, device
        self._put(table)
        self.amax = torch.zeros(2, len(sizes), dtype=torch.int32, device=device)
        self._amax_stream = self._rows_stream
        self.num_tensors, self.num_chunks = len(sizes), chunk_ends[-1]
        self.num_builds += 1
        self._signature, self._pointers = signature, pointers

    @property
    def grads(self) -> list[int]:
        """Where the gradients are."""
        grads = self._pointers[0]
        assert grads is not None
        return grads

    def move_gradients(self, grads: list[int], *, is_capturing: bool = False) -> None:
        """Describe the same tensors with the gradients at other addresses.

        Args:
            grads: one address for each; dtypes, shapes and strides are as before.
            is_capturing: as `update`.
        Raises:
            RuntimeError: as `update`.
        """
        if grads == self.grads:
            return
        _refuse_capture(is_capturing)
        # In memory of its own: a kernel on its way, or a graph, reads the table before.
        table = self._on_host.clone()
        table[_GRAD_ROW] = torch.frombuffer(array("q", grads), dtype=torch.int64)
        self._put(table)
        # `_signature` has this list of lists.
        self._pointers[0] = [*grads]

    def _put(self, table: Tensor) -> None:
        """Have `rows` be a table that was written on the host."""
        self._on_host = self.rows = table
        if self.device.type == "cuda":
            # The host allocator keeps the pinned memory until the copy is done.
            self.rows = table.pin_memory().to(self.device, non_blocking=True)
            self._rows_stream = torch.cuda.current_stream(self.device)

    def is_of(self, stream: torch.cuda.Stream) -> bool:
        """Whether the memory of `rows` and `amax` was allocated on this stream."""
        return bool(stream == self._rows_stream == self._amax_stream)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Have the allocator keep the memory until what this stream has to do now is done."""
        for tensor in (self.rows, self.amax):
            tensor.record_stream(stream)


def _refuse_capture(is_capturing: bool) -> None:
    if is_capturing:
        raise RuntimeError(
            "tensors have other addresses than at the step before, while a CUDA graph is being "
            "captured: their table cannot be copied to the device now. Take one step with the "
            "same tensors before the capture, and keep the gradients where they are "
            "(zero_grad(set_to_none=False))"
        )
