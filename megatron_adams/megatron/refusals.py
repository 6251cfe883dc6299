"""Every flag and setting that adams refuses, a function for each feature.

The command line is refused before any work is done (`check_arguments`), and a configuration of
megatron.core's API when it is finalized (`check_config`). What only the model shows is refused
before its optimizer is built (`check_model`). Each error has what was given, the rule and the
remedy (see `refusal`). What a checkpoint's files cannot do is refused where they are read
(training/checkpoint.py).

Imports torch, optimizer and names.py: no Megatron, so that the rules can be read by themselves.
"""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_adams.megatron.names import (
    ADAMS,
    DEFAULT_BETA2,
    FSDP_FORMAT,
    KERNELS,
    dtype_name,
    flag_of,
    rates_of,
)
from megatron_adams.optimizer import check_guards, check_hyperparameters

GRAPH_FLAG = "--optimizer-cuda-graph"
_ONE_OF_TWO = "remove one of the two"


def refusal(given: str, rule: str, remedy: str) -> ValueError:
    """Make the error of something that adams refuses; all of them read alike.

    Args:
        given: the flag or setting with its value, and what contradicts it.
        rule: what must be, or why it cannot be.
        remedy: what to change.
    """
    return ValueError(f"{given}: {rule}; {remedy}")


def _with_adams(flag: str) -> str:
    return f"{flag} with --optimizer {ADAMS}"


def check_values(config: Any) -> None:
    """Refuse hyperparameters that are out of range, whatever else is set.

    Args:
        config: as of `check_config`.
    Raises:
        ValueError: naming the flag.
    """
    _check_hyperparameters(config)


def check_config(config: Any) -> None:
    """Refuse what adams does not support, by the flag's name.

    Args:
        config: an OptimizerConfig, or Megatron's argument namespace, which has the same fields.
    Raises:
        ValueError: an unsupported flag is set, or a hyperparameter is out of range.
    """
    _check_precision(config)
    _check_offload(config)
    _check_guards(config)
    _check_form(config)
    _check_graph(config)
    _check_shadow(config)
    _check_hyperparameters(config)


def check_arguments(args: Namespace) -> None:
    """Refuse, before any work, what adams does not support in Megatron's command line.

    Args:
        args: Megatron's arguments with adams's own, not validated yet.
    Raises:
        ValueError: naming the flag.
    """
    # Megatron adds it for Megatron-FSDP, with a warning.
    is_distributed = args.use_distributed_optimizer or args.use_megatron_fsdp
    check_config(Namespace(**{**vars(args), "use_distributed_optimizer": is_distributed}))
    _check_graph_arguments(args)
    _check_weight_shards(args)
    _check_from_adam(args)
    _check_remainders(args)
    _check_formats(args)
    if args.use_megatron_fsdp:
        _check_fsdp_arguments(args)


def check_model(config: Any, model_chunks: Sequence[Any]) -> None:
    """Refuse what only a model, or the configuration of megatron.core's API, shows.

    Args:
        config: an AdamSOptimizerConfig.
        model_chunks: as Megatron's get_megatron_optimizer takes them.
    Raises:
        ValueError: naming the setting.
    """
    ddp_config = model_chunks[0].ddp_config
    if ddp_config.use_megatron_fsdp:
        check_fsdp_model(config, model_chunks)
    check_offloaded_model(config, ddp_config)
    check_graph_model(config, ddp_config)


def check_own_flags(args: Any, defaults: Mapping[str, Any]) -> None:
    """Refuse adams's own flags together with another optimizer.

    Args:
        args: Megatron's arguments.
        defaults: the field of each of the flags -> its value where it was not given.
    Raises:
        ValueError: one was given.
    """
    for name, default in defaults.items():
        value = getattr(args, name, default)
        if value != default:
            words = flag_of(name) if value is True else f"{flag_of(name)} {value}"
            raise refusal(
                f"{words} with --optimizer {args.optimizer}",
                f"it belongs to --optimizer {ADAMS}",
                "remove it or change the optimizer",
            )


def yaml_refusal() -> ValueError:
    """The error of adams in a YAML configuration."""
    return refusal(
        f"--yaml-cfg with optimizer: {ADAMS}",
        "not supported",
        "give Megatron's flags on the command line instead",
    )


def rates_refusal(current: Mapping[str, Any], saved: Mapping[str, Any]) -> ValueError:
    """The error of a checkpoint whose param group has other learning rates than the run's."""
    return ValueError(
        f"the run's learning rates {rates_of(current)} are not the checkpoint's "
        f"{rates_of(saved)}; add --override-opt_param-scheduler to go on from its momentum at the "
        f"run's, or give --lr and --min-lr as it has them"
    )


_PRECISIONS = {
    "main_grads_dtype": ("fp32", "bf16"),
    "main_params_dtype": ("fp32", "fp16"),
    "exp_avg_dtype": ("fp32", "bf16", "fp16", "fp8"),
}


def exp_avg_sq_refusal(dtype: torch.dtype | str) -> ValueError:
    """The error of a dtype given for exp_avg_sq."""
    given = _with_adams(f"--exp-avg-sq-dtype {dtype_name(dtype)}")
    return refusal(given, f"{ADAMS} keeps no exp_avg_sq", "remove the flag")


def _check_precision(config: Any) -> None:
    """Refuse dtypes that the precision-aware optimizer does not have, or that need it."""
    given = {name: dtype_name(getattr(config, name)) for name in _PRECISIONS}
    flags = {name: _with_adams(f"{flag_of(name)} {given[name]}") for name in _PRECISIONS}
    if dtype_name(config.exp_avg_sq_dtype) != "fp32":
        raise exp_avg_sq_refusal(config.exp_avg_sq_dtype)
    for name, allowed in _PRECISIONS.items():
        if given[name] not in allowed:
            rule = f"must be one of {', '.join(allowed)}"
            raise refusal(flags[name], rule, "give one of them, or remove the flag")
        if given[name] != "fp32" and not config.use_precision_aware_optimizer:
            raise refusal(
                flags[name],
                "belongs to the precision-aware optimizer",
                "add --use-precision-aware-optimizer, or remove the flag",
            )
    if config.use_precision_aware_optimizer and not config.use_distributed_optimizer:
        raise refusal(
            _with_adams("--use-precision-aware-optimizer"),
            "needs the distributed optimizer",
            "add --use-distributed-optimizer",
        )
    for name, needed in (("main_grads_dtype", ("bf16",)), ("main_params_dtype", ("bf16", "fp16"))):
        if given[name] != "fp32" and not any(getattr(config, flag) for flag in needed):
            raise refusal(
                flags[name],
                f"concerns training in {' or '.join(needed)}",
                f"add --{' or --'.join(needed)}, or remove the flag",
            )


def _check_remainders(args: Namespace) -> None:
    keeps_remainders = (
        args.use_precision_aware_optimizer
        and args.bf16
        and dtype_name(args.main_params_dtype) == "fp32"
    )
    if args.adams_no_param_remainders and not keeps_remainders:
        raise refusal(
            "--adams-no-param-remainders",
            "only the precision-aware optimizer keeps remainders, of bf16 params and fp32 main "
            "params",
            "add --use-precision-aware-optimizer and --bf16, or remove the flag",
        )


def _check_offload(config: Any) -> None:
    """Refuse flags of --optimizer-cpu-offload that say nothing, or what adams does not do."""
    if config.use_torch_optimizer_for_cpu_offload:
        raise refusal(
            _with_adams("--use-torch-optimizer-for-cpu-offload"),
            f"torch has no {ADAMS}",
            f"remove the flag (the CPU's part runs {ADAMS}'s own CPU kernel)",
        )
    fraction = config.optimizer_offload_fraction
    if not config.optimizer_cpu_offload:
        given = {
            # The defaults of OptimizerConfig and of the command line.
            f"--optimizer-offload-fraction {fraction}": fraction not in (0.0, 1.0),
            "--overlap-cpu-optimizer-d2h-h2d": config.overlap_cpu_optimizer_d2h_h2d,
            "--no-pin-cpu-grads": not config.pin_cpu_grads,
            "--no-pin-cpu-params": not config.pin_cpu_params,
        }
        for flag, is_given in given.items():
            if is_given:
                rule = "belongs to --optimizer-cpu-offload"
                raise refusal(_with_adams(flag), rule, "add that, or remove the flag")
        return
    if not config.use_precision_aware_optimizer:
        raise refusal(
            _with_adams("--optimizer-cpu-offload"),
            "Megatron offloads the precision-aware optimizer only",
            "add --use-precision-aware-optimizer",
        )
    if not 0 < fraction <= 1:
        raise refusal(
            _with_adams(f"--optimizer-offload-fraction {fraction}"),
            "must be in (0, 1]",
            "remove --optimizer-cpu-offload to offload nothing",
        )
    kernel = getattr(config, "adams_kernel", KERNELS[0])
    if kernel == "cuda" and fraction == 1:
        raise refusal(
            "--adams-kernel cuda with --optimizer-cpu-offload",
            "no param stays on the GPU",
            "give --optimizer-offload-fraction below 1, or remove one of the flags",
        )


def check_offloaded_model(config: Any, ddp_config: Any) -> None:
    """Refuse to offload params that are kept in 8 or 4 bits.

    Raises:
        ValueError: naming the setting.
    """
    for name in ("fp8_param_gather", "fp4_param_gather"):
        if config.optimizer_cpu_offload and getattr(ddp_config, name, False):
            rule = "not supported, the CPU has no copies of quantized params"
            raise refusal(f"--optimizer-cpu-offload with {name}", rule, _ONE_OF_TWO)


# Field -> AdamS's argument.
_HYPERPARAMETERS = {
    "lr": "lr",
    "min_lr": "lr",
    "decoupled_lr": "lr",
    "decoupled_min_lr": "lr",
    "lr_warmup_init": "lr",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_eps": "eps",
    "weight_decay": "weight_decay",
    "start_weight_decay": "weight_decay",
    "end_weight_decay": "weight_decay",
}
_VALID = {"lr": 1e-3, "betas": (0.9, DEFAULT_BETA2), "eps": 1e-8, "weight_decay": 0.0}


def _check_hyperparameters(config: Any) -> None:
    """Refuse numbers that AdamS refuses."""
    for name, argument in _HYPERPARAMETERS.items():
        value = getattr(config, name, None)
        if value is None:
            continue  # Megatron's own default, or only one of its two configurations has it.
        # The other beta is a valid one, so that the error names this one.
        betas = {"adam_beta1": (value, DEFAULT_BETA2), "adam_beta2": (0.9, value)}
        try:
            check_hyperparameters({**_VALID, argument: betas.get(name, value)})
        except ValueError as exc:
            raise ValueError(f"{_with_adams(f'{flag_of(name)} {value}')}: {exc}") from exc


def guards_given(config: Any) -> dict[str, float]:
    """The cap or the target of the update RMS, by its flag; Megatron's own config has neither."""
    names = ("adams_max_update_rms", "adams_match_rms")
    values = {flag_of(name): getattr(config, name, None) for name in names}
    return {flag: value for flag, value in values.items() if value is not None}


def _check_guards(config: Any) -> None:
    """Refuse a cap or a target of the update RMS that is none."""
    given = guards_given(config)
    try:
        check_guards(given.get("--adams-max-update-rms"), given.get("--adams-match-rms"))
    except ValueError as exc:
        raise ValueError(f"{_with_adams(_words_of(given))}: {exc}") from exc


def _check_form(config: Any) -> None:
    """Refuse two forms of the update that do not fit each other."""
    names = ("adams_nesterov", "adams_bias_correction")  # Megatron's own config has neither
    if all(getattr(config, name, False) for name in names):
        given, other = map(flag_of, names)
        rule = "not supported, the correction is not that of a numerator that looks ahead"
        raise refusal(f"{_with_adams(given)} and {other}", rule, _ONE_OF_TWO)


def _check_shadow(config: Any) -> None:
    """Refuse AdamW's shadow where it cannot follow the steps, or would follow another AdamW."""
    beta2 = getattr(config, "adams_log_adamw_rms", None)
    if beta2 is None:
        return
    given = f"--adams-log-adamw-rms {beta2}"
    if not 0 < beta2 < 1:
        raise refusal(
            _with_adams(given), "must be in (0, 1), AdamW's beta2", "give AdamW's --adam-beta2"
        )
    if getattr(config, "optimizer_cuda_graph", False):
        rule = "a CUDA graph would repeat the first step's bias correction"
        raise refusal(f"{given} with {GRAPH_FLAG}", rule, _ONE_OF_TWO)
    if config.optimizer_cpu_offload:
        rule = "the shadow would take the GPU memory that the offload saves"
        raise refusal(f"{given} with --optimizer-cpu-offload", rule, _ONE_OF_TWO)
    if not getattr(config, "decoupled_weight_decay", True):
        rule = "must be True: AdamW's weight decay is no part of its gradients"
        raise refusal(f"{given} with decoupled_weight_decay=False", rule, _ONE_OF_TWO)


def _check_weight_shards(args: Namespace) -> None:
    """Refuse a cap or a target where weights are cut into more shards than tensor parallel ones."""
    given = guards_given(args)
    if not given:
        return
    tp_size = args.tensor_model_parallel_size
    # A Megatron without these flags has no such shards.
    for name, size in (
        ("tensor_parallel_num_weight_shards", tp_size),
        (
            "expert_tensor_parallel_num_weight_shards",
            args.expert_tensor_parallel_size or tp_size,
        ),
    ):
        num_shards = getattr(args, name, None)
        if num_shards is not None and num_shards > size:
            raise refusal(
                f"{_words_of(given)} with {flag_of(name)} {num_shards} and tensor parallel size "
                f"{size}",
                "not supported, the RMS would be that of a shard",
                _ONE_OF_TWO,
            )


def _words_of(given: Mapping[str, float]) -> str:
    return " ".join(f"{flag} {value}" for flag, value in given.items())


def _check_from_adam(args: Namespace) -> None:
    """Refuse flags with which --adams-from-adam would load no momentum."""
    if not args.adams_from_adam:
        return
    for flag, is_given in (
        ("--finetune", args.finetune),
        ("--no-load-optim", args.no_load_optim),
        ("--pretrained-checkpoint", args.pretrained_checkpoint is not None),
    ):
        if is_given:
            raise refusal(
                f"--adams-from-adam with {flag}",
                "that loads the weights alone, and no momentum to go on from",
                _ONE_OF_TWO,
            )
    if args.load is None:
        raise refusal(
            "--adams-from-adam without --load",
            "must have a checkpoint of Adam's to go on from",
            "add --load, or remove the flag",
        )


def _check_formats(args: Namespace) -> None:
    """Refuse ways to keep params, and formats of checkpoints, that are not supported."""
    if args.use_torch_fsdp2:
        raise refusal(
            _with_adams("--use-torch-fsdp2"),
            "not supported",
            "use --use-megatron-fsdp or --use-distributed-optimizer",
        )
    if not args.use_megatron_fsdp and args.ckpt_format not in ("torch", "torch_dist"):
        raise refusal(
            _with_adams(f"--ckpt-format {args.ckpt_format}"),
            "must be torch_dist or torch",
            "remove the flag to get torch_dist",
        )


def _graph_refusal(given: str, rule: str, remedy: str) -> ValueError:
    return refusal(f"{given} with {GRAPH_FLAG}", rule, remedy)


def graph_version_refusal() -> ValueError:
    """The error of a Megatron that has no such field (up to 0.16)."""
    return refusal(
        "optimizer_cuda_graph=True",
        "this Megatron captures no optimizer step",
        "leave it out, or install megatron-core 0.17 or newer",
    )


def _check_graph(config: Any) -> None:
    """Refuse what a replay cannot follow, as far as a configuration shows it."""
    if not getattr(config, "optimizer_cuda_graph", False):
        return
    on_host = (
        "the host reads on each step whether it overflowed, which a CUDA graph cannot wait for"
    )
    if config.fp16:
        raise _graph_refusal("--fp16", on_host, f"give --bf16, or remove {GRAPH_FLAG}")
    if config.loss_scale is not None:
        raise _graph_refusal(f"--loss-scale {config.loss_scale}", on_host, _ONE_OF_TWO)
    if config.log_num_zeros_in_grad:
        rule = "the host reads the count inside the step, which a CUDA graph cannot wait for"
        raise _graph_refusal("--log-num-zeros-in-grad", rule, _ONE_OF_TWO)
    if config.optimizer_cpu_offload:
        rule = "a CUDA graph holds nothing of what the CPU computes"
        raise _graph_refusal("--optimizer-cpu-offload", rule, _ONE_OF_TWO)
    if config.overlap_param_gather_with_optimizer_step:
        rule = "the all-gather would go on behind the end of the CUDA graph"
        raise _graph_refusal("--overlap-param-gather-with-optimizer-step", rule, _ONE_OF_TWO)


def _check_graph_arguments(args: Namespace) -> None:
    """Refuse what a replay cannot follow, of Megatron's other arguments."""
    if not getattr(args, "optimizer_cuda_graph", False):
        return
    if args.start_weight_decay != args.end_weight_decay:
        raise _graph_refusal(
            f"--start-weight-decay {args.start_weight_decay} "
            f"--end-weight-decay {args.end_weight_decay}",
            "a CUDA graph repeats the weight decay of the step that was captured",
            "must be equal, or remove one of the flags",
        )
    if args.cuda_graph_warmup_steps < 1:
        raise _graph_refusal(
            f"--cuda-graph-warmup-steps {args.cuda_graph_warmup_steps}",
            "the first step allocates the state",
            "must be at least 1",
        )
    if args.timing_log_level > 0:
        rule = "the timers inside the step wait for the device"
        raise _graph_refusal(f"--timing-log-level {args.timing_log_level}", rule, _ONE_OF_TWO)
    if args.rl_offload_optimizer_during_inference:
        rule = "a CUDA graph needs the state where it was"
        raise _graph_refusal("--rl-offload-optimizer-during-inference", rule, _ONE_OF_TWO)


def check_graph_model(config: Any, ddp_config: Any) -> None:
    """Refuse a model that a replay cannot follow, and a setting that no flag has.

    Raises:
        ValueError: naming the setting.
    """
    if not getattr(config, "optimizer_cuda_graph", False):
        return
    for name in ("fp8_param_gather", "fp4_param_gather"):
        if getattr(ddp_config, name, False):
            rule = "not supported, the params are quantized behind the step"
            raise _graph_refusal(name, rule, _ONE_OF_TWO)
    if ddp_config.use_megatron_fsdp:
        raise _graph_refusal("use_megatron_fsdp", "not supported", "use use_distributed_optimizer")
    threshold = getattr(config, "grad_norm_skip_threshold", math.inf)
    if math.isfinite(threshold):
        raise _graph_refusal(
            f"grad_norm_skip_threshold={threshold}",
            "the host decides by the norm of each step, which a CUDA graph cannot wait for",
            f"must be inf, or {_ONE_OF_TWO}",
        )


def check_graph_chain(num_optimizers: int, *, shares_groups: bool) -> None:
    """Refuse a chain of optimizers whose grad norm the host puts together.

    Args:
        num_optimizers: how many there are.
        shares_groups: all sum the grad norm over the same ranks.
    Raises:
        ValueError: they do not.
    """
    if num_optimizers > 1 and not shares_groups:
        raise refusal(
            f"{GRAPH_FLAG} with {num_optimizers} optimizers that sum the grad norm over different "
            "ranks",
            "not supported, the host adds the sums",
            "add --use-distributed-optimizer, or remove the flag",
        )


def check_fsdp_model(config: Any, model_chunks: Sequence[Any]) -> None:
    """Refuse a configuration of the optimizer that the models of Megatron-FSDP do not have.

    Raises:
        ValueError: naming the setting.
    """
    version = getattr(model_chunks[0].ddp_config, "megatron_fsdp_version", 1)
    if version != 1:
        raise _fsdp_version_refusal(f"megatron_fsdp_version={version}")
    if len(model_chunks) > 1:
        raise refusal(
            f"{len(model_chunks)} model chunks with Megatron-FSDP",
            "must be one, its device mesh has no pipeline stages",
            "build the model in one chunk",
        )
    is_decoupled = getattr(model_chunks[0].ddp_config, "megatron_fsdp_use_decoupled_grad", None)
    if is_decoupled is None:
        raise fsdp_too_old()
    if is_decoupled != config.use_precision_aware_optimizer:
        raise refusal(
            f"megatron_fsdp_use_decoupled_grad={is_decoupled} in the model's ddp_config with "
            f"use_precision_aware_optimizer={config.use_precision_aware_optimizer}",
            "must be the same, or the optimizer finds no gradients",
            "change one of them",
        )


def _fsdp_refusal(given: str, rule: str, remedy: str) -> ValueError:
    return refusal(f"{given} with --use-megatron-fsdp", rule, remedy)


def _fsdp_version_refusal(given: str) -> ValueError:
    return refusal(given, "must be 1, the other's optimizer is another class", "give 1")


def fsdp_too_old() -> ValueError:
    """The error of a Megatron-FSDP that cannot be told how to keep gradients (up to 0.17)."""
    return refusal(
        _with_adams("--use-megatron-fsdp"),
        "this version of Megatron-FSDP keeps gradients in another way, and was not run",
        "use --use-distributed-optimizer, or install megatron-core 0.18 or newer",
    )


def _check_fsdp_arguments(args: Namespace) -> None:
    """Refuse flags that Megatron-FSDP contradicts, or drops without a word."""
    # Up to 0.19 there is one version, and no flag.
    if (version := getattr(args, "megatron_fsdp_version", 1)) != 1:
        raise _fsdp_version_refusal(_with_adams(f"--megatron-fsdp-version {version}"))
    if args.ckpt_format != FSDP_FORMAT:
        raise _fsdp_refusal(
            f"--ckpt-format {args.ckpt_format}",
            f"must be {FSDP_FORMAT}",
            f"add --ckpt-format {FSDP_FORMAT}",
        )
    if args.pipeline_model_parallel_size > 1:
        raise _fsdp_refusal(
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}",
            "must be 1, Megatron-FSDP's device mesh has no pipeline stages",
            "use --use-distributed-optimizer",
        )
    if args.num_distributed_optimizer_instances > 1:
        raise _fsdp_refusal(
            f"--num-distributed-optimizer-instances {args.num_distributed_optimizer_instances}",
            "not supported",
            _ONE_OF_TWO,
        )
    if args.optimizer_cpu_offload:
        rule = "not supported, the params are DTensors"
        raise _fsdp_refusal("--optimizer-cpu-offload", rule, _ONE_OF_TWO)
    for name in ("main_params_dtype", "main_grads_dtype"):
        if (dtype := dtype_name(getattr(args, name))) != "fp32":
            raise _fsdp_refusal(
                f"{flag_of(name)} {dtype}",
                "Megatron-FSDP has a flag of its own for it",
                f"give {flag_of(f'megatron_fsdp_{name}')} {dtype} instead",
            )
    if args.adams_no_param_remainders:
        raise _fsdp_refusal(
            "--adams-no-param-remainders",
            "there are no remainders, Megatron-FSDP keeps the main params",
            "remove the flag",
        )
    _check_gated_layers(args)
    loads_optimizer = args.load is not None and not (args.finetune or args.no_load_optim)
    if loads_optimizer and not args.strict_fsdp_dtensor_load:
        raise _fsdp_refusal(
            "--no-strict-fsdp-dtensor-load",
            "momentum that the checkpoint lacks would silently start at zero",
            "remove the flag, or load the weights alone with --no-load-optim",
        )
    _check_fsdp_dtypes(args)


def _check_gated_layers(args: Namespace) -> None:
    """Refuse checkpoints at which Megatron would fail, after the work up to the first save."""
    flag = "--save" if args.save is not None else "--load" if args.load is not None else None
    if not args.swiglu or flag is None:
        return
    words = f"--swiglu and {flag} with --use-megatron-fsdp"
    rule = "Megatron fails where it splits gated layers for a checkpoint"
    if not (args.bf16 or args.fp16):
        raise refusal(f"{words} in fp32", rule, f"add --bf16 or --fp16, or remove {flag}")
    if args.data_parallel_sharding_strategy == "no_shard":
        words = f"{words} and --data-parallel-sharding-strategy no_shard"
        raise refusal(words, rule, f"give another strategy, or remove {flag}")


def _check_fsdp_dtypes(args: Namespace) -> None:
    """Refuse dtypes of main params and gradients that the step or clipping cannot take."""
    model = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    main_params, main_grads = (
        "auto" if dtype is None else dtype_name(dtype)
        for dtype in (args.megatron_fsdp_main_params_dtype, args.megatron_fsdp_main_grads_dtype)
    )
    params_flag = f"--megatron-fsdp-main-params-dtype {main_params}"
    grads_flag = f"--megatron-fsdp-main-grads-dtype {main_grads}"
    params_dtype = model if main_params == "auto" else main_params
    grads_dtype = model if main_grads == "auto" else main_grads
    if args.use_precision_aware_optimizer:
        if grads_dtype == "fp16" and args.clip_grad > 0:
            raise refusal(
                f"{grads_flag} in {model} with --use-precision-aware-optimizer",
                "Megatron clips fp32 and bf16 gradients only",
                "give --megatron-fsdp-main-grads-dtype fp32",
            )
        return
    if params_dtype != "fp32" and args.clip_grad > 0:
        raise refusal(
            f"{params_flag} in {model}",
            "the gradients get the dtype of the main params, and Megatron clips fp32 gradients "
            "only",
            "add --use-precision-aware-optimizer, or remove the flag",
        )
    if main_params == "auto" and grads_dtype != params_dtype:
        raise refusal(
            f"{grads_flag} with {params_flag} in {model}",
            "there are no main params, whose dtype the gradients would get, and torch takes "
            "gradients in the dtype of the param alone",
            "add --use-precision-aware-optimizer, or remove one of the flags",
        )
