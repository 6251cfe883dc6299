"""What the ranks of test_rl.py run: optimizers that the frameworks' own code builds.

Each function of BUILDERS does what its framework does with what docs/frameworks.md has a user
write. Megatron is real; frameworks are parts of their sources, see sources.py.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_adams import autoregister
from tests.distributed.module_cases import Probe
from tests.frameworks import sources

# Other than any default.
LR, DECAY, BETA1, BETA2, EPS, CLIP = 3e-3, 0.07, 0.88, 0.97, 1e-7, 0.5
SIZES = 24, 40
STEPS = 3


class Fields(dict):
    """A framework's configuration, with fields as attributes and by `get`, as OmegaConf's."""

    __getattr__ = dict.__getitem__


def build_model(dtype: torch.dtype = torch.bfloat16) -> DistributedDataParallel:
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=SIZES[0],
        num_attention_heads=2,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
    )
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    return DistributedDataParallel(config, ddp, Probe(config, *SIZES).to(dtype))


def take_step(model: DistributedDataParallel, optimizer: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(8, SIZES[0], generator=generator).to(next(model.parameters()).dtype)
    model.zero_grad_buffer()
    optimizer.zero_grad()
    (model(batch).float() - 1).square().mean().backward()
    finalize_model_grads([model])
    optimizer.step()


# --- the frameworks' ways -----------------------------------------------------------------------


def verl(root: Path, model: Any) -> Any:
    """verl: an entry point of the group verl.plugins, and `actor.optim` of its configuration."""
    import megatron_adams.verl  # noqa: F401

    dtypes = sources.load(
        root, "verl.utils.torch_dtypes", ["PrecisionType", "HALF_LIST", "FLOAT_LIST", "BFLOAT_LIST"]
    )
    module = sources.load(
        root,
        "verl.utils.megatron.optimizer",
        ["init_megatron_optim_config", "get_megatron_optimizer", "_MUON_ALGORITHMS"],
        {"print_rank_0": print, "PrecisionType": dtypes.PrecisionType},
    )
    optim = Fields(
        optimizer="adams",
        lr=LR,
        min_lr=0.0,
        clip_grad=CLIP,
        weight_decay=DECAY,
        use_precision_aware_optimizer=True,
        exp_avg_dtype="bf16",
        override_optimizer_config={"adam_beta1": BETA1, "adam_beta2": BETA2, "adam_eps": EPS},
    )
    config = module.init_megatron_optim_config(optim, bf16=True)
    return module.get_megatron_optimizer([model], config)


def skyrl(root: Path, model: Any) -> Any:
    """SkyRL: `optimizer_config`, and the keyword arguments of its `megatron_config`."""
    _autoregister()
    dtypes = sources.load(
        root,
        "skyrl.backends.skyrl_train.distributed.megatron.optimizer_dtype",
        ["coerce_optimizer_dtype_kwargs", "_DTYPE_NAME_TO_TORCH", "_LEGAL_FIELD_DTYPES"],
    )
    module = sources.load(
        root,
        "skyrl.backends.skyrl_train.distributed.megatron.optimizer",
        ["init_megatron_optim_config", "get_megatron_optimizer"],
        {"coerce_optimizer_dtype_kwargs": dtypes.coerce_optimizer_dtype_kwargs},
    )
    chosen = SimpleNamespace(
        lr=LR,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        adam_betas=[BETA1, BETA2],
    )
    more = {
        "optimizer": "adams",
        "adam_eps": EPS,
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": "bf16",
    }
    config = module.init_megatron_optim_config(chosen, more)
    return module.get_megatron_optimizer([model], config)


PRECISION = {"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16}
BRIDGE = {
    "lr": LR,
    "weight_decay": DECAY,
    "adam_beta1": BETA1,
    "adam_beta2": BETA2,
    "adam_eps": EPS,
    "clip_grad": CLIP,
    "bf16": True,
    "use_distributed_optimizer": True,
    **PRECISION,
}


def megatron_bridge(root: Path, model: Any) -> Any:
    """Megatron-Bridge: AdamSOptimizerConfig in the place of its own OptimizerConfig."""
    from megatron_adams.megatron import AdamSOptimizerConfig

    fields = dict(BRIDGE)
    config = AdamSOptimizerConfig(exp_avg_dtype=fields.pop("exp_avg_dtype"))
    # As its recipes do: one field after the other.
    for name, value in fields.items():
        setattr(config, name, value)
    return _set_up_by_bridge(root, model, config)


def megatron_bridge_by_name(root: Path, model: Any) -> Any:
    """Megatron-Bridge's OptimizerConfig with optimizer="adams", as NeMo-RL builds it of YAML."""
    _autoregister()
    config = _bridge_config(root).OptimizerConfig(optimizer="adams", **BRIDGE)
    return _set_up_by_bridge(root, model, config)


def _bridge_config(root: Path) -> Any:
    return sources.load(
        root,
        "megatron.bridge.training.config",
        [
            "OptimizerConfig",
            "OptimizerConfigOverrideProvider",
            "OptimizerConfigOverrideProviderContext",
        ],
    )


def _set_up_by_bridge(root: Path, model: Any, config: Any) -> Any:
    names = vars(_bridge_config(root))
    module = sources.load(
        root,
        "megatron.bridge.training.optim",
        ["setup_optimizer"],
        {
            **{name: value for name, value in names.items() if "OverrideProvider" in name},
            "_get_scheduler": lambda *_: None,
        },
    )
    # ConfigContainer.validate does, before setup_optimizer.
    config.finalize()
    optimizer, _ = module.setup_optimizer(config, SimpleNamespace(), [model])
    return optimizer


def areal(root: Path, model: Any) -> Any:
    """AReaL: its list is closed, so Adam's name is taken over."""
    _autoregister(replace="adam")
    module = sources.load(
        root,
        "areal.engine.megatron_engine",
        ["MegatronEngine._create_optimizer"],
        {"MegatronCheckpointManager": lambda **_: None},
    )
    engine = SimpleNamespace(
        optimizer_config=SimpleNamespace(
            type="adam",
            lr=LR,
            min_lr_ratio=0.0,
            weight_decay=DECAY,
            beta1=BETA1,
            beta2=BETA2,
            eps=EPS,
            gradient_clipping=CLIP,
            warmup_steps_proportion=0.0,
            lr_scheduler_type="constant",
        ),
        config=SimpleNamespace(use_lora=False),
        mcore_config=SimpleNamespace(
            ddp=SimpleNamespace(use_distributed_optimizer=True),
            overlap_param_gather_with_optimizer_step=False,
            use_checkpoint_opt_param_scheduler=False,
            async_save=False,
            use_precision_aware_optimizer=True,
            main_grads_dtype="float32",
            main_params_dtype="float32",
            exp_avg_dtype="bfloat16",
            exp_avg_sq_dtype="float32",
        ),
        model=[model],
        dtype=torch.bfloat16,
        enable_fp8=False,
    )
    module._create_optimizer(engine, SimpleNamespace(total_train_steps=10))
    return engine.optimizer


def ms_swift(root: Path, model: Any) -> Any:
    """ms-swift: the same. Its arguments are the fields of Megatron's configuration.

    Without the precision-aware optimizer, which Megatron gives to "adam" with TransformerEngine
    alone.
    """
    _autoregister(replace="adam")
    module = sources.load(
        root,
        "swift.megatron.trainers.base",
        ["BaseMegatronTrainer.get_optimizer_and_scheduler"],
        {"mcore_016": True, "get_optimizer_param_scheduler": lambda *_: None},
    )
    plain = {name: value for name, value in BRIDGE.items() if name not in PRECISION}
    args = SimpleNamespace(**plain, params_dtype=torch.bfloat16, optimizer="adam")
    trainer = SimpleNamespace(
        args=args, wrapped_models=[model], _needs_own_param_groups=lambda *_: False
    )
    optimizer, _ = module.get_optimizer_and_scheduler(trainer)
    return optimizer


def slime(root: Path, model: Any) -> Any:
    """slime: Megatron's command line, of which it makes a plain OptimizerConfig."""
    _autoregister()
    module = sources.load(
        root,
        "slime.backends.megatron_utils.model",
        ["setup_model_and_optimizer"],
        {
            "get_model": lambda *_: [model],
            "get_model_provider_func": lambda *_: None,
            "get_optimizer_param_scheduler": lambda *_: None,
        },
    )
    args = SimpleNamespace(
        **{**BRIDGE, "params_dtype": torch.bfloat16},
        optimizer="adams",
        moe_use_upcycling=False,
        load="somewhere",
        num_rollout=1,
        use_stateless_adam=False,
        enable_gloo_process_groups=True,
    )
    _, optimizer, _ = module.setup_model_and_optimizer(args)
    return optimizer


BUILDERS: dict[str, Callable[[Path, Any], Any]] = {
    "verl": verl,
    "skyrl": skyrl,
    "megatron-bridge": megatron_bridge,
    "megatron-bridge_by_name": megatron_bridge_by_name,
    "areal": areal,
    "ms-swift": ms_swift,
    "slime": slime,
}


def _autoregister(replace: str | None = None) -> None:
    """What the package's .pth file does at a start of Python where the variable is set."""
    if replace:
        os.environ[autoregister.REPLACE] = replace
    else:
        os.environ[autoregister.AUTOREGISTER] = "1"
    autoregister.install_from_environment()


def build(framework: str, root: str) -> dict[str, Any]:
    """Build an optimizer by a framework's code, and take steps.

    Returns:
        "class": of the inner optimizer; "groups": its groups, without params; "state": name ->
        dtype of the stored tensors; "precision": what Megatron decided of the precision-aware
        optimizer; "clip_grad"; "moved": whether every param of the model has changed.
    """
    model = build_model()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = BUILDERS[framework](Path(root), model)
    for step in range(STEPS):
        take_step(model, optimizer, step)
    (part,) = optimizer.chained_optimizers
    inner = part.optimizer
    groups = [{k: v for k, v in group.items() if k != "params"} for group in inner.param_groups]
    return {
        "class": f"{type(inner).__module__}.{type(inner).__name__}",
        "groups": groups,
        "state": {k: v.dtype for state in inner.state.values() for k, v in state.items()},
        "precision": part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
        "clip_grad": part.config.clip_grad,
        "moved": [
            not torch.equal(old, new.detach())
            for old, new in zip(before, model.parameters(), strict=True)
        ],
    }


# --- offload between phases ---------------------------------------------------------------------


class PretendedGpu:
    """While entered, tensors are on a GPU until they are moved away, and moving one copies it."""

    def __init__(self) -> None:
        self._away: set[int] = set()
        self._stand_ins: dict[str, Any] = {
            "is_cuda": property(lambda tensor: _place_of(tensor) not in self._away),
            "cpu": lambda tensor: self._moved_away(tensor),
            "cuda": lambda tensor: self._moved_back(tensor),
            "to": lambda tensor, device, **_: (
                self._moved_away(tensor) if device == "cpu" else self._moved_back(tensor)
            ),
        }

    def _moved_away(self, tensor: Tensor) -> Tensor:
        copied = tensor.clone()
        self._away.add(_place_of(copied))
        return copied

    def _moved_back(self, tensor: Tensor) -> Tensor:
        copied = tensor.clone()
        self._away -= {_place_of(tensor), _place_of(copied)}
        return copied

    def __enter__(self) -> None:
        for name, stand_in in self._stand_ins.items():
            setattr(Tensor, name, stand_in)

    def __exit__(self, *_: object) -> None:
        for name in self._stand_ins:
            delattr(Tensor, name)


def _place_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _by_megatron(_: Path | None) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    return (
        lambda optimizer: optimizer.offload_to_cpu(),
        lambda optimizer: optimizer.restore_from_cpu(),
    )


def _by_verl(root: Path | None) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    assert root is not None
    names = [
        f"{verb}_megatron_{what}"
        for verb in ("offload", "load")
        for what in ("optimizer", "copy_params")
    ]
    module = sources.load(
        root,
        "verl.utils.megatron_utils",
        names,
        {
            "get_torch_device": lambda: torch.cuda,
            "get_device_id": lambda: "cuda",
            "get_global_memory_buffer": lambda: SimpleNamespace(buffer={}),
        },
    )
    return module.offload_megatron_optimizer, module.load_megatron_optimizer


def _by_nemo_rl(root: Path | None) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    assert root is not None
    name = "nemo_rl.models.policy.workers.megatron_policy_worker"
    method = "MegatronPolicyWorkerImpl.move_optimizer"
    module = sources.load(root, name, [method])

    def move(device: str) -> Callable[[Any], None]:
        return lambda optimizer: module.move_optimizer(SimpleNamespace(optimizer=optimizer), device)

    return move("cpu"), move("cuda")


MOVERS = {"megatron": _by_megatron, "verl": _by_verl, "nemo-rl": _by_nemo_rl}


def offload_between_steps(
    mover: str, root: str | None = None, fields: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Move the optimizer's tensors away after each step, and back before the next one.

    Args:
        mover: of MOVERS.
        root: the framework's folder, for its own.
        fields: of the configuration; dtypes by name.
    Returns:
        "kept": how many of the state's tensors are still in memory where they were, after they have
        been moved away; "num_tensors": how many there are; "params", "state": at the end.
    """
    import gc

    from torch.multiprocessing.reductions import StorageWeakRef

    from megatron_adams.megatron import AdamSOptimizerConfig

    given = {k: getattr(torch, v) if k.endswith("dtype") else v for k, v in (fields or {}).items()}
    model = build_model(torch.bfloat16 if "bf16" in given else torch.float32)
    config = AdamSOptimizerConfig(use_distributed_optimizer=True, lr=LR, **given)
    optimizer = config.provide([model])
    inner = optimizer.chained_optimizers[0].optimizer
    away, back = MOVERS[mover](Path(root) if root else None) if mover != "none" else (None, None)
    kept, gpu = 0, PretendedGpu()
    for step in range(STEPS):
        take_step(model, optimizer, step)
        if away is None or back is None:
            continue
        tensors = [each for state in inner.state.values() for each in state.values()]
        storages = [StorageWeakRef(each.untyped_storage()) for each in tensors]
        del tensors
        with gpu:
            away(optimizer)
        gc.collect()
        kept += sum(not storage.expired() for storage in storages)
        with gpu:
            back(optimizer)
    states = list(inner.state.values())
    return {
        "kept": kept,
        "num_tensors": sum(map(len, states)),
        "params": [param.detach().clone() for param in model.parameters()],
        "state": [tensor.clone() for state in states for tensor in state.values()],
    }
