"""A stand-in, in PyTorch, for `transformer_engine_torch`: TransformerEngine's extension module.

TransformerEngine's Python code calls its CUDA kernels through this one module. Here are those that
Megatron's optimizers and quantized params reach, with the arguments that TransformerEngine 2.20
gives them; any other raises NotImplementedError at its call. The numbers are PyTorch's, on the CPU:
what runs over it shows that the plugin fits TransformerEngine's code, not what its kernels compute.

Installed by `import_transformer_engine`, see __init__.py.
"""

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Lists = Sequence[Sequence[Tensor]]


class DType(enum.IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class FP8FwdTensors(enum.IntEnum):
    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class FP8BwdTensors(enum.IntEnum):
    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class _Unused(type):
    """Of classes and enums that are read at import and not used by what runs here."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return hash(name)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return _Unused(name, (), {})

    def kernel(*_: Any, **__: Any) -> None:
        raise NotImplementedError(
            f"{name} of TransformerEngine: not in the stand-in for its kernels"
        )

    return kernel


def get_cublasLt_version() -> int:
    return 130000


def get_cudnn_version() -> int:
    return 91200


# --- lists of tensors ---------------------------------------------------------------------------


def _flag(noop: Tensor, tensors: Sequence[Tensor]) -> None:
    # As the kernels, without a host that waits.
    for tensor in tensors:
        noop.masked_fill_(~tensor.isfinite().all(), 1)


def multi_tensor_scale(_: int, noop: Tensor, lists: Lists, scale: float | Tensor) -> None:
    sources, targets = lists
    _flag(noop, sources)
    for source, target in zip(sources, targets, strict=True):
        # As Megatron's own, which it takes without TransformerEngine.
        target.copy_(source * scale)


multi_tensor_scale_tensor = multi_tensor_scale


def multi_tensor_l2norm(
    _: int, noop: Tensor, lists: Lists, per_tensor: bool | None = None
) -> tuple[Tensor, Tensor]:
    # As Megatron's own, which it takes without TransformerEngine.
    norms = torch.stack([torch.norm(tensor) for tensor in lists[0]])
    return torch.norm(norms).float().reshape(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_unscale_l2norm(
    chunk: int, noop: Tensor, lists: Lists, inv_scale: Tensor, per_tensor: bool | None = None
) -> tuple[Tensor, Tensor]:
    scaled = [tensor.float() * inv_scale for tensor in lists[0]]
    return multi_tensor_l2norm(chunk, noop, [scaled], per_tensor)


def _adam(
    grad: Tensor, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, arguments: Sequence[Any]
) -> Tensor:
    """Move both moments, and return the fp32 master weight after the step."""
    lr, beta1, beta2, eps, step, adam_w_mode, bias_correction, weight_decay = arguments
    grad, master, m, v = (tensor.float() for tensor in (grad, master, exp_avg, exp_avg_sq))
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    if not adam_w_mode:
        grad = grad + weight_decay * master
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    update = (m / correction1) / ((v / correction2).sqrt() + eps)
    if adam_w_mode:
        update = update + weight_decay * master
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    return master - lr * update


def multi_tensor_adam(_: int, noop: Tensor, lists: Lists, *arguments: Any) -> None:
    if noop.item() == 1:
        return
    for grad, param, m, v, *masters in zip(*lists, strict=True):
        after = _adam(grad, masters[0] if masters else param, m, v, arguments)
        for target in (param, *masters):
            target.copy_(after)


def multi_tensor_adam_param_remainder(_: int, noop: Tensor, lists: Lists, *arguments: Any) -> None:
    if noop.item() == 1:
        return
    for grad, param, m, v, remainder in zip(*lists, strict=True):
        high = param.view(torch.int16).int() - (remainder < 0).int()
        master = (high << 16 | remainder.int() & 0xFFFF).view(torch.float32)
        bits = _adam(grad, master, m, v, arguments).view(torch.int32)
        low = (bits << 16) >> 16
        remainder.copy_(low)
        param.view(torch.int16).copy_((bits - low) >> 16)


def multi_tensor_adam_fp8(_: int, noop: Tensor, lists: Lists, *arguments: Any) -> None:
    *arguments, fp8_dtype = arguments
    if noop.item() == 1:
        return
    for grad, param, m, v, master, scale, amax, scale_inv in zip(*lists, strict=True):
        after = _adam(grad, master, m, v, arguments)
        master.copy_(after)
        param.copy_(_to_fp8(after * scale, fp8_dtype))
        amax.copy_(torch.maximum(amax, after.abs().max()))
        scale_inv.copy_(1 / scale)


# --- quantized tensors --------------------------------------------------------------------------

_FP8 = {DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2}
_TORCH_DTYPES = {
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


def _to_fp8(scaled: Tensor, fp8_dtype: int) -> Tensor:
    """Saturated, as bytes."""
    dtype = _FP8[DType(int(fp8_dtype))]
    limit = torch.finfo(dtype).max
    return scaled.float().clamp(-limit, limit).to(dtype).view(torch.uint8)


def _max_fp8(fp8_dtype: int) -> float:
    return float(torch.finfo(_FP8[DType(int(fp8_dtype))]).max)


def _scale_of(amax: Tensor, max_fp8: float, power_of_2: bool, epsilon: float) -> Tensor:
    scale = max_fp8 / amax.clamp(min=epsilon)
    scale = torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale)
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_2 else scale


def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: Any, pin_memory: bool
) -> Any:
    kind = type(quantizer).__name__
    if kind == "Float8Quantizer":
        module = __import__("transformer_engine.pytorch.tensor.float8_tensor", fromlist=[""])
        return module.Float8Tensor(
            shape=shape,
            dtype=dtype,
            data=torch.zeros(shape, dtype=torch.uint8),
            fp8_scale_inv=1 / quantizer.scale,
            fp8_dtype=quantizer.dtype,
            quantizer=quantizer,
            device=torch.device("cpu"),
        )
    metadata = quantizer.storage_metadata(dtype)
    specs = quantizer.inner_tensor_specs(tuple(shape))
    # A transpose is made when it is asked for.
    specs.pop("_transpose", None)
    kwargs = {**metadata["nontensor_kwargs"]}
    for name, constructor_name in metadata["cls"]._INNER_TENSORS:
        made = torch.zeros(specs[name][0], dtype=specs[name][1]) if name in specs else None
        kwargs[constructor_name] = made
    kwargs.pop("fake_dtype")
    return metadata["cls"](shape=shape, dtype=dtype, device=torch.device("cpu"), **kwargs)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """By the quantizers of delayed, current, 128 x 128 block and mxfp8 scaling."""
    if output is None:
        output = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if noop is not None and noop.item() == 1:
        return output
    _QUANTIZE[type(quantizer).__name__](tensor.detach(), quantizer, output)
    return output


def _quantize_delayed(tensor: Tensor, quantizer: Any, output: Any) -> None:
    if tensor.numel() == 0:
        return
    output._data.copy_(_to_fp8(tensor.float() * quantizer.scale, quantizer.dtype))
    if quantizer.amax.numel():
        amax = tensor.float().abs().max()
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
    output._scale_inv.copy_(1 / quantizer.scale)
    output._reset_caches()


def _quantize_current(tensor: Tensor, quantizer: Any, output: Any) -> None:
    amax = tensor.float().abs().max().reshape(1)
    if quantizer.with_amax_reduction:
        group = quantizer._canonicalized_amax_reduction_group()
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
    scale = _scale_of(
        amax, _max_fp8(quantizer.dtype), quantizer.force_pow_2_scales, quantizer.amax_epsilon
    )
    output._data.copy_(_to_fp8(tensor.float() * scale, quantizer.dtype))
    output._scale_inv.copy_(1 / scale)
    output._reset_caches()


def _quantize_blocks(tensor: Tensor, quantizer: Any, output: Any) -> None:
    assert quantizer.block_scaling_dim == 2
    height, width = tensor.shape
    amax = torch.zeros(quantizer.get_scale_shape(tensor.shape, columnwise=False))
    fp8_block_scaling_compute_partial_amax(tensor, amax, height, width, 0, quantizer.block_len)
    scale = _scale_of(
        amax, _max_fp8(quantizer.dtype), quantizer.force_pow_2_scales, quantizer.amax_epsilon
    )
    data = torch.zeros(tensor.numel(), dtype=torch.uint8)
    fp8_block_scaling_partial_cast(
        tensor, data, scale, height, width, 0, quantizer.block_len, quantizer.dtype
    )
    output._rowwise_data.copy_(data.view(tensor.shape))
    output._rowwise_scale_inv.copy_(1 / scale)
    if output._columnwise_data is not None:
        output._create_columnwise()


def _quantize_mxfp8(tensor: Tensor, quantizer: Any, output: Any) -> None:
    height, width = tensor.shape
    for is_rowwise in (True, False):
        side = "rowwise" if is_rowwise else "columnwise"
        data = getattr(output, f"_{side}_data")
        if data is None:
            continue
        exponents = getattr(output, f"_{side}_scale_inv")
        blocks = _mxfp8_blocks(tensor.float(), is_rowwise)
        amax = blocks.abs().amax(dim=1 + is_rowwise)
        # Rounded up, so that nothing saturates.
        exponent = torch.ceil(torch.log2(amax / _max_fp8(quantizer.dtype))).clamp(-127, 127)
        exponents.zero_()
        exponents[: exponent.shape[0], : exponent.shape[1]].copy_((exponent + 127).to(torch.uint8))
        scaled = blocks * torch.exp2(-exponent).unsqueeze(1 + is_rowwise)
        data.copy_(_to_fp8(scaled.reshape(height, width), quantizer.dtype))


def _mxfp8_blocks(matrix: Tensor, is_rowwise: bool) -> Tensor:
    """(h, w) -> (h, w / 32, 32) or (h / 32, 32, w)."""
    height, width = matrix.shape
    if is_rowwise:
        return matrix.reshape(height, width // 32, 32)
    return matrix.reshape(height // 32, 32, width)


_QUANTIZE: dict[str, Callable[[Tensor, Any, Any], None]] = {
    "Float8Quantizer": _quantize_delayed,
    "Float8CurrentScalingQuantizer": _quantize_current,
    "Float8BlockQuantizer": _quantize_blocks,
    "MXFP8Quantizer": _quantize_mxfp8,
}


def dequantize(tensor: Any, dtype: int) -> Tensor:
    """Of mxfp8; TransformerEngine does the others in Python where they are on the CPU."""
    is_rowwise = tensor._rowwise_data is not None
    side = "rowwise" if is_rowwise else "columnwise"
    data = getattr(tensor, f"_{side}_data").view(_FP8[DType(int(tensor._fp8_dtype))]).float()
    blocks = _mxfp8_blocks(data, is_rowwise)
    rows, columns = (size for axis, size in enumerate(blocks.shape) if axis != 1 + is_rowwise)
    exponents = getattr(tensor, f"_{side}_scale_inv")[:rows, :columns].float() - 127
    full = blocks * torch.exp2(exponents).unsqueeze(1 + is_rowwise)
    return full.reshape(data.shape).to(_TORCH_DTYPES[DType(int(dtype))])


def fp8_transpose(data: Tensor, _: int, *, out: Tensor | None = None) -> Tensor:
    transposed = data.reshape(-1, data.shape[-1]).T.contiguous()
    transposed = transposed.view(data.shape[-1], *data.shape[:-1])
    return transposed if out is None else out.copy_(transposed)


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    amax.fill_(tensor.float().abs().max() if tensor.numel() else 0.0)


def multi_tensor_compute_scale_and_scale_inv(
    _: int, noop: Tensor, lists: Lists, max_fp8: float, power_of_2: bool, epsilon: float
) -> None:
    for amax, scale, scale_inv in zip(*lists, strict=True):
        scale.copy_(_scale_of(amax, max_fp8, power_of_2, epsilon).view(scale.shape))
        scale_inv.copy_(1 / scale.view(scale_inv.shape))


def _tiles(
    height: int, width: int, start: int, numel: int, block: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Row and column of each tile of a matrix, and which of the shard's elements lie in it."""
    place = torch.arange(start, start + numel)
    rows, columns = place // width // block, place % width // block
    for row in range(math.ceil(height / block)):
        for column in range(math.ceil(width / block)):
            yield row, column, (rows == row) & (columns == column)


def fp8_block_scaling_compute_partial_amax(
    shard: Tensor, amax: Tensor, height: int, width: int, start: int, block: int
) -> None:
    flat = shard.reshape(-1).float()
    for row, column, inside in _tiles(height, width, start, flat.numel(), block):
        if inside.any():
            amax[row, column] = flat[inside].abs().max()


def fp8_block_scaling_partial_cast(
    shard: Tensor,
    data: Tensor,
    scale: Tensor,
    height: int,
    width: int,
    start: int,
    block: int,
    fp8_dtype: int,
) -> None:
    flat = shard.reshape(-1).float()
    for row, column, inside in _tiles(height, width, start, flat.numel(), block):
        data[inside] = _to_fp8(flat[inside] * scale[row, column], fp8_dtype)


# --- Megatron's final norm, which is TransformerEngine's wherever that is installed --------------


def layernorm_fwd(
    tensor: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    output: Tensor | None,
    quantizer: Any,
    dtype: int,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    assert output is None and quantizer is None and not zero_centered_gamma
    # As torch's module, which Megatron takes without TransformerEngine.
    result, mean, rstdev = torch.native_layer_norm(tensor, weight.shape, weight, bias, eps)
    return result.to(_TORCH_DTYPES[DType(int(dtype))]), mean, rstdev


def layernorm_bwd(
    grad: Tensor,
    tensor: Tensor,
    mean: Tensor,
    rstdev: Tensor,
    weight: Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.native_layer_norm_backward(
        grad, tensor, weight.shape, mean, rstdev, weight, torch.zeros_like(weight), [True] * 3
    )
