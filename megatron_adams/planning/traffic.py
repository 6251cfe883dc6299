"""The bytes a parameter that an optimizer's step reads and writes, by its dtypes.

The same sums as benchmarks/traffic.py, which counts them in a real step; docs/measurements.md.
"""

from collections.abc import Mapping

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "remainder": 2, "none": 0}


def bytes_per_param(
    optimizer: str,
    dtypes: Mapping[str, str],
    *,
    is_precision_aware: bool,
    clips: bool,
    is_guarded: bool,
) -> int | None:
    """Bytes of a step: the update, and with clipping the norm of the gradient.

    Args:
        optimizer: "adams", or "adam", which is TransformerEngine's FusedAdam.
        dtypes: of "grad", "param", "exp_avg" and "main_param".
        is_precision_aware: whether the precision-aware optimizer keeps the state.
        clips: whether gradients are clipped.
        is_guarded: whether AdamS caps or matches the RMS of updates.

    Returns:
        None for the precision-aware FusedAdam, whose passes nobody has counted.
    """
    grad, param, exp_avg, main = (
        _BYTES[dtypes[name]] for name in ("grad", "param", "exp_avg", "main_param")
    )
    norm = grad if clips else 0
    if optimizer == "adams":
        # The param is read where it is the master weight, wholly or in part.
        reads_param = dtypes["main_param"] in ("none", "remainder")
        read = grad + exp_avg + main + (param if reads_param else 0)
        # State with a scale per tensor is measured before it is written.
        is_scaled = exp_avg == 1 or "fp16" in (dtypes["exp_avg"], dtypes["main_param"])
        guard = grad + exp_avg if is_guarded else 0
        return norm + guard + read * (1 + is_scaled) + exp_avg + main + param
    if is_precision_aware:
        return None
    clip = 2 * grad if clips else 0
    # Without main params the param is updated itself.
    master = main or param
    update = grad + 2 * (master + 4 + 4)
    copy = main + param if main else 0
    return norm + clip + update + copy
