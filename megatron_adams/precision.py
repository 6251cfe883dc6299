"""How optimizer state is stored in fewer bits: pure functions, the oracle of the kernels.

Called by optimizer/, kernels/foreach.py and the tests. Imports only torch.

- remainder: an fp32 main param is stored as its bf16 param and the 16 bits that the param lacks.
  (The names below say "master", as TransformerEngine's key `master_param` does.)
- scaled: fp16 or fp8 (e4m3) state is stored with one fp32 scale per tensor: state = stored * scale.
  TransformerEngine's FusedAdam uses the same form, but chooses the scale in another way.
- fp8 params: cast with saturation, as TransformerEngine does.
"""

import torch
from torch import Tensor

# The largest magnitude of scaled state: e4m3's largest number, and half of fp16's range, so that
# rounding cannot overflow.
_LARGEST_SCALED = {torch.float16: 2.0**15, torch.float8_e4m3fn: 448.0}


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split an fp32 main param into its bf16 param and the remainder.

    `join_master` returns the same bits for every number. The param is the main param rounded to the
    nearest bf16 number, ties away from zero. Every NaN becomes one canonical NaN.

    Args:
        master: any shape, fp32.
    Returns:
        (param, remainder): bf16 and int16, with master's shape.
    """
    bits = master.view(torch.int32)
    low = bits & 0xFFFF
    high = (bits >> 16) + (low >> 15)
    is_nan = master.isnan()
    high = torch.where(is_nan, 0x7FFF, high)
    low = torch.where(is_nan, 0, low)
    return _to_int16(high).view(torch.bfloat16), _to_int16(low)


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """Put together what `split_master` took apart.

    Args:
        param: any shape, bf16.
        remainder: param's shape, int16.
    Returns:
        The main param, fp32.
    """
    high = param.view(torch.int16).to(torch.int32) - (remainder < 0).to(torch.int32)
    return ((high << 16) | (remainder.to(torch.int32) & 0xFFFF)).view(torch.float32)


def _to_int16(low_bits: Tensor) -> Tensor:
    # Converting a number outside int16's range is not defined everywhere.
    low_bits = low_bits & 0xFFFF
    return torch.where(low_bits >= 0x8000, low_bits - 0x10000, low_bits).to(torch.int16)


def encode_scaled(state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Store fp32 state in fp16 or fp8 with one scale.

    The scale is a power of two, so that scaling itself rounds nothing. The largest magnitude lands
    in (L/2, L], where L is 448 for e4m3 and 32768 for fp16. The scale of zeros is 1.

    Args:
        state: any shape, fp32.
        dtype: torch.float16 or torch.float8_e4m3fn.
    Returns:
        (stored, scale): state's shape in `dtype`, and () fp32; state is about stored * scale.
    """
    amax = state.abs().max() if state.numel() else state.new_zeros(())
    largest = torch.tensor(_LARGEST_SCALED[dtype], dtype=torch.float32, device="cpu")
    limit = int(largest.view(torch.int32).item())
    # A NaN counts as infinity. Either way, the tensor's other values are lost.
    bits = (amax.view(torch.int32) & 0x7FFFFFFF).clamp(max=0x7F800000)
    is_above = (bits & 0x7FFFFF) > (limit & 0x7FFFFF)
    field = (bits >> 23) - (limit >> 23) + 127 + is_above.to(torch.int32)
    # Both the scale and its inverse are normal numbers.
    field = torch.where(bits == 0, 127, field.clamp(1, 253))
    scale = (field << 23).view(torch.float32)
    inverse = ((254 - field) << 23).view(torch.float32)
    scaled = state * inverse
    return (to_fp8(scaled, dtype) if dtype.itemsize == 1 else scaled.to(dtype)), scale


def decode_scaled(stored: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 state that `encode_scaled` stored."""
    return stored.to(torch.float32) * scale


def to_fp8(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 values to fp8, to nearest even. Too large values become the largest number.

    Args:
        values: any shape, fp32.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
    """
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def read_stored(
    stored: Tensor, *, scale: Tensor | None = None, param: Tensor | None = None
) -> Tensor:
    """Return the full state that `stored` holds in fewer bits.

    Args:
        stored: any shape. fp32, bf16 and fp64 are the state itself, fp16 and float8_e4m3fn need
            `scale`, and int16 is the remainder of `param`.
        scale: one fp32 element, or None.
        param: stored's shape, bf16; read only with remainders.
    Returns:
        fp32, or fp64 if that is stored; `stored` itself if nothing has to be converted.
    """
    if stored.dtype == torch.int16:
        assert param is not None
        return join_master(param, stored)
    if scale is not None:
        return decode_scaled(stored, scale)
    return stored if stored.dtype == torch.float64 else stored.to(torch.float32)


def write_stored_(
    stored: Tensor, state: Tensor, *, scale: Tensor | None = None, param: Tensor | None = None
) -> None:
    """Store full state in place, so that `read_stored` returns it.

    Args:
        stored: as in `read_stored`; written.
        state: stored's shape, floating.
        scale: as in `read_stored`; written.
        param: as in `read_stored`; written only with remainders, of which it is the other half.
    """
    if stored.dtype == torch.int16:
        assert param is not None
        high, low = split_master(state.to(torch.float32))
        param.copy_(high)
        stored.copy_(low)
    elif scale is not None:
        encoded, new_scale = encode_scaled(state.to(torch.float32), stored.dtype)
        stored.copy_(encoded)
        scale.copy_(new_scale)
    else:
        stored.copy_(state)
