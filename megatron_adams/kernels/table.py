"""The table of tensors that a kernel reads: pointers and sizes, in the memory of its device.

Its layout is that of `Field` in source/multi_tensor.h.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megatron_adams.kernels.modes import Mode

# Elements of a chunk; CHUNK in source/multi_tensor.h.
CHUNK = 16384

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


class PointerTable:
    """The table of one call site; it is written again only when a pointer or a size changed.

    It keeps no tensor alive.

    Attributes:
        mode: the dtypes of the tensors.
        device: where they are, and `rows`.
        rows: (2 + len(POINTERS), num_tensors) int64 on the kernel's device.
        amax: (2, num_tensors) int32 there; the kernel's workspace, zero between steps.
        num_chunks: of all tensors together.
        num_builds: how often the table was written.
    """

    mode: Mode
    device: torch.device

    def __init__(self) -> None:
        self.rows = torch.empty(0, dtype=torch.int64, device="cpu")
        self.amax = torch.empty(0, dtype=torch.int32, device="cpu")
        self.num_tensors = self.num_chunks = self.num_builds = 0
        self._signature: object = None

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
        if is_capturing:
            raise RuntimeError(
                "tensors have other addresses than at the step before, while a CUDA graph is being "
                "captured: their table cannot be copied to the device now. Take one step with the "
                "same tensors before the capture, and keep the gradients where they are "
                "(zero_grad(set_to_none=False))"
            )
        chunk_ends = list(accumulate(-(-size // CHUNK) for size in sizes))
        nothing = [0] * len(sizes)
        table = torch.tensor(
            [sizes, chunk_ends, *(column or nothing for column in pointers)],
            dtype=torch.int64,
            device="cpu",
        )
        if device.type == "cuda":
            # The host allocator keeps the pinned memory until the copy is done.
            table = table.pin_memory().to(device, non_blocking=True)
        self.mode, self.device, self.rows = mode, device, table
        self.amax = torch.zeros(2, len(sizes), dtype=torch.int32, device=device)
        self.num_tensors, self.num_chunks = len(sizes), chunk_ends[-1]
        self.num_builds += 1
        self._signature = signature
