"""`update` against the paper: a float64 NumPy loop, golden steps, the bound, shard equality."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adams.update import adams_update_, exp_avg_dtype, update_bound

ROOT = Path(__file__).resolve().parents[2]
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMS = [(correction, decoupled) for correction in (False, True) for decoupled in (True, False)]
NUMERATORS = [
    {"nesterov": nesterov, "cautious": cautious}
    for nesterov in (False, True)
    for cautious in (False, True)
]


def paper_step(
    p, m, g, t, *, lr, beta1, beta2, eps, weight_decay, correct, decoupled, nesterov=False,
    cautious=False,
):  # fmt: skip
    """One step of arXiv:2505.16363, Algorithm 1, in NumPy float64; returns the new (p, m).

    nesterov and cautious change its numerator (Dozat 2016; arXiv:2411.16085).
    """
    if not decoupled:
        g = g + weight_decay * p
    c = 1 - beta1**t if correct else 1.0
    v = beta2 * (m / c) ** 2 + (1 - beta2) * g**2
    m = beta1 * m + (1 - beta1) * g
    numerator = beta1 * m + (1 - beta1) * g if nesterov else m
    if cautious:
        numerator = numerator * (np.sign(numerator) == np.sign(g))
    direction = (numerator / c) / (np.sqrt(v) + eps)
    if decoupled:
        direction = direction + weight_decay * p
    return p - lr * direction, m


def run(
    param, grads, *, start=1, lr=1e-3, beta1=BETA1, beta2=BETA2, eps=EPS, exp_avg=None, **options
):
    """Update a copy of `param` with each of `grads`; return it and its exp_avg."""
    param = param.clone()
    if exp_avg is None:
        exp_avg = torch.zeros_like(param, dtype=exp_avg_dtype(param))
    options.setdefault("weight_decay", 0.0)
    for step, grad in enumerate(grads, start):
        adams_update_(
            param, grad, exp_avg, lr=lr, beta1=beta1, beta2=beta2, eps=eps, step=step, **options
        )
    return param, exp_avg


@pytest.mark.parametrize(("correct", "decoupled"), FORMS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_many_steps_match_numpy_float64(correct, decoupled, dtype, rtol):
    rng = np.random.default_rng(0)
    lr, weight_decay, steps = 3e-3, 0.1, 200
    p = rng.normal(size=(7, 11)).astype(np.float32).astype(np.float64)
    # Magnitudes from 1e-9 to 10: eps dominates some coordinates and vanishes beside others.
    scales = 10.0 ** rng.uniform(-9, 1, size=p.shape)
    grads = [(rng.normal(size=p.shape) * scales).astype(np.float32) for _ in range(steps)]
    start, m = p, np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        p, m = paper_step(
            p, m, g.astype(np.float64), t, lr=lr, beta1=BETA1, beta2=BETA2, eps=EPS,
            weight_decay=weight_decay, correct=correct, decoupled=decoupled,
        )  # fmt: skip

    param, exp_avg = run(
        torch.tensor(start, dtype=dtype),
        [torch.tensor(g, dtype=dtype) for g in grads],
        lr=lr,
        weight_decay=weight_decay,
        bias_correction=correct,
        decoupled_weight_decay=decoupled,
    )
    # fp32 rounds param once a step, by 2^-24; the update's own error is lr times its own.
    # In L2 where param oscillates around 0, its rounding is normalized into parts of a whole step.
    atol = lr * (rtol if decoupled else 100 * rtol)
    np.testing.assert_allclose(param.double().numpy(), p, rtol=rtol, atol=atol)
    # exp_avg remembers some 10 steps, each rounded relative to what was added to it.
    added = scales if decoupled else scales + weight_decay * np.abs(start)
    np.testing.assert_array_less(np.abs(exp_avg.double().numpy() - m), rtol * added)


@pytest.mark.parametrize(("correct", "decoupled"), FORMS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_documented_order_of_operations_gives_these_bits(correct, decoupled, weight_decay):
    """A kernel is written from that docstring: NumPy float32 in its order, bit for bit."""
    f = np.float32
    rng = np.random.default_rng(1)
    p, m = rng.normal(size=1003).astype(f), (rng.normal(size=1003) * 1e-2).astype(f)
    g, step, lr = (rng.normal(size=1003) * 1e-2).astype(f), 3, 1e-3
    param, exp_avg = run(
        torch.tensor(p), [torch.tensor(g)], start=step, lr=lr, exp_avg=torch.tensor(m),
        weight_decay=weight_decay, bias_correction=correct, decoupled_weight_decay=decoupled,
    )  # fmt: skip

    c = f(1 / (1 - BETA1**step)) if correct else f(1)
    if weight_decay and not decoupled:
        g = g + f(weight_decay) * p
    a = c * m
    v = f(BETA2) * (a * a) + f(1 - BETA2) * (g * g)
    m = f(BETA1) * m + f(1 - BETA1) * g
    u = (c * m) / (np.sqrt(v) + f(EPS))
    if weight_decay and decoupled:
        u = u + f(weight_decay) * p
    p = p - f(lr) * u
    assert p.dtype == f
    np.testing.assert_array_equal(param.numpy(), p)
    np.testing.assert_array_equal(exp_avg.numpy(), m)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("numerator", NUMERATORS, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_step_of_every_numerator_matches_numpy_float64(numerator, decoupled, dtype, rtol):
    rng = np.random.default_rng(2)
    p, m, g = rng.normal(size=(3, 5003)).astype(np.float32).astype(np.float64)
    g[:100], m[50:150] = 0, 0
    scalars = {"lr": 3e-3, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": 0.1}
    want_p, want_m = paper_step(
        p, m, g, 1, correct=False, decoupled=decoupled, **numerator, **scalars
    )
    param, exp_avg = run(
        torch.tensor(p, dtype=dtype),
        [torch.tensor(g, dtype=dtype)],
        exp_avg=torch.tensor(m, dtype=dtype),
        decoupled_weight_decay=decoupled,
        **numerator,
        **scalars,
    )
    np.testing.assert_allclose(exp_avg.double().numpy(), want_m, rtol=0, atol=4 * rtol)
    # Where rounding decides the sign of a numerator near 0, its update is near 0, too.
    np.testing.assert_allclose(param.double().numpy(), want_p, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decoupled", [True, False])
def test_cautious_elements_move_as_without_it_or_by_weight_decay_alone(nesterov, decoupled):
    param, grad, exp_avg = torch.randn(3, 4001, generator=torch.Generator().manual_seed(3))
    grad[:100], exp_avg[50:150] = 0, 0

    def moved(**options):
        return run(
            param, [grad], exp_avg=exp_avg.clone(), nesterov=nesterov,
            decoupled_weight_decay=decoupled, **options,
        )  # fmt: skip

    (free, momentum), (kept, same_momentum) = moved(), moved(cautious=True)
    against = (free - param).sign() != -grad.sign()
    assert 0.1 < against.float().mean() < 0.9
    assert torch.equal(kept[~against], free[~against])
    assert torch.equal(kept[against], param[against])
    assert torch.equal(momentum, same_momentum)
    # Decoupled decay moves all of them; L2's is part of the gradient.
    decayed, _ = moved(cautious=True, weight_decay=0.1)
    if decoupled:
        want = param[against] - torch.tensor(1e-3) * (param[against] * 0.1)
        assert torch.equal(decayed[against], want)


def test_cautious_hides_no_nan():
    param, exp_avg = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    param, _ = run(param, [torch.tensor([1.0, 1.0, float("nan")])], exp_avg=exp_avg, cautious=True)
    assert param.isnan().tolist() == [False, True, True]


def test_nesterov_with_bias_correction_is_refused():
    with pytest.raises(ValueError, match="nesterov=True with bias_correction=True: must be one"):
        run(torch.ones(1), [torch.ones(1)], nesterov=True, bias_correction=True)
    with pytest.raises(ValueError, match="nesterov=True"):
        update_bound(beta1=BETA1, beta2=BETA2, nesterov=True, bias_correction=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_split_gives_the_bits_of_the_whole(dtype, data):
    numel = data.draw(st.integers(1, 300))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, numel - 1)), max_size=6)) | {0, numel})
    offset = data.draw(st.integers(0, 9))  # elements: shards start at any alignment in memory
    correct, decoupled = data.draw(st.sampled_from(FORMS))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    store = torch.randn(4, numel + offset, generator=generator, dtype=torch.float64).to(dtype)
    grads = [store[i, offset:] for i in range(1, 4)]
    options = {"weight_decay": 0.1, "bias_correction": correct, "decoupled_weight_decay": decoupled}

    whole, whole_exp_avg = run(store[0, :numel].clone(), [g.clone() for g in grads], **options)
    parts, parts_exp_avg = store[0, :numel].clone(), torch.zeros_like(whole_exp_avg)
    for begin, end in pairwise(cuts):
        for step, grad in enumerate(grads, 1):
            adams_update_(
                parts[begin:end], grad[begin:end], parts_exp_avg[begin:end], lr=1e-3, beta1=BETA1,
                beta2=BETA2, eps=EPS, step=step, **options,
            )  # fmt: skip
    assert torch.equal(parts, whole)
    assert torch.equal(parts_exp_avg, whole_exp_avg)


@pytest.mark.parametrize(
    ("correct", "first_step"), [(False, 0.1 / 0.05**0.5), (True, 1 / 0.05**0.5)]
)
def test_first_step_is_0447_lr_or_447_lr(correct, first_step):
    grads = [torch.tensor([1e-3, -5.0, 2e4], dtype=torch.float64)]
    param, _ = run(torch.zeros(3, dtype=torch.float64), grads, lr=0.01, bias_correction=correct)
    signs = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    # eps = 1e-8 against sqrt(v) = 2e-4: 4.5e-5 of the step
    torch.testing.assert_close(param, 0.01 * first_step * signs, rtol=1e-4, atol=0)
    assert first_step == pytest.approx(4.472 if correct else 0.4472, rel=1e-4)


def test_both_forms_agree_after_50_steps():
    generator = torch.Generator().manual_seed(0)
    grads = list(torch.randn(60, 1000, generator=generator, dtype=torch.float64))
    start = torch.zeros(1000, dtype=torch.float64)

    def move(correct, steps):
        before, _ = run(start, grads[: steps - 1], bias_correction=correct)
        after, _ = run(start, grads[:steps], bias_correction=correct)
        return after - before

    for steps, agree in [(1, False), (5, False), (51, True), (60, True)]:
        difference = (move(True, steps) - move(False, steps)).norm() / move(False, steps).norm()
        assert (difference < 0.01) == agree, (steps, difference)


GRADS = st.floats(-(2.0**50), 2.0**50, width=32) | st.sampled_from(
    [0.0, 1e-20, -1e-20, 1e-38, 1e15, -1e15]
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    grads=st.lists(GRADS, min_size=1, max_size=30),
    betas=st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.0, 0.5), (0.99, 0.9), (0.5, 1e-3)]),
    eps=st.sampled_from([1e-8, 2.0**-63]),
    form=st.sampled_from([{}, {"bias_correction": True}, *NUMERATORS[1:]]),
)
def test_no_gradients_move_a_param_beyond_the_bound(grads, betas, eps, form):
    beta1, beta2 = betas
    form_of_bound = {name: value for name, value in form.items() if name != "cautious"}
    param, exp_avg = torch.zeros(1), torch.zeros(1)
    for step, grad in enumerate(grads, 1):
        param.zero_()
        adams_update_(
            param, torch.tensor([grad]), exp_avg, lr=1.0, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=0.0, step=step, **form,
        )  # fmt: skip
        bound = update_bound(beta1=beta1, beta2=beta2, step=step, **form_of_bound)
        # 1e-5: a dozen fp32 roundings. At the smallest eps, underflow costs up to sqrt(2).
        slack = 1 + 1e-5 if eps == 1e-8 else 2**0.5
        assert abs(param.item()) <= bound * slack, (step, grads)


@pytest.mark.parametrize(("beta2", "bound"), [(0.95, 1.026), (0.999, 3.29)])
def test_the_bound_is_reached(beta2, bound):
    """By the gradient that makes m_t and sqrt(v_t) collinear (equality in Cauchy-Schwarz)."""
    exp_avg = torch.ones(1, dtype=torch.float64)
    grad = exp_avg * ((1 - BETA1) / (1 - beta2)) / (BETA1 / beta2)
    param, _ = run(torch.zeros(1).double(), [grad], lr=1.0, beta2=beta2, exp_avg=exp_avg)
    assert -param.item() == pytest.approx(update_bound(beta1=BETA1, beta2=beta2), rel=1e-6)
    assert -param.item() == pytest.approx(bound, rel=1e-3)


def test_the_bound_of_nesterov_is_reached():
    exp_avg = torch.ones(1, dtype=torch.float64)
    grad = exp_avg * ((1 - BETA1**2) / (1 - BETA2)) / (BETA1**2 / BETA2)
    param, _ = run(torch.zeros(1).double(), [grad], lr=1.0, exp_avg=exp_avg, nesterov=True)
    assert -param.item() == pytest.approx(
        update_bound(beta1=BETA1, beta2=BETA2, nesterov=True), rel=1e-6
    )
    assert -param.item() == pytest.approx(1.189, rel=1e-3)


def test_weight_decay_of_1e_8_a_step_is_not_lost_in_fp32():
    """1e-8 is below fp32's rounding of 1; added to the update it survives on average."""
    generator = torch.Generator().manual_seed(0)
    param = torch.rand(200_000, generator=generator) / 2 + 0.5
    grad, exp_avg = torch.randn(2, 200_000, generator=generator)
    with_decay, _ = run(param, [grad], lr=1e-4, weight_decay=1e-4, exp_avg=exp_avg.clone())
    without, _ = run(param, [grad], lr=1e-4, weight_decay=0.0, exp_avg=exp_avg.clone())
    lost_weight = (without.double() - with_decay.double()).mean()
    # Each coordinate gives 0 or one ulp: the mean of 200,000 has a standard error of 1%.
    assert lost_weight.item() == pytest.approx(1e-8 * param.double().mean().item(), rel=0.05)


def test_weight_decay_without_gradient_shrinks_param():
    param, _ = run(torch.full((3,), 2.0), [torch.zeros(3)] * 10, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(param, torch.full((3,), 2.0 * 0.95**10))


def test_coordinate_without_gradient_keeps_moving_by_092_lr_until_eps():
    exp_avg = torch.ones(1)
    param, zero, lr = torch.zeros(1), torch.zeros(1), 1e-3
    moves = []
    for step in range(1, 301):
        before = param.clone()
        adams_update_(
            param,
            zero,
            exp_avg,
            lr=lr,
            beta1=BETA1,
            beta2=BETA2,
            eps=EPS,
            weight_decay=0.0,
            step=step,
        )
        moves.append((before - param).item() / lr)
    np.testing.assert_allclose(moves[:100], BETA1 / BETA2**0.5, rtol=1e-3)
    # 0.9^175 = 1e-8 = eps: from there on it dies out.
    assert moves[174] < 0.6
    assert moves[299] < 1e-4


@pytest.mark.parametrize("gradient", ["1e-2", "1e-4", "1e-6"])
def test_the_documented_way_of_an_element_after_a_single_gradient(gradient):
    first, zero = torch.tensor([float(gradient)], dtype=torch.float64), torch.zeros(1).double()
    grads = [first] + [zero] * 400
    found = [-run(zero, grads, lr=1.0, cautious=cautious)[0].item() for cautious in (False, True)]
    param = torch.nn.Parameter(zero.clone())
    adamw = torch.optim.AdamW([param], lr=1.0, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0)
    for param.grad in grads:
        adamw.step()
    found.append(-param.item())
    row = f"| {gradient} | " + " | ".join(f"{way:.1f} lr" for way in found) + " |"
    assert row in (ROOT / "docs" / "hyperparameters.md").read_text().splitlines()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_grad_is_not_written_and_low_precision_params_are_rounded_once(dtype, grad_dtype):
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(100, generator=generator).to(dtype)
    grad = torch.randn(100, generator=generator).to(grad_dtype)
    kept = grad.clone()
    for decoupled in (True, False):
        options = {"weight_decay": 0.1, "decoupled_weight_decay": decoupled}
        after, exp_avg = run(param, [grad], lr=0.1, **options)
        wide, wide_exp_avg = run(
            param.to(exp_avg.dtype), [grad.to(exp_avg.dtype)], lr=0.1, **options
        )
        assert after.dtype == dtype
        assert torch.equal(after, wide.to(dtype))
        assert torch.equal(exp_avg, wide_exp_avg)
        assert torch.equal(grad, kept)


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (5,)])
def test_lr_tensor_gives_the_bits_of_the_float(lr_dtype, shape):
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(shape, generator=generator)
    grads = [torch.randn(shape, generator=generator) for _ in range(20)]
    expected, _ = run(param, grads, lr=0.1)
    for lr_shape in [(), (1,)]:
        actual, _ = run(param, grads, lr=torch.full(lr_shape, 0.1, dtype=lr_dtype))
        assert torch.equal(actual, expected)


def test_non_contiguous_and_empty_tensors():
    generator = torch.Generator().manual_seed(0)
    param, grad = torch.randn(2, 6, 5, generator=generator)
    expected, _ = run(param, [grad])
    transposed, exp_avg = param.t().contiguous().t(), torch.zeros(6, 5)
    adams_update_(
        transposed,
        grad,
        exp_avg,
        lr=1e-3,
        beta1=BETA1,
        beta2=BETA2,
        eps=EPS,
        weight_decay=0.0,
        step=1,
    )
    assert torch.equal(transposed, expected)
    assert run(torch.zeros(0), [torch.zeros(0)])[0].shape == (0,)


@pytest.mark.parametrize(
    ("param", "grad", "exp_avg", "words"),
    [
        (
            torch.zeros(4, 3),
            torch.zeros(3),
            torch.zeros(4, 3),
            r"grad \(3,\).*shapes must be equal",
        ),
        (torch.zeros(3), torch.zeros(3), torch.zeros(1), r"exp_avg \(1,\): shapes must be equal"),
        (torch.zeros(3).bfloat16(), torch.zeros(3), torch.zeros(3).bfloat16(), "torch.float32"),
        (torch.zeros(3).double(), torch.zeros(3), torch.zeros(3), "must be torch.float64"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(param, grad, exp_avg, words):
    with pytest.raises(ValueError, match=words):
        run(param, [grad], exp_avg=exp_avg)
