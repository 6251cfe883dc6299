"""What the ranks of test_transformer_engine.py run; imported where TransformerEngine can be."""

import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
    param_and_grad_buffer,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule, TransformerConfig
from transformer_engine.common.recipe import DelayedScaling
from transformer_engine.pytorch.optimizers import FusedAdam
from transformer_engine.pytorch.quantization import RecipeState, _amax_and_scale_update
from transformer_engine.pytorch.tensor import Float8Quantizer

from megatron_adams import AdamS
from megatron_adams.megatron import AdamSOptimizerConfig
from tests.distributed import cases, module_cases
from tests.kernels.quantized import make_quantizer, memory_of

HIDDEN, OUTPUT = 128, 256
WEIGHTS = ("weight", "inner")


def signatures() -> dict[str, dict[str, tuple[int, str]]]:
    """Kind and default of every argument of both constructors."""
    return {
        cls.__name__: {
            name: (int(parameter.kind), str(parameter.default))
            for name, parameter in inspect.signature(cls).parameters.items()
        }
        for cls in (AdamS, FusedAdam)
    }


def initialized(**options: Any) -> dict[str, Any]:
    """Both optimizers' state of a bf16 param, as initialize_state makes it.

    Args:
        options: of both constructors; dtypes by their names in torch.
    Returns:
        By class, for each name in the state: the dtype that it has in memory, whether it is
        quantized, and its values in full; of FusedAdam's remainders, the remainders.
    """
    dtypes = {k: getattr(torch, v) for k, v in options.items() if isinstance(v, str)}
    told: dict[str, Any] = {}
    for cls in (AdamS, FusedAdam):
        values = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
        param = torch.nn.Parameter(values)
        optimizer = cls([param], **{**options, **dtypes})
        # What FusedAdam.step asks for.
        arguments = (options.get("store_param_remainders", False),) if cls is FusedAdam else ()
        optimizer.initialize_state(param, *arguments)
        told[cls.__name__] = {}
        for name, tensor in optimizer.state[param].items():
            told[cls.__name__][name] = {
                "dtype": str(memory_of(tensor).dtype).replace("float8_e4m3fn", "uint8"),
                "full": optimizer.get_unscaled_state(param, name).detach().clone(),
            }
        told["param"] = values.detach().clone()
    return told


def refusal_of_quantized_params() -> str:
    """What AdamS says of a quantized param without master weights."""
    param = torch.nn.Parameter(make_quantizer("tensorwise", "cpu")(torch.ones(128, 128)))
    param.grad = torch.ones(128, 128)
    try:
        AdamS([param]).step()
    except ValueError as exc:
        return str(exc)
    return ""


def train_fused_adam(argv: str) -> dict[str, Any]:
    """Train with TransformerEngine's Adam.

    Returns:
        As `cases.train`, but "parts" are the inner optimizer's "class" with its module, and
        "dtypes": for every name of its state the dtypes in memory.
    """

    def describe(part: Any, _: Any) -> dict[str, Any]:
        inner = part.optimizer
        dtypes: dict[str, set[str]] = {}
        for state in inner.state.values():
            for name, tensor in state.items():
                dtypes.setdefault(name, set()).add(str(memory_of(tensor).dtype))
        return {"class": f"{type(inner).__module__}.{type(inner).__name__}", "dtypes": dtypes}

    cases.describe = describe
    return cases.train(argv)


# --- quantized params --------------------------------------------------------------------------


class Quantized(MegatronModule):
    """Two projections whose weights are quantized tensors, a scale and a bias that are bf16.

    TransformerEngine's layers do not run on a CPU: its tensors are params of this module. Of two
    data parallel ranks one owns a part of `weight` and the whole of `inner`, the other the rest.

    Args:
        quantizers: of the weights by name.
    """

    def __init__(self, config: TransformerConfig, quantizers: dict[str, Any]) -> None:
        super().__init__(config)
        generator = torch.Generator().manual_seed(0)

        def draw(name: str, *shape: int) -> torch.nn.Parameter:
            full = torch.randn(*shape, generator=generator).bfloat16() / 8
            return torch.nn.Parameter(quantizers[name](full))

        self.norm = torch.nn.Parameter(torch.ones(HIDDEN, dtype=torch.bfloat16))
        self.weight = draw("weight", OUTPUT, HIDDEN)
        self.inner = draw("inner", HIDDEN, HIDDEN)
        self.bias = torch.nn.Parameter(torch.zeros(OUTPUT, dtype=torch.bfloat16))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh((tokens * self.norm) @ self.inner.dequantize().T)
        return hidden @ self.weight.dequantize().T + self.bias


class Delayed:
    """Delayed scaling, as TransformerEngine's layers and its global state go about it."""

    def __init__(self) -> None:
        recipe = DelayedScaling(amax_history_len=2)
        num_weights = len(WEIGHTS)
        self.state = RecipeState.create(recipe, mode="forward", num_quantizers=num_weights)
        self.quantizers = dict(zip(WEIGHTS, self.state.make_quantizers(), strict=True))
        for quantizer in self.quantizers.values():
            quantizer.set_usage(columnwise=False)

    def update(self) -> None:
        """Of the scales, from the largest magnitudes of all ranks, before a forward pass."""
        group = parallel_state.get_data_parallel_group()
        history = self.state.amax_history
        torch.distributed.all_reduce(history[0], op=torch.distributed.ReduceOp.MAX, group=group)
        _amax_and_scale_update(history, self.state.scale, 448.0, self.state.recipe)

    def save(self, folder: Path) -> None:
        """What TransformerEngine's layers keep as their extra state."""
        rank = torch.distributed.get_rank()
        torch.save((self.state.scale, self.state.amax_history), f"{folder}.rank{rank}.pt")

    def load(self, folder: Path) -> None:
        saved = torch.load(f"{folder}.rank{torch.distributed.get_rank()}.pt")
        self.state.scale.copy_(saved[0])
        self.state.amax_history.copy_(saved[1])


def train_quantized(
    recipe: str,
    optimizer: str = "adams",
    num_steps: int = 6,
    reuse_grad_buf: bool = False,
    save: str | None = None,
    load: str | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Train a Quantized over all ranks as data parallel ones, by megatron.core's API.

    Args:
        recipe: "delayed", or as `make_quantizer`.
        reuse_grad_buf: --reuse-grad-buf-for-mxfp8-param-ag.
        save, load: a folder; it is saved after half of the steps, or loaded before the first, which
            is then the one after.
        fields: more of the optimizer's configuration, dtypes by their names in torch.
    Returns:
        "classes" of the inner optimizer and of the weights; "steps": for each step what
        `_look_at` returns after it, by weight; "grad_norms"; "end": the params in memory.
    """
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    # gloo (torch 2.14) puts coalesced tensors into one, which turns the bytes of quantized params
    # into bf16 numbers where bf16 params are gathered with them.
    param_and_grad_buffer._coalescing_manager = lambda *_, **__: nullcontext()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        bf16=True,
        params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
    )
    delayed = Delayed() if recipe == "delayed" else None
    quantizers = (
        delayed.quantizers if delayed else {n: make_quantizer(recipe, "cpu") for n in WEIGHTS}
    )
    module = Quantized(config, quantizers)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        fp8_param_gather=True,
        grad_reduce_in_fp32=True,
        reuse_grad_buf_for_mxfp8_param_ag=reuse_grad_buf,
    )
    model = DistributedDataParallel(config, ddp_config, module)
    settings = {
        "lr": 1e-2,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "use_distributed_optimizer": True,
        "fp8_recipe": recipe,
        "reuse_grad_buf_for_mxfp8_param_ag": reuse_grad_buf,
        **{k: getattr(torch, v) if isinstance(v, str) else v for k, v in fields.items()},
    }
    make = AdamSOptimizerConfig if optimizer == "adams" else OptimizerConfig
    chain = get_megatron_optimizer(make(**settings), [model])
    (part,) = chain.chained_optimizers
    first = 0
    if load is not None:
        first = num_steps // 2
        if delayed is not None:
            delayed.load(Path(load))
        module_cases._load(Path(load), model, chain)
        if delayed is not None:
            # The weights have been quantized by the scale, which raises amax.
            delayed.load(Path(load))
    told: dict[str, Any] = {"grad_norms": [], "steps": []}
    for step in range(first, num_steps):
        model.zero_grad_buffer()
        chain.zero_grad()
        if delayed is not None:
            delayed.update()
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randn(8, HIDDEN, generator=generator).bfloat16()
        targets = torch.randn(8, OUTPUT, generator=generator)
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        tokens, targets = tokens.chunk(size)[rank], targets.chunk(size)[rank]
        (model(tokens).float() - targets).square().mean().backward()
        finalize_model_grads([model])
        _, grad_norm, _ = chain.step()
        told["grad_norms"].append(float(grad_norm))
        told["steps"].append({name: _look_at(part, getattr(module, name)) for name in WEIGHTS})
        if save is not None and step + 1 == num_steps // 2:
            module_cases._save(Path(save), model, chain)
            if delayed is not None:
                delayed.save(Path(save))
    told["classes"] = (
        type(part.optimizer).__name__,
        type(module.weight.data).__name__,
    )
    told["end"] = {
        name: memory_of(param.data).detach().clone() for name, param in module.named_parameters()
    }
    return told


def _look_at(part: Any, weight: Any) -> dict[str, Any]:
    """Of a quantized weight: its bytes and values, its scaling, this rank's main params.

    Returns:
        "data", "full" of the whole weight; "main" of the whole weight, from all ranks, and "again",
        the values of a tensor that is quantized from it; "shard", this rank's part, a slice's
        two numbers, and of it "exp_avg" and "dtypes" of the state; and with delayed scaling,
        without "again", "scale", "amax", "scale_inv".
    """
    inner, tensor = part.optimizer, weight.data
    told: dict[str, Any] = {
        "full": tensor.dequantize(dtype=torch.float32).detach().clone(),
        "data": memory_of(tensor).detach().clone(),
        "shard": (0, 0),
    }
    main_params = torch.zeros(weight.numel())
    group, order = part.model_param_group_index_map.get(weight, (None, None))
    if group is not None:
        param = inner.param_groups[group]["params"][order]
        shard = part._get_model_param_range_map(weight)["param"]
        main = param.detach()
        if part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            main = inner.get_unscaled_state(param, "master_param")
        main_params[shard.start : shard.end] = main
        told |= {
            "shard": (shard.start, shard.end),
            "exp_avg": inner.get_unscaled_state(param, "exp_avg").clone(),
            "dtypes": {k: str(memory_of(v).dtype) for k, v in inner.state[param].items()},
        }
    torch.distributed.all_reduce(main_params)
    told["main"] = main_params.view(weight.shape)
    quantizer = tensor._quantizer
    if isinstance(quantizer, Float8Quantizer):
        scaling = {"scale": quantizer.scale, "amax": quantizer.amax, "scale_inv": tensor._scale_inv}
        told |= {name: float(value) for name, value in scaling.items()}
    else:
        # As Megatron has it: of bf16 numbers, for every recipe.
        again = quantizer.copy()(told["main"].bfloat16())
        told["again"] = again.dequantize(dtype=torch.float32)
    return told
