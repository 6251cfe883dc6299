"""What the files of a torch_dist checkpoint hold, read without Megatron and in one process."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint (an iter_* folder) at its global shape, by key."""
    reader = dcp.FileSystemReader(checkpoint)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def differing(checkpoint: Path, other: Path) -> list[str]:
    """The keys of the tensors whose bits differ, or that only one checkpoint has."""
    one, two = read_tensors(checkpoint), read_tensors(other)
    assert one and two, "a checkpoint without a tensor"
    both = one.keys() & two.keys()
    return sorted(one.keys() ^ two.keys()) + sorted(
        key for key in both if not torch.equal(as_bits(one[key]), as_bits(two[key]))
    )


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as bytes, so that NaN equals itself and 0 does not equal -0."""
    return tensor.contiguous().view(torch.uint8)
