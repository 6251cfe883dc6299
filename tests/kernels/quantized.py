"""AdamS on one of TransformerEngine's quantized params, step by step, without Megatron.

Run by tests/distributed/test_transformer_engine.py over a stand-in for TransformerEngine's kernels,
and by tests/gpu over the kernels themselves. TransformerEngine is imported when a function is
called: the process that collects the tests must not have it.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_adams import AdamS
from megatron_adams.update import adams_update_

STEPS: dict[str, dict[str, Any]] = {
    "delayed": {"recipe": "delayed"},
    "delayed_foreach": {"recipe": "delayed", "kernel": "foreach"},
    "delayed_e5m2": {"recipe": "delayed", "fp8_dtype": "kFloat8E5M2"},
    "delayed_fp32": {"recipe": "delayed", "nominal": "float32"},
    # Of which a quantized param has none.
    "delayed_remainders": {"recipe": "delayed", "store_param_remainders": True},
    "tensorwise": {"recipe": "tensorwise", "store_param_remainders": True},
    "blockwise": {"recipe": "blockwise"},
    "mxfp8": {"recipe": "mxfp8"},
}
"""Arguments of `take_steps`."""


def make_quantizer(recipe: str, device: str) -> Any:
    """A quantizer of a recipe that keeps no scale between steps, as all but delayed scaling."""
    from transformer_engine.pytorch import DType
    from transformer_engine.pytorch import tensor as quantized

    fp8 = DType.kFloat8E4M3
    if recipe == "tensorwise":
        place = torch.device(device)
        return quantized.Float8CurrentScalingQuantizer(fp8, place, columnwise=False)
    if recipe == "blockwise":
        return quantized.Float8BlockQuantizer(fp8, rowwise=True, columnwise=True)
    assert recipe == "mxfp8"
    return quantized.MXFP8Quantizer(fp8)


def memory_of(tensor: Any) -> Tensor:
    """The bytes of a tensor of TransformerEngine's; any other tensor itself."""
    for name in ("_data", "_rowwise_data"):
        if hasattr(tensor, name):
            return getattr(tensor, name)
    return tensor


def take_steps(
    recipe: str,
    fp8_dtype: str = "kFloat8E4M3",
    nominal: str = "bfloat16",
    kernel: str = "auto",
    device: str = "cpu",
    **options: Any,
) -> list[dict[str, Tensor]]:
    """Three steps of AdamS with master weights on one quantized param, as it is.

    Args:
        recipe: "delayed", with a scale that changes between the steps, or as `make_quantizer`.
        nominal: the dtype that the param pretends to have.
        options: of AdamS, dtypes by their names in torch.
    Returns:
        After each step, on the CPU, "main" and what `adams_update_` makes of the same gradients
        there, "expected"; "full", the param's values, and "again", those of a tensor that is
        quantized from "main"; with delayed scaling also "scale", "amax", "scale_inv", each one
        element.
    """
    from transformer_engine.pytorch import DType
    from transformer_engine.pytorch.tensor import Float8Quantizer

    generator = torch.Generator().manual_seed(0)
    scale, amax = torch.tensor([16.0], device=device), torch.zeros(1, device=device)
    quantizer = (
        Float8Quantizer(scale, amax, DType[fp8_dtype])
        if recipe == "delayed"
        else make_quantizer(recipe, device)
    )
    quantizer.set_usage(rowwise=True, columnwise=False)
    values = torch.randn(128, 256, generator=generator).to(getattr(torch, nominal))
    param = torch.nn.Parameter(quantizer(values.to(device)))
    dtypes = {k: getattr(torch, v) for k, v in options.items() if isinstance(v, str)}
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = AdamS(
        [param],
        **settings,
        kernel=kernel,
        master_weights=True,
        use_decoupled_grad=True,
        **{**options, **dtypes},
    )
    expected = param.dequantize(dtype=torch.float32).detach().cpu()
    exp_avg = torch.zeros(128, 256)
    param.decoupled_grad = torch.zeros(128, 256, device=device)
    told = []
    for step in range(1, 4):
        grad = torch.randn(128, 256, generator=generator)
        param.decoupled_grad.copy_(grad)
        if recipe == "delayed":
            # What the step before has launched is written elsewhere by now.
            if step == 2:
                param._data = param._data.clone()
            if step == 3:
                scale = scale.clone()
                quantizer.scale = param._quantizer.scale = scale
            scale.fill_(16.0 * step)
            amax.zero_()
        optimizer.step()
        adams_update_(
            expected,
            grad,
            exp_avg,
            lr=0.1,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            step=step,
            bias_correction=False,
        )
        main = optimizer.get_unscaled_state(param, "master_param")
        looked = {
            "main": main,
            "expected": expected,
            "full": param.dequantize(dtype=torch.float32).detach(),
            "scale": scale,
            "amax": amax,
        }
        if recipe == "delayed":
            looked["scale_inv"] = param.data._scale_inv
        looked = {name: tensor.cpu().clone() for name, tensor in looked.items()}
        again = quantizer.copy()(main)
        told.append(looked | {"again": again.dequantize(dtype=torch.float32).cpu()})
    return told


def check_steps(steps: list[dict[str, Tensor]], recipe: str) -> None:
    """Raise AssertionError where `take_steps` of a recipe has gone wrong."""
    assert len(steps) == 3
    for step in steps:
        assert torch.equal(step["main"], step["expected"])
        assert torch.equal(step["full"], step["again"])
        if recipe == "delayed":
            assert step["amax"] == step["main"].abs().max()
            assert step["scale_inv"] == 1 / step["scale"]
