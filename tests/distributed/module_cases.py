"""What the ranks of test_module.py run: a small MegatronModule under megatron.core's API alone.

Megatron's own layers need TransformerEngine for context and sequence parallelism; this module
needs nothing, so that it shows the optimizer's side of them on CPUs. No megatron.training here.
"""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    model_parallel_cuda_manual_seed,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import MegatronModule, TransformerConfig

import megatron_adams
from megatron_adams import autoregister
from megatron_adams.megatron import AdamSOptimizerConfig, adopt, built_as_adam

NUM_TOKENS = 16
NUM_EXPERTS = 2
LR = 1e-2


class Probe(MegatronModule):
    """A scaled input, experts that see every token, and a column-parallel projection.

    Args:
        config: num_experts decides whether there are experts, sequence_parallel how tokens are
            split.
        hidden_size: of the input.
        output_size: of the projection, over all tp ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, output_size: int) -> None:
        super().__init__(config)
        # Read by finalize_model_grads where there are pipeline stages: no embedding is shared.
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = False
        self.position_embeddings = None
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) / 4

        self.norm = torch.nn.Parameter(1 + draw(hidden_size))
        self.norm.sequence_parallel = config.sequence_parallel
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        tp_size = config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(draw(output_size, hidden_size).chunk(tp_size)[tp_rank])
        self.bias = torch.nn.Parameter(draw(output_size).chunk(tp_size)[tp_rank])
        for param in (self.weight, self.bias):
            set_tensor_model_parallel_attributes(param, True, 0, 1)
        self.experts = torch.nn.ParameterList()
        if config.num_moe_experts:
            ep_rank = parallel_state.get_expert_model_parallel_rank()
            ep_size = config.expert_model_parallel_size
            full = draw(NUM_EXPERTS, hidden_size, hidden_size)
            for expert in full.chunk(ep_size)[ep_rank]:
                param = torch.nn.Parameter(expert.clone())
                param.allreduce = ep_size == 1
                self.experts.append(param)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(tokens of this rank, hidden_size) -> (tokens of the tp group, output_size / tp_size)"""
        hidden = tokens * self.norm
        if len(self.experts):
            group = parallel_state.get_expert_model_parallel_group()
            everyones = gather_from_sequence_parallel_region(hidden, group=group)
            outputs = sum(torch.tanh(everyones @ expert) for expert in self.experts)
            hidden = hidden + reduce_scatter_to_sequence_parallel_region(outputs, group=group)
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        return hidden @ self.weight.T + self.bias


def loss_of_step(model: torch.nn.Module, config: TransformerConfig, step: int, sizes: Any) -> Any:
    """This rank's share of the loss of the global batch, whose mean over dp x cp is the loss."""
    hidden_size, output_size = sizes
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randn(NUM_TOKENS, hidden_size, generator=generator)
    targets = torch.randn(NUM_TOKENS, output_size, generator=generator)
    # The data parallel group with the context parallel one: both split the tokens.
    num_parts = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    part = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    tokens, targets = tokens.chunk(num_parts)[part], targets.chunk(num_parts)[part]
    num_tokens = len(tokens)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = config.tensor_model_parallel_size
    targets = targets.chunk(tp_size, dim=1)[tp_rank]
    if config.sequence_parallel:
        tokens = tokens.chunk(tp_size)[tp_rank]
    return (model(tokens) - targets).square().sum() / num_tokens


def train(
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    cp_size: int = 1,
    ep_size: int = 1,
    experts: bool = False,
    sequence_parallel: bool = False,
    distributed: bool = True,
    bucket_size: int | None = None,
    sizes: tuple[int, int] = (24, 40),
    frozen: Sequence[str] = (),
    frozen_stages: Sequence[int] = (),
    overrides: dict[str, dict[str, float]] | None = None,
    build: str = "config",
    fields: dict[str, Any] | None = None,
    num_steps: int = 20,
    save: str | None = None,
) -> dict[str, Any]:
    """Train a Probe, in fp32, by megatron.core's API.

    Args:
        sizes: hidden and output size.
        frozen: names of parameters that do not train; frozen_stages: pipeline stages of which
            none does. The stages do not communicate: each has the whole module.
        overrides: pattern of names -> overrides of the param group.
        build: how the optimizer is configured and built, one of BUILDERS.
        fields: more of the configuration's; dtypes by their names.
        save: a folder; the state after half the steps is saved there as dp_reshardable, and
            loaded again at the end.
    Returns:
        "start", "params": name -> tensor of this rank, before and after; "grad_norms"; "state",
        "main": elements of exp_avg and of main params on this rank; "num_params": trainable ones of
        the module; "num_buckets"; "groups"; "parts": classes; "is_stub"; and with `save`, "saved"
        and "loaded": main params, exp_avg and group steps at the save, and after the load.
    """
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        context_parallel_size=cp_size,
        expert_model_parallel_size=ep_size,
    )
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=pp_size,
        hidden_size=sizes[0],
        num_attention_heads=2,
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        pipeline_dtype=torch.float32,
        context_parallel_size=cp_size,
        expert_model_parallel_size=ep_size,
        num_moe_experts=NUM_EXPERTS if experts else None,
        add_bias_linear=False,
        sequence_parallel=sequence_parallel,
        gradient_accumulation_fusion=False,
    )
    module = Probe(config, *sizes)
    everything = parallel_state.get_pipeline_model_parallel_rank() in frozen_stages
    for name, param in module.named_parameters():
        param.requires_grad = not (everything or name in frozen)
    model = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=distributed,
            overlap_grad_reduce=bucket_size is not None,
            bucket_size=bucket_size,
        ),
        module,
    )
    settings: dict[str, Any] = {
        "lr": LR,
        "min_lr": 0.0,
        "weight_decay": 0.1,
        "clip_grad": 0.5,  # less than the norms seen here: it takes part in every step
        "use_distributed_optimizer": distributed,
        **(fields or {}),
    }
    settings |= {k: getattr(torch, v) for k, v in settings.items() if k.endswith("_dtype")}
    optimizer = BUILDERS[build](
        settings,
        [model],
        config_overrides={ParamKey(name=k): v for k, v in overrides.items()} if overrides else None,
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LR,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=1000,
        lr_decay_style="constant",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1000,
        wd_incr_style="constant",
    )
    told: dict[str, Any] = {"grad_norms": [], "start": _named(module)}
    for step in range(num_steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = loss_of_step(model, config, step, sizes)
        if loss.requires_grad:
            loss.backward()
        finalize_model_grads([model])
        _, grad_norm, _ = optimizer.step()
        scheduler.step(increment=1)
        told["grad_norms"].append(grad_norm)
        if save is not None and step + 1 == num_steps // 2:
            told["saved"] = _tensors(optimizer)
            _save(Path(save), model, optimizer)
    told["params"] = _named(module)
    told["num_params"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
    told["num_buckets"] = sum(len(buffer.buckets) for buffer in model.buffers)
    told["is_stub"] = optimizer.is_stub_optimizer
    told["parts"] = [type(part).__name__ for part in optimizer.chained_optimizers]
    inners = [part.optimizer for part in optimizer.chained_optimizers if part.optimizer]
    told["groups"] = [
        {k: v for k, v in group.items() if k != "params"} | {"num_params": len(group["params"])}
        for inner in inners
        for group in inner.param_groups
    ]
    states = [state for inner in inners for state in inner.state.values()]
    told["state_keys"] = sorted({key for state in states for key in state})
    told["state"] = sum(tensor.numel() for state in states for tensor in state.values())
    told["main"] = sum(p.numel() for i in inners for g in i.param_groups for p in g["params"])
    # What every checkpointing path calls, also where there is nothing to keep.
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if save is not None:
        _load(Path(save), model, optimizer)
        told["loaded"] = _tensors(optimizer)
    return told


def _by_config(settings: dict[str, Any], model: list[Any], **kwargs: Any) -> Any:
    return get_megatron_optimizer(AdamSOptimizerConfig(**settings), model, **kwargs)


def _by_plain_config(settings: dict[str, Any], model: list[Any], **kwargs: Any) -> Any:
    """With Adam's beta2, as it comes where nobody gives one."""
    return get_megatron_optimizer(OptimizerConfig(optimizer="adams", **settings), model, **kwargs)


def _by_late_fields(settings: dict[str, Any], model: list[Any], **kwargs: Any) -> Any:
    config = AdamSOptimizerConfig()
    for name, value in settings.items():
        setattr(config, name, value)
    return get_megatron_optimizer(config, model, **kwargs)


def _by_provide(settings: dict[str, Any], model: list[Any], **kwargs: Any) -> Any:
    """As Megatron-Bridge does, which gives all arguments by their names."""
    config = AdamSOptimizerConfig(**settings)
    config.finalize()
    return config.provide(
        model_chunks=model, use_gloo_process_groups=True, pg_collection=None, **kwargs
    )


def _as_adam(config: AdamSOptimizerConfig, model: list[Any], kwargs: dict[str, Any]) -> Any:
    with built_as_adam(config):
        return get_megatron_optimizer(config, model, **kwargs)


def _by_adopt(settings: dict[str, Any], model: list[Any], **kwargs: Any) -> Any:
    config = AdamSOptimizerConfig(**settings)
    optimizer = _as_adam(config, model, kwargs)
    adopted = adopt(optimizer, config)
    assert adopted is optimizer and adopt(adopted, config) is adopted
    return adopted


def _by_adopt_of_a_part(settings: dict[str, Any], model: list[Any], **kwargs: Any) -> Any:
    """Of an optimizer that the caller built for Adam, with a configuration of its own."""
    plain = OptimizerConfig(optimizer="adam", **settings)
    (part,) = get_megatron_optimizer(plain, model, **kwargs).chained_optimizers
    return adopt(part, OptimizerConfig(optimizer="adams", **settings))


def _by_take_over(settings: dict[str, Any], model: list[Any], **kwargs: Any) -> Any:
    megatron_adams.register(replace="adam")
    return get_megatron_optimizer(OptimizerConfig(optimizer="adam", **settings), model, **kwargs)


def _by_autoregister(settings: dict[str, Any], model: list[Any], **kwargs: Any) -> Any:
    """By the name that this module imported before; in a partial, register() does not find it."""
    autoregister.install()
    build = functools.partial(get_megatron_optimizer, **kwargs)
    optimizer = _by_plain_config(settings, model, **kwargs)
    again = build(OptimizerConfig(optimizer="adams", **settings), model)
    assert type(again) is type(optimizer)
    return optimizer


def _by_autoregister_take_over(settings: dict[str, Any], model: list[Any], **kwargs: Any) -> Any:
    """As a framework with a closed list of optimizers does."""
    autoregister.install(replace="adam")
    return get_megatron_optimizer(OptimizerConfig(optimizer="adam", **settings), model, **kwargs)


BUILDERS = {
    "config": _by_config,
    "plain config": _by_plain_config,
    "late fields": _by_late_fields,
    "provide": _by_provide,
    "adopt": _by_adopt,
    "adopt a part": _by_adopt_of_a_part,
    "take over": _by_take_over,
    "autoregister": _by_autoregister,
    "autoregister take over": _by_autoregister_take_over,
}


def adopt_refused() -> list[str]:
    """Optimizers that cannot be adopted; return what the errors say."""
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    refused = []

    def build(name: str, *, distributed: bool = True) -> Any:
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
        model = [DistributedDataParallel(config, ddp_config, Probe(config, 8, 8))]
        plain = OptimizerConfig(optimizer=name, lr=LR, use_distributed_optimizer=distributed)
        return get_megatron_optimizer(plain, model)

    def refuse(optimizer: Any, **fields: Any) -> None:
        inner = optimizer.chained_optimizers[0].optimizer
        try:
            adopt(optimizer, AdamSOptimizerConfig(lr=LR, use_distributed_optimizer=True, **fields))
        except ValueError as exc:
            refused.append(str(exc))
        assert optimizer.chained_optimizers[0].optimizer is inner

    refuse(build("sgd", distributed=False))
    refuse(build("adam"), use_precision_aware_optimizer=True)
    started = build("adam")
    param = started.chained_optimizers[0].optimizer.param_groups[0]["params"][0]
    started.chained_optimizers[0].optimizer.state[param]["exp_avg"] = torch.zeros_like(param)
    refuse(started)
    return refused


def _named(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def _tensors(optimizer: Any) -> dict[str, Any]:
    inners = [part.optimizer for part in optimizer.chained_optimizers if part.optimizer]
    groups = [group for inner in inners for group in inner.param_groups]
    return {
        "params": [p.detach().clone() for group in groups for p in group["params"]],
        "exp_avg": [s["exp_avg"].clone() for i in inners for s in i.state.values()],
        "steps": [group["step"] for group in groups],
    }


def _sharded_state(model: Any, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "dp_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    # A Probe has the whole module on each pipeline stage: names of their own.
    stage = parallel_state.get_pipeline_model_parallel_rank()
    module_state = model.sharded_state_dict(prefix=f"stage{stage}.", metadata=metadata)
    return {
        "model": module_state,
        "optimizer": optimizer.sharded_state_dict(module_state, is_loading, metadata=metadata),
    }


def _save(folder: Path, model: Any, optimizer: Any) -> None:
    if torch.distributed.get_rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    state = _sharded_state(model, optimizer, is_loading=False)
    dist_checkpointing.save(state, str(folder), validate_access_integrity=True)


def _load(folder: Path, model: Any, optimizer: Any) -> None:
    state = dist_checkpointing.load(_sharded_state(model, optimizer, is_loading=True), str(folder))
    optimizer.load_state_dict(state["optimizer"])
