"""AdamS's state in fewer bits: master weights, remainders, scaled exp_avg; their checkpoints."""

import copy
import itertools
import pickle

import pytest
import torch

from megatron_adams.optimizer import AdamS
from megatron_adams.precision import decode_scaled, encode_scaled, split_master
from megatron_adams.update import adams_update_

SIZES = (1000, 3, 0, 64)
HYPERPARAMETERS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

MASTERS = {
    "fp32": {"master_weights": True},
    "fp16": {"master_weights": True, "master_weight_dtype": torch.float16},
    "remainder": {"master_weights": True, "store_param_remainders": True},
}
EXP_AVG_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
# Bytes a bf16 param: the master weights and exp_avg.
BYTES = {
    **{("fp32", dtype): 4 + size for dtype, size in zip(EXP_AVG_DTYPES, (4, 2, 2, 1), strict=True)},
    **{("fp16", dtype): 2 + size for dtype, size in zip(EXP_AVG_DTYPES, (4, 2, 2, 1), strict=True)},
    **{
        ("remainder", dtype): 2 + size
        for dtype, size in zip(EXP_AVG_DTYPES, (4, 2, 2, 1), strict=True)
    },
}


def parameters(dtype: torch.dtype = torch.bfloat16) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]


def build(master: str, exp_avg_dtype: torch.dtype, dtype: torch.dtype, **options) -> AdamS:
    storage = {**MASTERS[master], "exp_avg_dtype": exp_avg_dtype}
    return AdamS(parameters(dtype), **HYPERPARAMETERS, **storage, **options)


def params_of(optimizer: AdamS) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(size, generator=generator) for size in SIZES]


def take_step(optimizer: AdamS, step: int) -> None:
    for param, grad in zip(params_of(optimizer), gradients(step), strict=True):
        param.grad = grad.to(param.dtype)
    optimizer.step()


def full_state(optimizer: AdamS) -> list[dict[str, torch.Tensor]]:
    return [
        {
            name: optimizer.get_unscaled_state(p, name).clone()
            for name in ("master_param", "exp_avg")
        }
        for p in params_of(optimizer)
    ]


def stored(state: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is left of full state once it was stored in a dtype."""
    if dtype == torch.uint8:
        dtype = torch.float8_e4m3fn
    if dtype in (torch.float16, torch.float8_e4m3fn):
        return decode_scaled(*encode_scaled(state, dtype))
    return state.to(dtype).float()


def assert_equal_states(mine: list[dict], theirs: list[dict]) -> None:
    for my_state, their_state in zip(mine, theirs, strict=True):
        for name in ("master_param", "exp_avg"):
            assert my_state[name].dtype == torch.float32
            assert torch.equal(my_state[name], their_state[name]), name


@pytest.mark.parametrize("kernel", ["host", "foreach"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("master", "exp_avg_dtype"), BYTES)
def test_stored_state_follows_the_oracle(master, exp_avg_dtype, dtype, kernel):
    optimizer = build(master, exp_avg_dtype, dtype, kernel=kernel)
    master_dtype = torch.float16 if master == "fp16" else torch.float32
    expected = [(stored(p.float(), master_dtype), torch.zeros(p.shape)) for p in parameters(dtype)]
    beta1, beta2 = HYPERPARAMETERS["betas"]
    for step in range(1, 6):
        take_step(optimizer, step)
        for index, (param, exp_avg) in enumerate(expected):
            grad = gradients(step)[index].to(dtype)
            adams_update_(
                param, grad, exp_avg, lr=3e-3, beta1=beta1, beta2=beta2, eps=1e-8,
                weight_decay=0.1, step=step,
            )  # fmt: skip
            # The param is rounded from the master as it is before that is stored.
            rounded = param.to(dtype)
            if master == "remainder" and dtype == torch.bfloat16:
                rounded = split_master(param)[0]
            assert torch.equal(params_of(optimizer)[index], rounded)
            expected[index] = stored(param, master_dtype), stored(exp_avg, exp_avg_dtype)
    assert_equal_states(
        full_state(optimizer), [{"master_param": p, "exp_avg": m} for p, m in expected]
    )


@pytest.mark.parametrize(("master", "exp_avg_dtype"), BYTES)
def test_bytes_per_param_are_those_of_the_dtypes(master, exp_avg_dtype):
    optimizer = build(master, exp_avg_dtype, torch.bfloat16)
    take_step(optimizer, 1)
    for param in params_of(optimizer):
        state = optimizer.state[param]
        assert set(state) == {"exp_avg", "master_param"}
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        assert num_bytes == param.numel() * BYTES[master, exp_avg_dtype]


def test_remainders_lose_nothing_of_fp32_master_weights():
    by_master = [build(name, torch.float32, torch.bfloat16) for name in ("remainder", "fp32")]
    for step in range(1, 201):
        for optimizer in by_master:
            take_step(optimizer, step)
    assert_equal_states(*map(full_state, by_master))
    remainders = by_master[0].state[params_of(by_master[0])[0]]["master_param"]
    assert remainders.dtype == torch.int16 and remainders.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_params_of_full_precision_are_their_own_master_weights(dtype):
    with_masters = AdamS(parameters(dtype), **HYPERPARAMETERS, **MASTERS["remainder"])
    without = AdamS(parameters(dtype), **HYPERPARAMETERS)
    for step in range(1, 4):
        take_step(with_masters, step)
        take_step(without, step)
    for mine, theirs in zip(params_of(with_masters), params_of(without), strict=True):
        assert torch.equal(mine, theirs)
        assert set(with_masters.state[mine]) == {"exp_avg"}
        assert torch.equal(with_masters.get_unscaled_state(mine, "master_param"), mine)


# Checkpoints

STORAGES = [("fp32", torch.float32), ("remainder", torch.bfloat16), ("fp16", torch.uint8)]


@pytest.mark.parametrize("source", STORAGES)
@pytest.mark.parametrize("target", STORAGES)
def test_checkpoint_loads_into_any_storage(source, target):
    saved = build(*source, torch.bfloat16)
    for step in range(1, 4):
        take_step(saved, step)
    state_dict = copy.deepcopy(saved.state_dict())
    for state in state_dict["state"].values():
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    loaded = build(*target, torch.bfloat16)
    loaded.load_state_dict(state_dict)
    master_dtype = torch.float16 if target[0] == "fp16" else torch.float32
    expected = [
        {
            "master_param": stored(state["master_param"], master_dtype),
            "exp_avg": stored(state["exp_avg"], target[1]),
        }
        for state in full_state(saved)
    ]
    assert_equal_states(full_state(loaded), expected)
    if source == target:
        # And goes on as if it had not been interrupted.
        for mine, theirs in zip(params_of(loaded), params_of(saved), strict=True):
            mine.data.copy_(theirs)
        for step in range(4, 7):
            take_step(saved, step)
            take_step(loaded, step)
        assert_equal_states(full_state(loaded), full_state(saved))
        for mine, theirs in zip(params_of(loaded), params_of(saved), strict=True):
            assert torch.equal(mine, theirs)


def test_master_weights_that_a_checkpoint_lacks_are_the_params():
    without = AdamS(parameters(), **HYPERPARAMETERS)
    take_step(without, 1)
    loaded = build("fp32", torch.float32, torch.bfloat16)
    for mine, theirs in zip(params_of(loaded), params_of(without), strict=True):
        mine.data.copy_(theirs)
    loaded.load_state_dict(copy.deepcopy(without.state_dict()))
    for param, other in zip(params_of(loaded), params_of(without), strict=True):
        assert torch.equal(loaded.get_unscaled_state(param, "master_param"), other.float())
        assert torch.equal(
            loaded.get_unscaled_state(param, "exp_avg"), without.state[other]["exp_avg"]
        )


def test_master_weights_without_a_place_are_refused():
    saved = build("remainder", torch.float32, torch.bfloat16)
    take_step(saved, 1)
    plain = AdamS(parameters(), **HYPERPARAMETERS)
    with pytest.raises(ValueError, match=r"master weights of parameter 0.*master_weights=True"):
        plain.load_state_dict(saved.state_dict())
    assert len(plain.state) == 0


def test_state_that_is_left_out_stays():
    optimizer = build("fp16", torch.float16, torch.bfloat16)
    take_step(optimizer, 1)
    before = full_state(optimizer)
    with optimizer.state_left_out():
        state_dict = optimizer.state_dict()
        assert state_dict["state"] == {}
        state_dict["param_groups"][0]["lr"] = 0.5
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert_equal_states(full_state(optimizer), before)
    assert len(optimizer._scales) == len(SIZES)
    assert optimizer.state_dict()["state"].keys() == set(range(len(SIZES)))


@pytest.mark.parametrize(("master", "exp_avg_dtype"), STORAGES)
def test_copies_and_pickles_go_on_alike(master, exp_avg_dtype):
    optimizer = build(master, exp_avg_dtype, torch.bfloat16)
    take_step(optimizer, 1)
    others = [copy.deepcopy(optimizer)]
    if exp_avg_dtype != torch.uint8:  # torch does not unpickle fp8 tensors where Megatron is
        others.append(pickle.loads(pickle.dumps(optimizer)))
    for step, each in itertools.product((2, 3), (optimizer, *others)):
        take_step(each, step)
    for other in others:
        assert_equal_states(full_state(other), full_state(optimizer))


def test_set_state_stays_where_the_next_step_expects_it():
    optimizer = build("remainder", torch.uint8, torch.bfloat16)
    take_step(optimizer, 1)
    other = build("remainder", torch.uint8, torch.bfloat16)
    for param, twin in zip(params_of(optimizer), params_of(other), strict=True):
        pointers = [tensor.data_ptr() for tensor in optimizer.state[param].values()]
        for name, value in (("master_param", 2 * param.float()), ("exp_avg", param.float())):
            optimizer.set_scaled_state(param, name, value)
            other.set_scaled_state(twin, name, value)
        assert pointers == [tensor.data_ptr() for tensor in optimizer.state[param].values()]
    other.param_groups[0]["step"] = 1
    take_step(optimizer, 2)
    take_step(other, 2)
    assert_equal_states(full_state(optimizer), full_state(other))


def test_state_of_another_shape_is_refused():
    optimizer = build("fp32", torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match=r"exp_avg has shape \(2,\).*must be the parameter's"):
        optimizer.set_scaled_state(params_of(optimizer)[0], "exp_avg", torch.zeros(2))


# Arguments


def test_decoupled_gradients_are_read_in_their_own_dtype():
    decoupled = build("fp32", torch.float32, torch.bfloat16, use_decoupled_grad=True)
    reference = AdamS(parameters(torch.float32), **HYPERPARAMETERS)
    for step in range(1, 4):
        for param, twin, grad in zip(
            params_of(decoupled), params_of(reference), gradients(step), strict=True
        ):
            if step == 1:
                twin.data.copy_(param)
            param.decoupled_grad = twin.grad = grad
        decoupled.step()
        reference.step()
    assert_equal_states(full_state(decoupled), full_state(reference))


def test_params_without_a_decoupled_gradient_are_left_alone():
    optimizer = build("fp32", torch.float32, torch.bfloat16, use_decoupled_grad=True)
    before = [param.detach().clone() for param in params_of(optimizer)]
    take_step(optimizer, 1)  # puts gradients into .grad
    assert all(torch.equal(a, b) for a, b in zip(params_of(optimizer), before, strict=True))


def test_storage_may_be_set_before_there_is_state():
    """As Megatron-FSDP sets it after construction."""
    optimizer = build("fp32", torch.float32, torch.bfloat16)
    optimizer.master_weights, optimizer.use_decoupled_grad = False, True
    for param, grad in zip(params_of(optimizer), gradients(1), strict=True):
        param.decoupled_grad = grad
    optimizer.step()
    assert {name for state in optimizer.state.values() for name in state} == {"exp_avg"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exp_avg_dtype": torch.float64}, r"exp_avg_dtype=torch.float64: must be one of"),
        (
            {"master_weights": True, "master_weight_dtype": torch.bfloat16},
            r"master_weight_dtype=torch.bfloat16: must be torch.float32 or torch.float16",
        ),
        ({"store_param_remainders": True}, r"without master weights: .*master_weights=True"),
        ({"master_weight_dtype": torch.float16}, r"without master weights: .*master_weights=True"),
        (
            {**MASTERS["fp16"], "store_param_remainders": True},
            r"store_param_remainders=True with master_weight_dtype=torch.float16: must be",
        ),
    ],
)
def test_storage_that_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AdamS(parameters(), **options)


@pytest.mark.parametrize("name", ["master_weights", "exp_avg_dtype", "use_decoupled_grad"])
def test_storage_of_one_group_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} in a param group: is one for all groups"):
        AdamS([{"params": parameters(), name: True}])
