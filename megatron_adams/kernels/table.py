"""The table of tensors that a kernel reads: pointers and sizes, in the memory of its device.

Its layout is that of `Field` in source/multi_tensor.h.
"""

from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megatron_adams.kernels.modes import Mode

# Elements of a chunk, a multiple of 16. One block of a GPU takes one chunk. On a GPU, tensors of
# all sizes are updated faster in smaller chunks (benchmarks/results has the sweep).
CHUNK = 16384
GPU_CHUNK = 4096

# The rows behind NUMEL and CHUNK_END, in the order of `Field`.
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


# The rows NUMEL and CHUNK_END come first, then that of grad.
_GRAD_ROW = 2


class PointerTable:
    """The table of one call site. It is written again only if a pointer or a size has changed.

    If only the gradients have moved, `move_gradients` writes their row alone.

    The table does not keep the tensors alive.

    Args:
        chunk_size: elements per chunk, a multiple of 16. None: GPU_CHUNK on a GPU, else CHUNK.

    Attributes:
        chunk_size: elements per chunk.
        mode: the mode of the tensors.
        device: the device of the tensors and of `rows`.
        rows: (2 + len(POINTERS), num_tensors) int64 on that device.
        amax: (2, num_tensors) int32 on that device; the kernel's workspace, zero between steps.
        num_chunks: the number of chunks of all tensors together.
        num_builds: how often the whole table has been written.
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
        # On a GPU, the streams that `rows` and `amax` were allocated on.
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
            tensors: for each name of POINTERS, the tensors, or None if the mode has none. They must
                outlive the launch.
            mode: the mode of the tensors.
            device: the device whose memory the table is written to.
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
        """The addresses of the gradients."""
        grads = self._pointers[0]
        assert grads is not None
        return grads

    def move_gradients(self, grads: list[int], *, is_capturing: bool = False) -> None:
        """Describe the same tensors with the gradients at other addresses.

        Args:
            grads: one address per gradient. Dtypes, shapes and strides are as before.
            is_capturing: as in `update`.
        Raises:
            RuntimeError: as in `update`.
        """
        if grads == self.grads:
            return
        _refuse_capture(is_capturing)
        # A new table in new memory: a kernel that is queued, or a graph, still reads the old one.
        table = self._on_host.clone()
        table[_GRAD_ROW] = torch.frombuffer(array("q", grads), dtype=torch.int64)
        self._put(table)
        # This changes `_signature`, too, which holds the same list of lists.
        self._pointers[0] = [*grads]

    def _put(self, table: Tensor) -> None:
        """Make `rows` a copy, on the device, of a table that was written on the host."""
        self._on_host = self.rows = table
        if self.device.type == "cuda":
            # torch's allocator keeps the pinned memory until the copy is done.
            self.rows = table.pin_memory().to(self.device, non_blocking=True)
            self._rows_stream = torch.cuda.current_stream(self.device)

    def is_of(self, stream: torch.cuda.Stream) -> bool:
        """Whether the memory of `rows` and `amax` was allocated on this stream."""
        return bool(stream == self._rows_stream == self._amax_stream)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Make the allocator keep the memory until the stream has done what is queued on it now."""
        for tensor in (self.rows, self.amax):
            tensor.record_stream(stream)


def _refuse_capture(is_capturing: bool) -> None:
    if is_capturing:
        raise RuntimeError(
            "tensors have moved since the last step, and a CUDA graph is being captured: their "
            "table cannot be copied to the device now. Take one step with the same tensors before "
            "the capture, and keep the gradients where they are (zero_grad(set_to_none=False))"
        )
