"""What the ranks of test_fused_step.py run beside `cases.train`: steps, watched and disturbed."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import DistributedOptimizer, clip_grads

from megatron_adams.megatron import fused_step
from megatron_adams.megatron.distributed import AdamSChainedOptimizer
from tests.distributed import cases, register_cases

RANK = int(os.environ.get("RANK", "0"))
DISTURBED_STEP = 2
"""From 0."""
UNWATCHED_STEP = AdamSChainedOptimizer.step


def train(
    argv: str, own_passes: bool = False, disturbance: str | None = None, setting: str | None = None
) -> dict[str, Any]:
    """Train as `cases.train`, and watch the chain's steps.

    Args:
        own_passes: let Megatron make all its passes itself.
        disturbance: a name of DISTURBANCES; it happens to the step DISTURBED_STEP.
        setting: a name of SETTINGS.
    Returns:
        What `cases.train` returns, and for every step "grads_written": did it change a byte of
        the gradient buffers; "changed": or of params, main params, exp_avg and step counts;
        "loss_scales": each part's, before it; "disagreeing": in how many elements model params were
        not the rounded main params after it; "copies": how often Megatron has copied main to model
        params; "kernels": the inner optimizers'; and "told", what the disturbance returned.
    """
    watched: dict[str, Any] = {
        name: [] for name in ("grads_written", "changed", "loss_scales", "disagreeing", "told")
    }
    copies = _count_calls(DistributedOptimizer, "_copy_main_params_to_model_params")
    if own_passes:
        fused_step.why_gradients_are_scaled = lambda chain: "the test wants it"
        fused_step.FusedStepOptimizer.why_params_are_copied = lambda self: "the test wants it"
    if setting is not None:
        SETTINGS[setting]()
    step = AdamSChainedOptimizer.step

    def watched_step(chain: Any) -> Any:
        disturbed = disturbance if len(watched["changed"]) == DISTURBED_STEP else None
        if disturbed is not None:
            watched["told"].append(DISTURBANCES[disturbed](chain))
        watched["loss_scales"].append(
            [float(part.get_loss_scale()) for part in chain.chained_optimizers]
        )
        grads = [buffer.grad_data for buffer in _buffers(chain)]
        before = _bytes(grads), _bytes(_state(chain))
        outcome = step(chain)
        after = _bytes(grads), _bytes(_state(chain))
        watched["grads_written"].append(before[0] != after[0])
        watched["changed"].append(before[1] != after[1])
        watched["disagreeing"].append(_num_disagreeing(chain))
        watched["kernels"] = [part.optimizer.kernel for part in chain.chained_optimizers]
        return outcome

    AdamSChainedOptimizer.step = watched_step
    held = cases.train(argv)
    return {**held, **watched, "copies": len(copies)}


def register_without(dotted_path: str) -> dict[str, Any]:
    """As the case of this name in register_cases, for a function that this module imports too."""
    name = "megatron.core.models.mimo.optimizer"
    if importlib.util.find_spec(name) is not None:  # it came with 0.17
        importlib.import_module(name)
    return register_cases.register_without(dotted_path)


def _count_calls(owner: type, name: str) -> list[None]:
    original = getattr(owner, name)
    calls: list[None] = []

    def counted(*args: Any) -> Any:
        calls.append(None)
        return original(*args)

    setattr(owner, name, counted)
    return calls


def _buffers(chain: Any) -> list[Any]:
    chunks = chain.model_chunks
    return [b for chunk in chunks for b in chunk.buffers + chunk.expert_parallel_buffers]


def _state(chain: Any) -> list[torch.Tensor]:
    tensors = [buffer.param_data for buffer in _buffers(chain)]
    for part in chain.chained_optimizers:
        for group in part.optimizer.param_groups:
            tensors.append(torch.tensor([group["step"]]))
            for param in group["params"]:
                tensors.append(param.detach())
                tensors += part.optimizer.state.get(param, {}).values()
    return tensors


def _bytes(tensors: list[torch.Tensor]) -> list[bytes]:
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def _shards(chain: Any) -> list[tuple[Any, torch.Tensor, torch.Tensor]]:
    """(part, model param's shard, main param) of every parameter of this rank."""
    shards = []
    for part in chain.chained_optimizers:
        for param, (group, order) in part.model_param_group_index_map.items():
            part_range = part._get_model_param_range_map(param)["param"]
            main_param = part.optimizer.param_groups[group]["params"][order]
            shard = param.detach().view(-1)[part_range.start : part_range.end]
            shards.append((part, shard, main_param.detach()))
    return shards


def _num_disagreeing(chain: Any) -> int:
    return sum(int((main.to(shard.dtype) != shard).sum()) for _, shard, main in _shards(chain))


# --- disturbances ------------------------------------------------------------------------------


def put(value: float) -> Callable[[Any], None]:
    """Put a value into one gradient of rank 1's own shards, where no other rank sees it."""

    def put_into_gradient(chain: Any) -> None:
        if RANK == 1:
            part = chain.chained_optimizers[-1]
            param = next(iter(part.model_param_group_index_map))
            start = part._get_model_param_range_map(param)["param"].start
            param.main_grad.view(-1)[start] = value

    return put_into_gradient


def fail_and_look_around(chain: Any) -> dict[str, Any]:
    """A step fails half way; then call what it replaces in Megatron, and undo that.

    Returns:
        "raised": the step's error; "norm": is Megatron's norm that of the gradients as they are;
        "clipped", "unscaled": has its own pass multiplied every gradient; "copied": has its own
        copy written the model params.
    """

    class HalfWayError(Exception):
        pass

    def fail(*_: Any) -> None:
        raise HalfWayError

    raised = None
    part = chain.chained_optimizers[0]
    handle = part.optimizer.register_step_pre_hook(fail)
    try:
        UNWATCHED_STEP(chain)
    except HalfWayError as exc:
        raised = type(exc).__name__
    handle.remove()
    params = part.get_parameters()
    grads = [param.grad.clone() for param in params]
    norm = clip_grads.get_grad_norm_fp32(grads)
    stock_norm = vars(clip_grads.get_grad_norm_fp32)["__megatron_adams_original__"](grads)
    clip_grads.clip_grad_by_total_norm_fp32(params, 1.0, 2.0 - 1e-6)
    clipped = all(torch.equal(p.grad, g / 2) for p, g in zip(params, grads, strict=True))
    part._unscale_main_grads_and_check_for_nan()
    scale = 2 * float(part.get_loss_scale())
    unscaled = all(torch.equal(p.grad, g / scale) for p, g in zip(params, grads, strict=True))
    for param, grad in zip(params, grads, strict=True):
        param.grad.copy_(grad)
    model_params = [shard.clone() for _, shard, _ in _shards(chain)]
    for _, shard, _ in _shards(chain):
        shard.zero_()
    part._copy_main_params_to_model_params()
    copied = [torch.equal(s, m) for (_, s, _), m in zip(_shards(chain), model_params, strict=True)]
    return {
        "raised": raised,
        "norm": norm == stock_norm,
        "clipped": clipped,
        "unscaled": unscaled,
        "copied": all(copied),
    }


def move_main_params(chain: Any) -> None:
    """Give main params new memory, as Megatron's offload_to_cpu and restore_from_cpu do."""
    for part in chain.chained_optimizers:
        for param in part.get_parameters():
            param.data = param.data.clone()


def skip_large_norms(chain: Any) -> None:
    """Have Megatron skip every step from now on, for its norm."""
    chain.config.grad_norm_skip_threshold = 1e-9


DISTURBANCES: dict[str, Callable[[Any], Any]] = {
    "inf": put(float("inf")),
    "nan": put(float("nan")),
    "fail": fail_and_look_around,
    "move": move_main_params,
    "skip": skip_large_norms,
}


# --- settings ----------------------------------------------------------------------------------


def norm_as_tensor() -> None:
    """As with TransformerEngine: the norm and the clip coefficient stay tensors."""

    def scale(_: int, __: torch.Tensor, lists: Any, coeff: torch.Tensor) -> None:
        for source, target in zip(*lists, strict=True):
            target.copy_(source * coeff)

    clip_grads.multi_tensor_scale_tensor_impl = scale


def norm_group_of_its_own() -> None:
    """As Megatron does with multi-token prediction: some parameters are clipped by themselves."""
    from megatron.training import training

    build = training.get_megatron_optimizer

    def tag_and_build(config: Any, model_chunks: Any, *args: Any, **kwargs: Any) -> Any:
        for chunk in model_chunks:
            for name, param in chunk.named_parameters():
                if "layers.1." in name:
                    param.grad_norm_group = "mtp"
        return build(config, model_chunks, *args, **kwargs)

    training.get_megatron_optimizer = tag_and_build


def params_quantized_in_8_bits() -> None:
    _gather_quantized("fp8_param_gather")


def params_quantized_in_4_bits() -> None:
    _gather_quantized("fp4_param_gather")


def _gather_quantized(flag: str) -> None:
    """Have the optimizer believe it, which quantizes by TransformerEngine: there is nothing to."""
    from megatron.core.optimizer import distrib_optimizer
    from megatron.training import training

    for name in ("quantize_param_shard", "quantize_nvfp4_param_shard"):
        setattr(distrib_optimizer, name, lambda *_: None)
    build = training.get_megatron_optimizer

    def set_and_build(config: Any, model_chunks: Any, *args: Any, **kwargs: Any) -> Any:
        for chunk in model_chunks:
            setattr(chunk.ddp_config, flag, True)
        return build(config, model_chunks, *args, **kwargs)

    training.get_megatron_optimizer = set_and_build


def unscaled_norms(num_norms: int) -> list[tuple[float, float]]:
    """Norms as Megatron takes them of unscaled gradients, and as they come of scaled ones.

    Of single gradients, whose squares round and whose roots do.
    """
    torch.distributed.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(num_norms, 1, generator=generator) * 10 ** torch.empty(
        num_norms, 1
    ).uniform_(-6, 3, generator=generator)
    norm = vars(clip_grads.get_grad_norm_fp32)["__megatron_adams_original__"]
    scale = 2.0**17
    return [
        (norm([grad]), fused_step._unscaled_norm(norm([grad * scale]), 1 / scale)) for grad in grads
    ]


SETTINGS: dict[str, Callable[[], None]] = {
    "params_quantized_in_8_bits": params_quantized_in_8_bits,
    "params_quantized_in_4_bits": params_quantized_in_4_bits,
    "norm_as_tensor": norm_as_tensor,
    "norm_group_of_its_own": norm_group_of_its_own,
}
