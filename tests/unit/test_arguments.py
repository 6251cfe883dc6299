"""The optimizer configuration of adams, and the wrappers of Megatron's reports, by themselves."""

import argparse
import copy
import pickle
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from megatron_adams.megatron import AdamSOptimizerConfig, names
from megatron_adams.megatron.config import built_as_adam, stated_as_adam
from megatron_adams.megatron.offload import sub_kernels
from megatron_adams.megatron.refusals import (
    check_config,
    check_graph_model,
    check_offloaded_model,
)
from megatron_adams.megatron.training.arguments import (
    wrap_add_megatron_arguments,
    wrap_compute_weight_and_optimizer_memory,
    wrap_print_args,
    wrap_validate_args,
    wrap_validate_yaml,
)
from megatron_adams.tuning import trial


def test_config_has_adams_beta2_and_name() -> None:
    config = AdamSOptimizerConfig(lr=1e-3)
    assert (config.optimizer, config.adam_beta2, config.adams_bias_correction) == (
        "adams",
        0.95,
        False,
    )


def test_from_config_keeps_every_field() -> None:
    plain = OptimizerConfig(optimizer="adams", lr=3e-4, adam_beta2=0.9, clip_grad=0.5, bf16=True)
    config = AdamSOptimizerConfig.from_config(
        plain, adams_bias_correction=True, adams_kernel="host", adams_match_rms=0.2
    )
    own = {
        "adams_bias_correction": True,
        "adams_cautious": False,
        "adams_from_adam": False,
        "adams_kernel": "host",
        "adams_log_adamw_rms": None,
        "adams_max_update_rms": None,
        "adams_match_rms": 0.2,
        "adams_nesterov": False,
        "override_opt_param_scheduler": False,
        "use_checkpoint_opt_param_scheduler": False,
    }
    assert {**vars(plain), **own} == vars(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"adams_max_update_rms": 0.0},
            "--adams-max-update-rms 0.0 with --optimizer adams: max",
        ),
        (
            {"adams_match_rms": -0.2},
            "--adams-match-rms -0.2 with --optimizer adams: match",
        ),
        (
            {"adams_match_rms": 0.2, "adams_max_update_rms": 1.0},
            "--adams-max-update-rms 1.0 --adams-match-rms 0.2 with --optimizer adams",
        ),
    ],
)
def test_bounds_of_the_update_rms_that_are_none_are_refused(
    fields: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AdamSOptimizerConfig(lr=1e-3, **fields).finalize()  # type: ignore[arg-type]


def test_nesterov_with_bias_correction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^--adams-nesterov with --optimizer adams and --adams-b"):
        AdamSOptimizerConfig(lr=1e-3, adams_nesterov=True, adams_bias_correction=True).finalize()


def test_config_is_printed_as_adams_while_stated_as_adam() -> None:
    config = AdamSOptimizerConfig(lr=1e-3)
    with stated_as_adam(config):
        assert config.optimizer == "adam"
        assert " optimizer='adams'" in str(config)
        assert " optimizer='adam'" not in str(config)
    assert config.optimizer == "adams"


def test_config_is_adams_again_where_megatron_raises() -> None:
    config = AdamSOptimizerConfig(lr=1e-3)
    with pytest.raises(RuntimeError, match="Megatron's"), stated_as_adam(config):
        raise RuntimeError("Megatron's")
    assert config.optimizer == "adams"


@pytest.mark.parametrize(
    ("values", "given"),
    [
        ({"fp16": True}, "--fp16"),
        ({"bf16": True, "loss_scale": 128.0}, r"--loss-scale 128\.0"),
        ({"log_num_zeros_in_grad": True}, "--log-num-zeros-in-grad"),
        (
            {
                "optimizer_cpu_offload": True,
                "optimizer_offload_fraction": 1.0,
                "use_precision_aware_optimizer": True,
                "use_distributed_optimizer": True,
            },
            "--optimizer-cpu-offload",
        ),
        (
            {"overlap_param_gather_with_optimizer_step": True},
            "--overlap-param-gather-with-optimizer-step",
        ),
    ],
)
def test_config_refuses_what_a_cuda_graph_cannot_hold(values: dict[str, Any], given: str) -> None:
    with pytest.raises(ValueError, match=f"^{given} with --optimizer-cuda-graph: .*; .*remove"):
        AdamSOptimizerConfig(lr=1e-3, optimizer_cuda_graph=True, **values).finalize()
    AdamSOptimizerConfig(lr=1e-3, **values).finalize()
    AdamSOptimizerConfig(lr=1e-3, optimizer_cuda_graph=True).finalize()


@pytest.mark.parametrize(
    ("values", "ddp_values", "given"),
    [
        ({}, {"fp8_param_gather": True}, "fp8_param_gather"),
        ({}, {"fp4_param_gather": True}, "fp4_param_gather"),
        ({}, {"use_megatron_fsdp": True}, "use_megatron_fsdp"),
        ({"grad_norm_skip_threshold": 5.0}, {}, r"grad_norm_skip_threshold=5\.0"),
    ],
)
def test_model_that_a_cuda_graph_cannot_hold_is_refused(
    values: dict[str, Any], ddp_values: dict[str, Any], given: str
) -> None:
    ddp_config = DistributedDataParallelConfig()
    vars(ddp_config).update(ddp_values)
    config = AdamSOptimizerConfig(lr=1e-3, optimizer_cuda_graph=True, **values)
    with pytest.raises(ValueError, match=f"^{given} with --optimizer-cuda-graph: .*; "):
        check_graph_model(config, ddp_config)
    check_graph_model(AdamSOptimizerConfig(lr=1e-3, **values), ddp_config)


OFFLOAD = {
    "optimizer_cpu_offload": True,
    "use_precision_aware_optimizer": True,
    "use_distributed_optimizer": True,
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer_offload_fraction": 0.5}, "--optimizer-offload-fraction 0.5 .*: belongs to"),
        ({"overlap_cpu_optimizer_d2h_h2d": True}, "--overlap-cpu-.*-h2d .*: belongs to"),
        ({"pin_cpu_grads": False}, "--no-pin-cpu-grads .*: belongs to --optimizer-cpu-offload"),
        ({"pin_cpu_params": False}, "--no-pin-cpu-params .*: belongs to --optimizer-cpu-offload"),
        ({"use_torch_optimizer_for_cpu_offload": True}, "torch has no adams; remove the flag"),
        ({"optimizer_cpu_offload": True}, "add --use-precision-aware-optimizer"),
        (OFFLOAD, "--optimizer-offload-fraction 0.0 .*: must be in"),
        (OFFLOAD | {"optimizer_offload_fraction": 1.5}, "fraction 1.5 .*: must be in"),
        (
            OFFLOAD | {"optimizer_offload_fraction": 1.0, "adams_kernel": "cuda"},
            "--adams-kernel cuda with --optimizer-cpu-offload: no param stays on the GPU",
        ),
    ],
)
def test_config_refuses_offload_that_cannot_be(values: dict[str, Any], message: str) -> None:
    config = AdamSOptimizerConfig(lr=1e-3, **values)
    with pytest.raises(ValueError, match=message):
        config.finalize()


def test_config_offloads_and_megatron_builds_as_if_it_did_not() -> None:
    config = AdamSOptimizerConfig(
        lr=1e-3, **OFFLOAD, optimizer_offload_fraction=0.5, adams_kernel="cuda"
    )
    # Whatever the recipe of fp8: the inner optimizer keeps the main params.
    assert config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    with built_as_adam(config):
        assert config.optimizer == "adam"
        assert not config.optimizer_cpu_offload and not config.use_precision_aware_optimizer
    assert config.optimizer == "adams"
    assert config.optimizer_cpu_offload and config.use_precision_aware_optimizer
    with pytest.raises(RuntimeError, match="Megatron's"), built_as_adam(config):
        raise RuntimeError("Megatron's")
    assert config.optimizer_cpu_offload and config.use_precision_aware_optimizer


@pytest.mark.parametrize("name", ["fp8_param_gather", "fp4_param_gather"])
def test_quantized_params_are_not_offloaded(name: str) -> None:
    config = AdamSOptimizerConfig(lr=1e-3, **OFFLOAD, optimizer_offload_fraction=1.0)
    settings = {"fp8_param_gather": False, "fp4_param_gather": False}
    check_offloaded_model(config, SimpleNamespace(**settings))
    quantized = SimpleNamespace(**{**settings, name: True})
    with pytest.raises(ValueError, match=f"--optimizer-cpu-offload with {name}: not supported"):
        check_offloaded_model(config, quantized)
    check_offloaded_model(AdamSOptimizerConfig(lr=1e-3), quantized)


@pytest.mark.parametrize(
    ("asked", "kernels"),
    [
        ("auto", ("auto", "auto")),
        ("cuda", ("auto", "cuda")),
        ("host", ("host", "auto")),
        ("foreach", ("foreach", "foreach")),
    ],
)
def test_kernel_of_one_device_leaves_the_other_to_its_own(
    asked: str, kernels: tuple[str, str]
) -> None:
    """Of the CPU's part and of the GPU's."""
    assert sub_kernels(asked) == kernels


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adam_eps": 0.0}, "eps=0.0: must be"),
        ({"adam_beta1": 1.0}, "beta1=1.0: must be"),
        ({"adam_beta2": 1.0}, "beta2=1.0: must be"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: must be"),
    ],
)
def test_config_refuses_hyperparameters_out_of_range(
    values: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AdamSOptimizerConfig(lr=1e-3, **values)
    with pytest.raises(ValueError, match=message):
        check_config(OptimizerConfig(optimizer="adams", lr=1e-3, **values))


def test_adams_in_a_yaml_configuration_is_refused() -> None:
    validate_yaml = wrap_validate_yaml(lambda args, defaults: args.optimizer)
    assert validate_yaml(argparse.Namespace(optimizer="adam"), {}) == "adam"
    with pytest.raises(ValueError, match="--yaml-cfg with optimizer: adams: not supported"):
        validate_yaml(argparse.Namespace(optimizer="adams"), {})


def test_parsed_arguments_are_pickled_without_this_package_and_copied_as_they_are() -> None:
    def add_megatrons(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--optimizer", choices=["adam"], default="adam")
        parser.add_argument("--adam-beta2", type=float, default=0.999, help="")
        parser.add_argument("--exp-avg-sq-dtype", default="fp32")
        return parser

    args = wrap_add_megatron_arguments(add_megatrons)(argparse.ArgumentParser()).parse_args([])
    loaded = pickle.loads(pickle.dumps(args))
    assert (loaded.adam_beta2, loaded.exp_avg_sq_dtype) == (0.999, "fp32")
    assert (type(loaded.adam_beta2), type(loaded.exp_avg_sq_dtype)) == (float, str)
    # A copy still tells the default from a number that the user has given.
    copied = copy.deepcopy(args)
    assert type(copied.adam_beta2) is type(args.adam_beta2) is not float
    assert type(copied.exp_avg_sq_dtype) is type(args.exp_avg_sq_dtype) is not str


def test_argument_dump_shows_adams_only_while_that_namespace_is_validated() -> None:
    printed: list[str] = []
    print_args = wrap_print_args(lambda title, args: printed.append(args.optimizer))
    other = argparse.Namespace(optimizer="adam")

    def validate(args: argparse.Namespace) -> None:
        assert args.optimizer == "adam"
        print_args("arguments", args)
        print_args("of another run", other)
        raise AssertionError("Megatron's own check")

    args = argparse.Namespace(
        optimizer="adams",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_eps=1e-8,
        weight_decay=0.1,
        adams_no_param_remainders=False,
        adams_from_adam=False,
        use_distributed_optimizer=True,
        use_precision_aware_optimizer=False,
        optimizer_cpu_offload=False,
        optimizer_offload_fraction=1.0,
        use_torch_optimizer_for_cpu_offload=False,
        overlap_cpu_optimizer_d2h_h2d=False,
        pin_cpu_grads=True,
        pin_cpu_params=True,
        optimizer_cuda_graph=False,
        use_megatron_fsdp=False,
        use_torch_fsdp2=False,
        ckpt_format="torch_dist",
        exp_avg_dtype="fp32",
        exp_avg_sq_dtype=torch.float32,
        main_params_dtype="fp32",
        main_grads_dtype="fp32",
    )
    with pytest.raises(AssertionError, match="Megatron's own check"):
        wrap_validate_args(validate)(args)
    assert printed == ["adams", "adam"]
    assert args.optimizer == "adams"
    args.optimizer = "adam"
    print_args("later", args)
    assert printed[-1] == "adam"


@pytest.mark.parametrize("optimizer", ["adam", "adams"])
@pytest.mark.parametrize("distributed", [True, False])
def test_memory_estimate_asks_megatron_to_print_once(optimizer: str, distributed: bool) -> None:
    verbose_calls: list[bool] = []

    def estimate(args: Any, verbose: bool = False) -> float:
        verbose_calls.append(verbose)
        return 100 * (6 + 12 / 4 if args.use_distributed_optimizer else 18)

    args = SimpleNamespace(
        optimizer=optimizer,
        use_distributed_optimizer=distributed,
        use_precision_aware_optimizer=False,
        exp_avg_dtype=torch.float32,
        main_grads_dtype=torch.float32,
    )
    told = wrap_compute_weight_and_optimizer_memory(estimate)(args, verbose=True)
    assert verbose_calls.count(True) == 1
    expected = {
        ("adam", True): 900.0,
        ("adam", False): 1800.0,
        ("adams", True): 800.0,
        ("adams", False): 1400.0,
    }
    assert told == pytest.approx(expected[optimizer, distributed])
    assert args.use_distributed_optimizer == distributed


def test_beta2_of_adamw_is_one_in_the_flag_and_in_a_trial() -> None:
    """The trial's process imports no Megatron, so each has its own."""
    assert names.ADAMW_BETA2 == trial.ADAMW_BETA2
