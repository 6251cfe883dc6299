"""GPUs by name: memory and bandwidth.

Memory is the total that nvidia-smi reports, which is less than the data sheet's number on most.
Bandwidth is the data sheet's; the B200's is its bus width times its memory clock (pytorch/ao,
pull request 4002), where data sheets say 8,000.
"""

import dataclasses
import difflib

GIB = 2**30
_MIB = 2**20
# A larger share of the memory is tight: CUDA's context, NCCL, workspaces and fragmentation come
# on top.
_TIGHT = 0.9


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as in the table, or "GPU".
        memory_bytes: in all.
        bandwidth_gb_s: of its memory, in 10^9 bytes a second; None: not known.
    """

    name: str
    memory_bytes: int
    bandwidth_gb_s: float | None

    @property
    def memory_gib(self) -> float:
        return self.memory_bytes / GIB

    def fits(self, num_bytes: int) -> str:
        """ "yes", "tight" (the last tenth would be needed) or "no"."""
        if num_bytes > self.memory_bytes:
            return "no"
        return "yes" if num_bytes <= _TIGHT * self.memory_bytes else "tight"


# Name: (MiB that nvidia-smi reports, GB/s).
_KNOWN = {
    "v100-32gb": (32768, 900),
    "a100-40gb": (40960, 1555),
    "a100-80gb": (81920, 2039),
    "h100-80gb": (81559, 3350),
    "h200": (143771, 4800),
    "b200": (183359, 7672),
    "l40s": (46068, 864),
}
_OTHER_NAMES = {"a100": "a100-80gb", "h100": "h100-80gb", "v100": "v100-32gb"}


def known_names() -> list[str]:
    """The names that `named` takes."""
    return sorted({*_KNOWN, *_OTHER_NAMES})


def named(name: str) -> Gpu:
    """Return a GPU by its name.

    Raises:
        ValueError: unknown; with the names that are known.
    """
    key = name.lower().removeprefix("nvidia").strip(" -_").replace(" ", "-").replace("_", "-")
    key = _OTHER_NAMES.get(key, key)
    if key not in _KNOWN:
        near = difflib.get_close_matches(key, known_names(), n=1, cutoff=0.6)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"--gpu {name} is not known{hint}: must be one of {', '.join(known_names())}; give "
            f"--gpu-memory-gib, and --gpu-bandwidth, for another"
        )
    mib, bandwidth_gb_s = _KNOWN[key]
    return Gpu(key, mib * _MIB, bandwidth_gb_s)
