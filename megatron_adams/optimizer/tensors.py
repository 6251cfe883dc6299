"""Tensors as AdamS finds them: what lies at their pointers, and what has to be asked first.

DTensors (FSDP2), TransformerEngine's quantized tensors, and views that torch negates lazily have
their values elsewhere than at their own pointer. Used by the other modules of this folder and by
megatron_adams.megatron. Imports torch and kernels; TransformerEngine is looked up only where
somebody else has imported it.
"""

import sys
from collections.abc import Iterable
from types import NoneType
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_adams.kernels import Fp8Scaling

# In the order of an error's words.
DTYPES = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16, torch.float64)).keys()
# Classes whose data is at data_ptr().
PLAIN = {Tensor, torch.nn.Parameter}


def is_quantized(tensor: Tensor) -> bool:
    """Whether it is one of TransformerEngine's quantized tensors, of any recipe."""
    # Whoever made one has imported the module.
    module = sys.modules.get("transformer_engine.pytorch.quantized_tensor")
    return module is not None and isinstance(tensor, module.QuantizedTensor)


def fp8_memory(tensor: Tensor) -> tuple[Tensor, Fp8Scaling] | None:
    """Take apart a Float8Tensor of TransformerEngine (2.20) with delayed scaling.

    Returns:
        Its bytes, as a plain fp8 tensor of the same shape, and its scaling. Both share their memory
        with it. None for any other tensor.
    """
    module = sys.modules.get("transformer_engine.pytorch.tensor.float8_tensor")
    if module is None or not isinstance(tensor, module.Float8Tensor):
        return None
    quantizer = tensor._quantizer
    if not isinstance(quantizer, module.Float8Quantizer):
        return None
    is_e5m2 = quantizer.dtype.name == "kFloat8E5M2"
    data = tensor._data.view(torch.float8_e5m2 if is_e5m2 else torch.float8_e4m3fn)
    return data, Fp8Scaling(quantizer.scale, quantizer.amax, tensor._scale_inv)


def memory_of(param: Tensor) -> tuple[Tensor, Fp8Scaling | None]:
    """Return the tensor that a kernel writes as the param, and its scaling if it is fp8."""
    return fp8_memory(param) or (param, None)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor (FSDP2); any other tensor is returned as it is."""
    if type(tensor) is Tensor:
        return tensor
    # Whoever made a DTensor has imported the module, which takes long.
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(tensor, module.DTensor):
        return cast(Tensor, tensor.to_local())
    return tensor


def distributed_like(local: Tensor, like: Tensor) -> Tensor:
    """Make a DTensor of this rank's part, placed as `like` is; as it is where `like` is none."""
    part = local_part(like)
    if part is like:
        return local
    if local is part:
        return like
    source = cast(Any, like)
    return cast(
        Tensor,
        type(source).from_local(
            local,
            source.device_mesh,
            source.placements,
            run_check=False,
            shape=source.shape,
            stride=source.stride(),
        ),
    )


def shard_groups(tensor: Tensor) -> tuple[ProcessGroup, ...]:
    """Return the groups of ranks over which a DTensor is split: one for each mesh dimension.

    A dimension that holds copies (HSDP) has none, and so has any other tensor.
    """
    if local_part(tensor) is tensor:
        return ()
    mesh, placements = cast(Any, tensor).device_mesh, cast(Any, tensor).placements
    # FSDP2's second split of a tensor parallel dimension, _StridedShard, is no Shard for
    # `is_shard`, and a parameter is never Partial.
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def are_plain(*columns: Iterable[Tensor | None]) -> bool:
    """Whether the data of all tensors is at their pointers; None stands for no tensor."""
    kinds: set[type] = set()
    for column in columns:
        kinds.update(map(type, column))
    return kinds - {NoneType} <= PLAIN


def in_memory(grad: Tensor) -> Tensor:
    """Return the gradient, or a copy if its memory does not hold its value.

    Torch negates lazily: the gradient of something that went through `conj` can be a view of its
    negative, with a mark. A zero of forward-mode AD has no memory.
    """
    if type(grad) not in PLAIN:
        return grad
    return grad.clone() if grad._is_zerotensor() else grad.resolve_neg()


def check_gradients(grads: Iterable[Tensor]) -> None:
    """`check_tensor` for gradients."""
    for grad in grads:
        check_tensor("gradient", grad)


def check_tensor(what: str, tensor: Tensor) -> None:
    """Refuse a tensor that AdamS cannot step.

    Args:
        what: its name in the error.
        tensor: a param or a gradient.
    Raises:
        ValueError: it is sparse, complex or not floating.
    """
    if tensor.layout != torch.strided:
        raise ValueError(
            f"{what} of shape {tuple(tensor.shape)} has layout={tensor.layout}: must be dense; "
            "build an embedding with sparse=False, or call .to_dense()"
        )
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{what} of shape {tuple(tensor.shape)} has dtype={tensor.dtype}: must be one of "
            f"{', '.join(str(dtype) for dtype in DTYPES)}; a complex one can be optimized "
            "through torch.view_as_real"
        )
