"""The constants that the CUDA kernel of a mode is compiled with. They change only its speed.

`benchmarks/tune.py` times the alternatives on a GPU. Imports only modes.py.
"""

from typing import Literal, NamedTuple

from megatron_adams.kernels.modes import Mode

_LOAD_HINTS = {
    "plain": "",
    "streaming": ".cs",
    "no_allocate": ".L1::no_allocate",
    "prefetch_256B": ".L1::no_allocate.L2::256B",
}
_STORE_HINTS = {"plain": "", "streaming": ".cs"}


class Tuning(NamedTuple):
    """The constants that source/device.cu is compiled with.

    Attributes:
        group: how many neighbouring elements of every tensor one thread moves at a time: 4, 8 or
            16. 0: as many as 16 bytes of the narrowest tensor hold. That leaves gaps between the
            accesses of neighbouring threads to wider tensors.
        unroll: how many groups a thread reads before it computes the first one.
        block: threads per block, a multiple of 32.
        min_blocks: how many blocks a multiprocessor must have registers for. None: chosen by the
            number of elements that a thread holds, so that hardly any register is spilled.
        load, store: the cache hint of the accesses to tensors.
        hardware_conversions: convert bf16, fp16 and fp8 numbers by the GPU's instructions instead
            of integer arithmetic. Only the payloads of NaNs differ. fp8 needs sm_89.
    """

    group: int = 0
    unroll: int = 1
    block: int = 256
    min_blocks: int | None = None
    load: Literal["plain", "streaming", "no_allocate", "prefetch_256B"] = "plain"
    store: Literal["plain", "streaming"] = "plain"
    hardware_conversions: bool = False

    def defines(self) -> dict[str, str]:
        """Return the macros for source/device.cu, in addition to those of the mode."""
        return {
            "ADAMS_GROUP": str(self.group),
            "ADAMS_UNROLL": str(self.unroll),
            "ADAMS_BLOCK": str(self.block),
            "ADAMS_MIN_BLOCKS": str(-1 if self.min_blocks is None else self.min_blocks),
            "ADAMS_LOAD_HINT": f'"{_LOAD_HINTS[self.load]}"',
            "ADAMS_STORE_HINT": f'"{_STORE_HINTS[self.store]}"',
            "ADAMS_HARDWARE_CONVERSIONS": str(int(self.hardware_conversions)),
        }


# All modes have these constants. The sweep on an H100 (benchmarks/results) found others that make
# single modes 1 to 3% faster on one large tensor. But with those a thread holds so much that small
# tensors and lists of tensors take up to 24% longer.
_TUNING = Tuning(group=4, hardware_conversions=True)


def tuning_of(mode: Mode) -> Tuning:
    """Return the constants that the kernel of a mode is compiled with."""
    return _TUNING
