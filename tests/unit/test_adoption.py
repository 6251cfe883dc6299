"""AdamS in Adam's place, each decision by itself: on stand-ins for what Megatron has built.

tests/distributed/test_build.py trains with real ones.
"""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from megatron_adams import AdamS
from megatron_adams.megatron import AdamSOptimizerConfig, adoption, versions
from megatron_adams.megatron.config import as_adams, built_as_adam, wrap_post_init
from megatron_adams.megatron.distributed import AdamSChainedOptimizer

LOGGER = "megatron_adams.megatron.adoption"


# --- get_megatron_optimizer -----------------------------------------------------------------------


class Mimo:
    """Stands for a MIMO model, whose optimizer Megatron builds module by module."""


class Building:
    """The wrapper around a get_megatron_optimizer that notes what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, str]] = []
        self.checked: list[Any] = []
        self.build = adoption.wrap_get_megatron_optimizer(self._theirs)

    def _theirs(self, config: Any, model_chunks: Any, **kwargs: Any) -> str:
        self.seen.append((config, config.optimizer))
        return f"theirs {kwargs}"


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch) -> Building:
    building = Building()
    monkeypatch.setattr(adoption, "_taken_over", set())
    monkeypatch.setattr(adoption, "MimoModel", Mimo)
    monkeypatch.setattr(adoption, "_put_adams_in", lambda built, config: ("ours", built, config))
    monkeypatch.setattr(adoption, "check_model", lambda *given: building.checked.append(given))
    return building


def test_adam_is_built_for_adams_and_exchanged(
    building: Building, caplog: pytest.LogCaptureFixture
) -> None:
    config = AdamSOptimizerConfig(lr=1e-3)
    assert building.build(config, ["chunk"], more=1) == ("ours", "theirs {'more': 1}", config)
    assert building.seen == [(config, "adam")]
    assert config.optimizer == "adams"
    # The model is looked at before anything is built.
    assert building.checked == [(config, ["chunk"])]
    assert "TAKES THE PLACE" not in caplog.text


def test_model_is_refused_before_its_optimizer_is_built(
    building: Building, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("refused")

    monkeypatch.setattr(adoption, "check_model", refuse)
    with pytest.raises(ValueError, match="refused"):
        building.build(AdamSOptimizerConfig(lr=1e-3), ["chunk"])
    assert building.seen == []


@pytest.mark.parametrize(
    ("name", "chunk"),
    [("adam", "chunk"), ("sgd", "chunk"), ("adams", Mimo())],
    ids=["adam", "sgd", "whole MIMO model"],
)
def test_other_optimizers_and_whole_mimo_models_are_passed_on(
    building: Building, name: str, chunk: Any
) -> None:
    config = SimpleNamespace(optimizer=name)
    assert building.build(config, [chunk]) == "theirs {}"
    assert building.seen == [(config, name)]
    assert building.checked == []


def test_name_that_is_taken_over_is_built_as_adams_and_said(
    building: Building, caplog: pytest.LogCaptureFixture
) -> None:
    adoption.take_over("adam")
    given = OptimizerConfig(optimizer="adam", lr=3e-4, adam_beta2=0.97)
    with caplog.at_level(logging.WARNING, LOGGER):
        _, _, config = building.build(given, ["chunk"])
    assert (config.optimizer, config.lr, config.adam_beta2) == ("adams", 3e-4, 0.97)
    # The caller's own is a copy's source, and stays.
    assert given.optimizer == "adam"
    assert caplog.text.count("adams TAKES THE PLACE of optimizer='adam'") == 1
    assert building.build(SimpleNamespace(optimizer="sgd"), ["chunk"]) == "theirs {}"


def test_only_adams_name_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "_taken_over", set())
    with pytest.raises(ValueError, match=r"^replace='sgd': must be 'adam', the one"):
        adoption.take_over("sgd")
    assert adoption._taken_over == set()


def test_builder_of_others_is_passed_on_what_is_not_adams() -> None:
    build = adoption.wrap_builder_of_others(lambda config, *args: ("theirs", args))
    assert build(SimpleNamespace(optimizer="muon"), 1) == ("theirs", (1,))
    with pytest.raises(RuntimeError, match=r"call megatron_adams\.register\(\) first"):
        build(SimpleNamespace(optimizer="adams"), 1)


# --- adopt ----------------------------------------------------------------------------------------


class Chained:
    """Stands for Megatron's ChainedOptimizer."""

    def __init__(self, parts: list[Any]) -> None:
        self.chained_optimizers = parts
        self.config: Any = None


class Distributed(SimpleNamespace):
    """Stands for its DistributedOptimizer."""


class Hybrid(torch.optim.AdamW):
    """Stands for its HybridDeviceOptimizer."""


PRECISION = "use_precision_aware_optimizer_no_fp8_or_ds_fp8"


def make_adam(kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **defaults: Any) -> Any:
    own = {"params": [torch.nn.Parameter(torch.zeros(2))], "betas": (0.7, 0.8)}
    return kind([own, {"params": [torch.nn.Parameter(torch.ones(2))]}], lr=1e-3, **defaults)


def make_part(
    inner: Any, kind: type = SimpleNamespace, *, aware: bool = False, fsdp: bool = False
) -> Any:
    return kind(
        optimizer=inner,
        config=SimpleNamespace(**{PRECISION: aware}),
        ddp_config=SimpleNamespace(use_megatron_fsdp=fsdp),
    )


@pytest.fixture
def adopting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "ChainedOptimizer", Chained)
    monkeypatch.setattr(adoption, "DistributedOptimizer", Distributed)
    monkeypatch.setattr(adoption, "HybridDeviceOptimizer", Hybrid)
    monkeypatch.setattr(adoption, "_put_adams_in", lambda optimizer, _: optimizer)


CONFIG = AdamSOptimizerConfig(lr=1e-3, adam_beta1=0.8, adam_beta2=0.96, adam_eps=1e-6)


@pytest.mark.usefixtures("adopting")
def test_part_is_put_in_a_chain_and_gets_the_configurations_hyperparameters() -> None:
    part = make_part(make_adam(), Distributed)
    adopted: Any = adoption.adopt_built(part, CONFIG)
    assert type(adopted) is Chained
    assert adopted.chained_optimizers == [part]
    assert adopted.config is part.config is CONFIG
    # A group's own stay.
    assert [group["betas"] for group in part.optimizer.param_groups] == [(0.7, 0.8), (0.8, 0.96)]
    assert [group["eps"] for group in part.optimizer.param_groups] == [1e-6, 1e-6]


@pytest.mark.usefixtures("adopting")
def test_megatron_fsdps_optimizer_is_put_in_no_chain() -> None:
    """Megatron's own checkpointing looks for it outside of one."""
    part = make_part(make_adam(), Distributed, fsdp=True)
    assert adoption.adopt_built(part, CONFIG) is part


@pytest.mark.usefixtures("adopting")
def test_chain_stays_with_a_part_that_has_no_params() -> None:
    chain = Chained([make_part(None, Distributed), make_part(make_adam())])
    assert adoption.adopt_built(chain, CONFIG) is chain
    assert chain.config is chain.chained_optimizers[0].config is CONFIG


def test_optimizer_with_adams_in_it_is_returned_as_it_is() -> None:
    chain = AdamSChainedOptimizer([])
    chain.config = before = object()
    assert adoption.adopt_built(chain, CONFIG) is chain
    assert chain.config is before


def started() -> torch.optim.Optimizer:
    adam = make_adam()
    adam.state[adam.param_groups[0]["params"][0]] = {"exp_avg": torch.zeros(2)}
    return adam


@pytest.mark.usefixtures("adopting")
@pytest.mark.parametrize(
    ("part", "message"),
    [
        (make_part(make_adam(Hybrid)), "with a Hybrid inside: must be an Adam on the params' own"),
        (
            make_part(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)),
            "with a SGD inside: must be an Adam",
        ),
        (make_part(started()), "it has state of 1 params, which would be lost"),
        (
            make_part(make_adam(), Distributed, aware=True),
            f"{PRECISION} was True when it was built, and is False in the configuration",
        ),
    ],
    ids=["hybrid", "sgd", "state", "precision"],
)
def test_what_cannot_be_adopted_is_refused_and_left_as_it_is(part: Any, message: str) -> None:
    given, inner = part.config, part.optimizer
    with pytest.raises(ValueError, match=message):
        adoption.adopt_built(part, CONFIG)
    assert part.config is given and part.optimizer is inner
    assert inner.param_groups[0].get("eps") != CONFIG.adam_eps


@pytest.mark.usefixtures("adopting")
def test_precision_is_compared_where_the_optimizer_knows_it() -> None:
    """The optimizers of plain fp32 and bf16 never take it."""
    part = make_part(make_adam(), aware=True)
    assert adoption.adopt_built(part, CONFIG).chained_optimizers == [part]


# --- what AdamS loads -----------------------------------------------------------------------------


def make_adams(**options: Any) -> AdamS:
    return AdamS([torch.nn.Parameter(torch.zeros(2))], lr=1e-3, **options)


@pytest.mark.parametrize(("saved", "num_lines"), [(False, 0), (True, 1)])
def test_form_of_this_run_is_kept_and_a_change_is_said(
    caplog: pytest.LogCaptureFixture, saved: bool, num_lines: int
) -> None:
    adams = make_adams()
    with caplog.at_level(logging.INFO, LOGGER):
        kept = adoption.keep_own_form(adams, make_adams(nesterov=saved).state_dict())
    assert [group["nesterov"] for group in kept["param_groups"]] == [False]
    assert caplog.text.count("nesterov is False here and True in the checkpoint") == num_lines
    assert len(caplog.records) == num_lines


def adams_state(adam_steps: int) -> dict[str, Any]:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    adam = torch.optim.AdamW(params, lr=1e-3)
    for _ in range(adam_steps):
        for param in params:
            param.grad = torch.ones_like(param)
        adam.step()
    return adam.state_dict()


def test_adams_own_state_is_loaded_as_it_is() -> None:
    adams = make_adams()
    adams.param_groups[0]["params"][0].grad = torch.ones(2)
    adams.step()
    state = adams.state_dict()
    assert adoption.take_from_adam(adams, state) is state


def test_adam_that_has_no_momentum_of_some_param_is_refused() -> None:
    state = adams_state(3)
    del state["state"][1]
    with pytest.raises(ValueError, match=r"no momentum of 1 of 2 parameters \(number 1 and so on"):
        adoption.take_from_adam(make_adams(), state)


def test_groups_of_adam_without_state_are_converted_and_nothing_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As the distributed optimizer loads them: its state comes by another way."""
    with caplog.at_level(logging.INFO, LOGGER):
        converted = adoption.take_from_adam(make_adams(), adams_state(0))
        assert caplog.records == []
        adoption.take_from_adam(make_adams(), adams_state(3))
    assert converted["state"] == {}
    assert len(caplog.records) == 1 and "3" in caplog.text


# --- configurations -------------------------------------------------------------------------------


def test_configuration_of_adams_is_itself_and_any_other_a_copy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = AdamSOptimizerConfig(lr=1e-3, adam_beta2=0.999, adams_cautious=True)
    with caplog.at_level(logging.WARNING):
        assert as_adams(config) is config
        assert config.adam_beta2 == 0.999
        plain = OptimizerConfig(optimizer="adam", lr=1e-3, adam_beta2=0.97)
        copy = as_adams(plain)
    assert (copy.optimizer, copy.adam_beta2, plain.optimizer) == ("adams", 0.97, "adam")
    assert caplog.records == []


def test_adams_default_of_beta2_becomes_the_papers_and_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert as_adams(OptimizerConfig(optimizer="adam", lr=1e-3)).adam_beta2 == 0.95
    assert "adam_beta2=0.999 is OptimizerConfig's default, made for Adam; 0.95" in caplog.text


@pytest.mark.parametrize("kind", [AdamSOptimizerConfig, OptimizerConfig])
def test_fields_that_contradict_each_other_are_refused_where_it_is_used(kind: Any) -> None:
    config = kind(lr=1e-3)
    config.exp_avg_dtype = torch.bfloat16
    with pytest.raises(ValueError, match="belongs to the precision-aware optimizer"):
        as_adams(config)


def test_megatron_without_captured_steps_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AdamSOptimizerConfig(lr=1e-3, optimizer_cuda_graph=True)
    config.finalize()
    monkeypatch.setattr(versions, "CAPTURES_STEPS", False)
    with pytest.raises(ValueError, match=r"^optimizer_cuda_graph=True: this Megatron captures no"):
        config.finalize()
    config.optimizer_cuda_graph = False
    config.finalize()


AWARE = {"use_distributed_optimizer": True, "use_precision_aware_optimizer": True}


@pytest.mark.parametrize("fields", [{}, AWARE])
def test_where_main_params_are_is_known_from_the_start_and_after_a_change(
    fields: dict[str, Any],
) -> None:
    """As Megatron derives it for Adam, with TransformerEngine."""
    config = AdamSOptimizerConfig(lr=1e-3, **fields)
    assert getattr(config, PRECISION) is bool(fields)
    config.use_distributed_optimizer = config.use_precision_aware_optimizer = True
    config.finalize()
    assert getattr(config, PRECISION) is True
    assert (config.use_precision_aware_optimizer, config.store_param_remainders) == (True, True)


def checked(config: Any) -> None:
    """Stands for OptimizerConfig.__post_init__."""
    config.seen = (config.optimizer, config.use_precision_aware_optimizer)


def plain(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(OptimizerConfig(lr=1e-3)), **fields})


def test_plain_configuration_of_adams_is_checked_as_one_without_precision() -> None:
    """Megatron's own check of it looks for TransformerEngine."""
    post_init = wrap_post_init(checked)
    config = plain(optimizer="adams", use_precision_aware_optimizer=True)
    post_init(config)
    assert config.seen == ("adams", False)
    assert config.use_precision_aware_optimizer is True
    assert getattr(config, PRECISION) is True


def test_plain_configuration_of_adams_is_refused_by_its_hyperparameters() -> None:
    with pytest.raises(ValueError, match=r"beta1=1\.0: must be"):
        wrap_post_init(checked)(plain(optimizer="adams", adam_beta1=1.0))


def test_configuration_of_another_optimizer_is_megatrons_to_check() -> None:
    config = plain(optimizer="adam", use_precision_aware_optimizer=True, adam_beta1=1.0)
    wrap_post_init(checked)(config)
    assert config.seen == ("adam", True)
    assert getattr(config, PRECISION) is False


def test_values_stated_to_megatron_are_taken_back_where_it_raises() -> None:
    config = AdamSOptimizerConfig(lr=1e-3, **AWARE)
    with built_as_adam(config):
        assert config.optimizer == "adam" and not config.use_precision_aware_optimizer
    with pytest.raises(RuntimeError, match="Megatron's"), built_as_adam(config):
        raise RuntimeError("Megatron's")
    assert config.optimizer == "adams" and config.use_precision_aware_optimizer
