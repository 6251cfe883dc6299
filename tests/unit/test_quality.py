"""examples/quality: the changed optimizers, the split of the text, the order of the runs, rows."""

import json
import math
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_adams import AdamS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "quality"
sys.path.insert(0, str(EXAMPLE))

import gpt  # noqa: E402  (the example's files import each other by name)
import gpu_study  # noqa: E402
import lab as lab_module  # noqa: E402
import plot  # noqa: E402
import prepare  # noqa: E402
import results  # noqa: E402
import schedule  # noqa: E402
import variants  # noqa: E402
from lab import Lab, Preset  # noqa: E402
from schedule import ADAMS, ADAMW, CANDIDATES, CHANGED_ADAMW, Run  # noqa: E402

TINY = Preset(
    "rehearsal", 2, 16, 2, 16, batch=4, min_steps=4, max_steps=40, max_eval_batches=2
)  # fmt: skip
BETAS, LR, EPS, DECAY = (0.9, 0.95), 0.01, 1e-8, 0.1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens with a pattern, of a vocabulary of 64, as prepare.py writes them."""
    folder = tmp_path_factory.mktemp("tokens")
    generator = np.random.default_rng(0)
    for name, length in (("train.bin", 20_000), ("heldout.bin", 2_000)):
        steps = generator.integers(1, 3, length)
        (np.cumsum(steps) % 64).astype(np.uint16).tofile(folder / name)
    (folder / "meta.json").write_text(
        json.dumps({"vocab_size": 64, "held_out_bytes_per_token": 4.0})
    )
    return folder


@pytest.fixture
def lab(data: Path) -> Lab:
    return Lab(TINY, data, torch.device("cpu"))


def oracle(
    param: np.ndarray,
    grads: list[np.ndarray],
    *,
    family: str,
    cautious: bool,
    nesterov: bool,
    beta2: float = BETAS[1],
) -> np.ndarray:
    """The steps element by element in float64, from the formulas as the papers write them."""
    beta1 = BETAS[0]
    result = param.copy()
    for index in np.ndindex(param.shape):
        p, m, s = param[index], 0.0, 0.0
        for t, each in enumerate(grads, start=1):
            g = each[index]
            old_m = m
            m = beta1 * m + (1 - beta1) * g
            s = beta2 * s + (1 - beta2) * g * g
            numerator = beta1 * m + (1 - beta1) * g if nesterov else m
            if family == "adamw":
                # The weights of all gradients so far, summed as they stand in the numerator.
                weights = [(1 - beta1) * beta1 ** (t - i) for i in range(1, t + 1)]
                if nesterov:
                    weights = [beta1 * weight for weight in weights]
                    weights[-1] += 1 - beta1
                numerator /= sum(weights)
                v = s / (1 - beta2**t)
            else:
                v = beta2 * old_m * old_m + (1 - beta2) * g * g
            u = numerator / (math.sqrt(v) + EPS)
            if cautious and u * g <= 0:
                u = 0.0
            p = p - LR * (u + DECAY * p)
        result[index] = p
    return result


@pytest.mark.parametrize("family", ["adams", "adamw"])
@pytest.mark.parametrize(
    ("cautious", "nesterov"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_changed_updates_follow_their_formulas(family: str, cautious: bool, nesterov: bool) -> None:
    generator = np.random.default_rng(1)
    param = generator.normal(size=(5, 7))
    grads = [generator.normal(size=(5, 7)) for _ in range(6)]
    grads[3][0] = 0.0  # no gradient: the mask holds the element, whatever its momentum
    tensor = torch.from_numpy(param.copy()).requires_grad_()
    group = {"params": [tensor], "weight_decay": DECAY, "cautious": cautious, "nesterov": nesterov}
    optimizer_class = AdamS if family == "adams" else variants.ChangedAdamW
    optimizer = optimizer_class([group], lr=LR, betas=BETAS, eps=EPS)
    for grad in grads:
        tensor.grad = torch.from_numpy(grad.copy())
        optimizer.step()
    expected = oracle(param, grads, family=family, cautious=cautious, nesterov=nesterov)
    # p * (1 - lr * decay) and p - lr * decay * p differ in float64's last digits.
    np.testing.assert_allclose(tensor.detach().numpy(), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("family", ["adams", "adamw"])
def test_a_matched_update_has_the_given_rms(family: str) -> None:
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(40, generator=generator, dtype=torch.float64)
    still = torch.ones(3, dtype=torch.float64)
    params = [start.clone().requires_grad_(), still.clone().requires_grad_()]
    variant = schedule.Variant("matched", family, (1e-3, 2e-3), match_update_rms=0.2)
    optimizer = variants.build(variant, {"norms": params}, LR)  # norms do not decay
    params[0].grad = torch.randn(40, generator=generator, dtype=torch.float64)
    params[1].grad = torch.zeros(3, dtype=torch.float64)
    optimizer.step()
    update = (start - params[0].detach()) / LR
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-6)
    assert torch.equal(update > 0, params[0].grad > 0)
    assert torch.equal(params[1].detach(), still)


def test_without_a_change_adamw_is_torchs() -> None:
    generator = torch.Generator().manual_seed(3)
    ours = torch.randn(300, generator=generator, dtype=torch.float64)
    theirs = ours.clone().requires_grad_()
    avg, square = torch.zeros_like(ours), torch.zeros_like(ours)
    optimizer = torch.optim.AdamW([theirs], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for step in range(1, 6):
        theirs.grad = torch.randn(300, generator=generator, dtype=torch.float64)
        variants.changed_update_(
            [ours], [theirs.grad], [avg], [square], lr=LR, beta1=0.9, beta2=0.95, eps=EPS,
            weight_decay=DECAY, step=step, cautious=False, nesterov=False,
        )  # fmt: skip
        optimizer.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("variant", schedule.VARIANTS.values(), ids=lambda variant: variant.name)
def test_every_variant_is_built_as_its_name_says(variant: schedule.Variant) -> None:
    params = {kind: [torch.ones(3, requires_grad=True)] for kind in gpt.KINDS}
    optimizer = variants.build(variant, params, 0.5)
    by_kind = dict(zip(gpt.KINDS, optimizer.param_groups, strict=True))
    assert by_kind["norms"]["weight_decay"] == 0.0
    assert by_kind["matrices"]["weight_decay"] == by_kind["head"]["weight_decay"] == 0.1
    for group in optimizer.param_groups:
        assert group["lr"] == 0.5 and tuple(group["betas"]) == (0.9, variant.beta2)
        is_masked = variant.cautious and group is by_kind["matrices"]
        assert group["cautious"] == is_masked and group["nesterov"] == variant.nesterov
    for [param] in params.values():
        param.grad = torch.full((3,), 0.1)
    optimizer.step()
    state = optimizer.state[params["matrices"][0]]
    assert ("exp_avg_sq" in state) == (variant.family == "adamw")
    is_product = variant.family == "adams"
    assert isinstance(optimizer, AdamS) == is_product
    is_changed = variant.cautious or variant.nesterov
    assert isinstance(optimizer, variants.ChangedAdamW) == (is_changed and not is_product)


def test_the_shadow_is_adamws_update_on_the_same_gradients() -> None:
    generator = torch.Generator().manual_seed(4)
    param = torch.randn(50, generator=generator, requires_grad=True)
    twin = param.detach().clone().requires_grad_()
    optimizer = variants.build(ADAMS, {"matrices": [param]}, 1e-3)
    adamw = torch.optim.AdamW([twin], lr=1.0, betas=BETAS, eps=EPS, weight_decay=0.0)
    shadow = variants.Shadow([param], 0.9, 0.95)
    for _ in range(4):
        param.grad = torch.randn(50, generator=generator)
        twin.grad = param.grad
        shadow.count()
        optimizer.step()
        before = twin.detach().clone()
        adamw.step()
    [update] = shadow.updates(optimizer)
    torch.testing.assert_close(update, before - twin.detach(), rtol=1e-5, atol=1e-6)


def write_sources(folder: Path) -> None:
    """400 different files, a copy, a reformatted copy, and one in a folder that is skipped."""
    for number in range(400):
        lines = (f"value_{number}_{line} = compute_{number}({line})\n" for line in range(40))
        path = folder / f"package{number % 7}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
    text = (folder / "package0" / "module0.py").read_text()
    (folder / "copy.py").write_text(text)
    (folder / "reformatted.py").write_text(text.replace(" = ", "="))
    (folder / "encodings").mkdir()
    (folder / "encodings" / "cp1.py").write_text("skipped = 'by its folder'\n" * 100)


def test_the_split_leaks_no_file(tmp_path: Path) -> None:
    write_sources(tmp_path)
    sources = prepare.read_sources([tmp_path])
    assert len(sources) == 400  # neither copies nor the skipped one
    split = prepare.split_sources(sources, max_bytes=10**9)
    assert len(split.held_out) >= 5 and len(split.train) + len(split.held_out) == 400
    train = {source.text for source in split.train}
    assert not [source for source in split.held_out if source.text in train]
    again = prepare.split_sources(sources[::-1], max_bytes=10**9)
    assert again == split  # the order in which files are found decides nothing


def test_an_edited_copy_is_not_held_out(tmp_path: Path) -> None:
    write_sources(tmp_path)
    sources = prepare.read_sources([tmp_path])
    split = prepare.split_sources(sources, max_bytes=10**9)
    text = split.train[0].text
    edited = []
    for number in range(10_000):
        source = prepare.Source("edited.py", text + f"edited_copy_of_the_file = {number}\n")
        if int(source.digest[-8:], 16) < prepare.HELD_OUT_SHARE * 2**32:
            edited.append(source)
            break
    assert len(edited) == 1  # one whose digest says held-out
    assert prepare.split_sources([*sources, *edited], max_bytes=10**9) == split


def test_prepared_tokens_are_the_text(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    write_sources(tmp_path / "text")
    meta = prepare.prepare([tmp_path / "text"], tmp_path / "out", 200_000)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert sum(sizes.values()) <= 200_000
    assert sizes["train.bin"] == 2 * meta["train_tokens"]
    assert sizes["heldout.bin"] == 2 * meta["held_out_tokens"]
    held_out = np.fromfile(tmp_path / "out" / "heldout.bin", dtype=np.uint16)
    assert (held_out == 0).sum() == meta["held_out_files"]
    split = prepare.split_sources(prepare.read_sources([tmp_path / "text"]), 10**9)
    used = split.held_out[: meta["held_out_files"]]
    num_bytes = sum(len(source.text.encode()) + 1 for source in used)
    assert meta["held_out_bytes_per_token"] == round(num_bytes / len(held_out), 4)


def test_named_packages_are_unpacked(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "some_name-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some_name/code.py", "code = 1\n")
        archive.writestr("some_name/data.json", "{}")
    prepare.unpack(wheels.glob("*.whl"), tmp_path / "out")
    files = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")]
    assert files == [Path("some_name/some_name/code.py")]


@pytest.mark.parametrize(
    ("text", "words"),
    [("sympy\n", "'sympy': must be NAME==VERSION"), ("# none\n", "must name a package")],
)
def test_packages_have_versions(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "packages.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        prepare.read_names(tmp_path / "packages.txt")
    with pytest.raises(ValueError, match="must be a file"):
        prepare.read_names(tmp_path / "another.txt")


def test_the_packages_of_the_plan_are_named() -> None:
    assert len(prepare.read_names(EXAMPLE / "packages.txt")) == 17


def pretend(losses: schedule.Losses, num_runs: int, loss_of) -> list[Run]:
    """Have `num_runs` more runs done, with a loss by formula."""
    order = []
    for _ in range(num_runs):
        run = schedule.next_run(losses)
        if run is None:
            break
        losses[run] = loss_of(run)
        order.append(run)
    return order


def bowl(run: Run) -> float:
    """AdamW is best at 8e-3, the others at 1e-3; Nesterov leads; B is as A."""
    best = 8e-3 if run.variant == "AdamW" else 1e-3
    offset = -0.02 if run.variant == "AdamS Nesterov" else 0.0
    return 3 + offset + 0.1 * abs(math.log2(run.lr / best)) + 0.01 * run.seed


def test_rates_are_searched_until_the_best_has_neighbors() -> None:
    losses: schedule.Losses = {}
    order = pretend(losses, 1000, bowl)
    assert len(set(order)) == len(order)
    assert [run.variant for run in order[:5]] == [
        "AdamW", "AdamS", "AdamS cautious", "AdamS Nesterov", "AdamS beta2 0.99",
    ]  # fmt: skip
    assert sorted(schedule.rates_of(losses, ADAMW)) == [2e-3, 4e-3, 8e-3, 16e-3]
    assert sorted(schedule.rates_of(losses, ADAMS)) == [5e-4, 1e-3, 2e-3]
    assert schedule.best_rate(losses, ADAMW) == 8e-3
    assert not schedule.is_at_edge(losses, ADAMW)
    leader = schedule.leader(losses)
    assert leader is CANDIDATES[1]
    # AdamW, the leader and AdamS with the seeds that decide, before anything that does not.
    deciding = [run for run in order if run.axis == "B" or run.seed == 1][:6]
    assert [(run.axis, run.variant, run.seed) for run in deciding] == [
        (axis, name, seed)
        for axis, seed in (("A", 1), ("B", 0))
        for name in ("AdamW", "AdamS Nesterov", "AdamS")
    ]
    assert max(map(order.index, deciding)) < 20
    first_change = next(i for i, run in enumerate(order) if run.variant == "AdamW Nesterov")
    assert max(map(order.index, deciding)) < first_change


def test_a_falling_loss_is_marked_as_an_edge() -> None:
    losses: schedule.Losses = {}
    pretend(losses, 12, lambda run: 3 - run.lr)
    assert len(schedule.rates_of(losses, ADAMW)) == schedule.MAX_RATES
    assert schedule.is_at_edge(losses, ADAMW)


def test_a_diverged_rate_is_no_best_rate() -> None:
    losses: schedule.Losses = {}
    pretend(losses, 1000, lambda run: math.inf if run.lr > 3e-3 else 3 - run.lr)
    assert schedule.best_rate(losses, ADAMW) == 2e-3
    assert not schedule.is_at_edge(losses, ADAMW)  # 4e-3 was tried, and is worse


@pytest.mark.parametrize(
    ("in_a", "in_b", "verdict"),
    [
        (0.009, 0.009, "is recommended"),
        (0.011, 0.0, "is not recommended"),
        (0.0, 0.011, "is not recommended"),
    ],
)
def test_the_rule_needs_both_axes(in_a: float, in_b: float, verdict: str) -> None:
    def loss_of(run: Run) -> float:
        if run.variant == "AdamW":
            return 3.0 + 0.1 * run.seed
        if run.axis == "A" and run.seed == 0:
            return 2.0  # what chose the leader does not decide
        return 3.0 + 0.1 * run.seed + (in_a if run.axis == "A" else in_b)

    losses: schedule.Losses = {}
    pretend(losses, 1000, loss_of)
    assert verdict in schedule.decide(losses)
    in_a_alone = {run: loss for run, loss in losses.items() if run.axis == "A"}
    assert schedule.decide(in_a_alone).startswith("Not decided")
    assert f"A {in_a:+.4f}" in schedule.decide(in_a_alone)
    assert schedule.decide({}).startswith("Not decided")


def test_steps_fill_the_time() -> None:
    def total(steps: int, num_runs: int) -> float:
        return num_runs * (0.05 * steps + gpu_study.OVERHEAD_PER_RUN_S)

    for seconds in (100, 150, 250):
        steps = gpu_study.steps_for(seconds, 0.05, 100, 300)
        num_runs = int(seconds // total(steps, 1))
        assert 100 <= steps <= 300 and num_runs <= gpu_study.TARGET_RUNS
        assert 0.9 * seconds < total(steps, num_runs) <= seconds
    assert gpu_study.steps_for(3, 0.05, 100, 300) == 100  # too short for one run: the least
    assert gpu_study.steps_for(10_000, 0.05, 100, 300) == 300


def test_a_row_has_the_columns(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "quality.csv"
    for variant in ("AdamW", "AdamS"):
        row, _ = lab.train(Run("A", variant, 1e-3, 0), steps=4)
        assert set(row) == set(results.COLUMNS)
        results.append_row(path, row)
    adamw, adams = results.read_rows(path)
    assert tuple(adamw) == results.COLUMNS
    assert adamw["adamw_rms_end_matrices"] == "" and float(adams["adamw_rms_end_matrices"]) > 0
    for row in (adamw, adams):
        assert all(
            float(row[f"rms_{at}_{kind}"]) > 0 for at in ("half", "end") for kind in gpt.KINDS
        )
        assert int(row["tokens"]) == 4 * TINY.batch * TINY.seq_length
        assert float(row["held_out_loss_per_byte"]) == pytest.approx(
            float(row["held_out_loss"]) / 4, abs=1e-6
        )


def test_a_seed_gives_the_same_run_and_another_seed_another(lab: Lab) -> None:
    first, curves = lab.train(Run("A", "AdamS", 1e-2, 0), steps=12)
    lab.train(Run("B", "AdamW Nesterov", 1e-2, 1), steps=4)
    again, same_curves = lab.train(Run("A", "AdamS", 1e-2, 0), steps=12)
    other, _ = lab.train(Run("A", "AdamS", 1e-2, 1), steps=12)
    assert first["held_out_loss"] == again["held_out_loss"] != other["held_out_loss"]
    assert curves == same_curves
    assert first["held_out_loss"] < math.log(64)  # it has learned


def test_four_batches_a_step_are_one_large_batch(lab: Lab) -> None:
    """The gradients of B's step are the mean over all of its tokens."""
    row, curves = lab.train(Run("B", "AdamW", 1e-3, 0), steps=2)
    assert row["tokens_per_step"] == 4 * TINY.batch * TINY.seq_length
    starts = lab.batches(0, 8)[:4].flatten()
    gpt.initialize_(lab.model.params, lab.model.shape, 0)
    loss = lab.model.loss(lab._sequences(lab.train_tokens, starts))
    assert curves["loss"][0] == pytest.approx(loss.item(), abs=2e-5)


def test_batches_pass_over_the_text_before_they_repeat(lab: Lab) -> None:
    num_sequences = (len(lab.train_tokens) - 1) // TINY.seq_length
    starts = lab.batches(5, num_sequences // TINY.batch).flatten()
    assert len(starts.unique()) == len(starts)
    assert starts.max() + TINY.seq_length < len(lab.train_tokens)


def test_update_rms_is_that_of_the_optimizers_own_update(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def build(*args: object) -> torch.optim.Optimizer:
        optimizer = variants.build(*args)
        optimizer.wants_update_rms = True
        built.append(optimizer)
        return optimizer

    def initialize_(params: dict[str, torch.Tensor], shape: gpt.Shape, seed: int) -> None:
        gpt.initialize_(params, shape, seed)
        with torch.no_grad():  # so large that weight decay is seen; norms are large and have none
            for name, param in params.items():
                param.mul_(1.0 if gpt.kind_of(name) == "norms" else 50.0)

    monkeypatch.setattr(lab_module, "build", build)
    monkeypatch.setattr(lab_module, "initialize_", initialize_)
    row, _ = lab.train(Run("A", "AdamS", 1e-3, 0), steps=6)
    [optimizer] = built
    rms = iter(optimizer.update_rms().tolist())
    for kind, group in zip(gpt.KINDS, optimizer.param_groups, strict=True):
        sizes = [param.numel() for param in group["params"]]
        squares = sum(size * next(rms) ** 2 for size in sizes)
        # The difference of two such fp32 params has few digits at the last, small rate.
        assert float(row[f"rms_end_{kind}"]) == pytest.approx(
            math.sqrt(squares / sum(sizes)), rel=2e-3
        )


def test_cosines_of_an_alternating_gradient() -> None:
    direction = torch.randn(100, generator=torch.Generator().manual_seed(6))
    grads = torch.stack([(-1) ** step * (1 + step) * direction for step in range(8)])
    assert lab_module.gradient_cosines(grads, 3) == pytest.approx([-1, 1, -1], abs=1e-5)


def test_a_run_keeps_its_gradients_cosines(lab: Lab) -> None:
    for axis, steps in (("A", 40), ("B", 16)):  # the second is shorter than what is kept
        _, curves = lab.train(Run(axis, "AdamW", 1e-3, 0), steps=steps)
        cosines = curves["gradient_cosines"]
        assert len(cosines) == lab_module.MAX_LAG and all(-1 <= each <= 1 for each in cosines)
        assert cosines[0] > 0.1  # the first steps of a training, all downhill


def test_a_run_that_cannot_end_in_time_leaves_no_row(lab: Lab) -> None:
    with pytest.raises(lab_module.OutOfTime):
        lab.train(Run("A", "AdamW", 1e-3, 0), steps=8, deadline=time.monotonic() - 1)


def test_a_diverged_run_is_a_row_with_an_infinite_loss(lab: Lab) -> None:
    row, _ = lab.train(Run("A", "AdamW", 1e30, 0), steps=8)
    assert row["held_out_loss"] == math.inf
    assert results.losses_of([{key: str(value) for key, value in row.items()}]) == {
        Run("A", "AdamW", 1e30, 0): math.inf
    }


def test_a_model_that_does_not_compile_in_time_runs_without(lab: Lab) -> None:
    lab.compile(timeout_s=0.001)
    assert lab.compiled.startswith("no: TimeoutError")
    row, _ = lab.train(Run("A", "AdamW", 1e-3, 0), steps=4)
    assert math.isfinite(row["held_out_loss"]) and row["compiled"] == lab.compiled


def run_study(data: Path, out: Path, seconds: float, plan: int = 1) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(EXAMPLE / "gpu_study.py"),
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    command += ["--seconds", str(seconds), "--device", "cpu", "--rehearse", "--plan", str(plan)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_killed_study_goes_on_and_repeats_no_run(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = out / "quality.csv"
    study = run_study(data, out, 300)
    for _ in range(1800):
        if table.exists() and len(table.read_text().splitlines()) > 3:
            break
        time.sleep(0.1)
    study.kill()
    study.communicate()
    before = results.read_rows(table)
    assert len(before) >= 3
    # What a kill in the middle of a line leaves.
    with table.open("a") as file:
        file.write("rehearsal,A,Ada")
    study = run_study(data, out, gpu_study.RESERVE_S + 8)
    output, _ = study.communicate()
    assert study.returncode == 0, output
    # How long that takes is not asserted: on a busy machine the last run ends late.
    assert re.search("end: .*(would take|out of time)", output), output
    rows = results.read_rows(table)
    assert rows[: len(before)] == before and len(rows) > len(before)
    runs = [results.run_of(row) for row in rows]
    assert len(set(runs)) == len(runs)
    assert {row["steps"] for row in rows if row["axis"] == "A"} == {before[0]["steps"]}
    assert set(runs) <= set(results.read_curves(out / "curves.jsonl"))
    assert plot.summary(results.losses_of(rows)).count("\n| A") >= 2


def test_the_study_says_what_is_missing(data: Path, tmp_path: Path) -> None:
    study = run_study(tmp_path / "none", tmp_path / "out", 60)
    output, _ = study.communicate()
    assert study.returncode == 2 and "prepare.py" in output


def test_a_study_goes_on_with_its_own_plan_and_text(data: Path, tmp_path: Path) -> None:
    """The second plan does a run, and then refuses another plan and another text."""
    out = tmp_path / "out"
    study = run_study(data, out, 100, plan=2)
    table = out / "quality.csv"
    for _ in range(600):
        if table.exists() and len(table.read_text().splitlines()) > 1:
            break
        time.sleep(0.1)
    study.kill()
    study.communicate()
    [row, *_] = results.read_rows(table)
    assert (row["axis"], row["variant"], row["steps"]) == ("98k", "AdamW", "45")
    assert int(row["tokens_per_step"]) == 4 * 2 * 32
    other_plan = run_study(data, out, 60)
    output, _ = other_plan.communicate()
    assert other_plan.returncode == 2 and "plan 1 alone" in output
    other = tmp_path / "other"
    other.mkdir()
    for path in data.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"sha256": "another"}))
    other_text = run_study(other, out, 60, plan=2)
    output, _ = other_text.communicate()
    assert other_text.returncode == 2 and "must be the text of the runs" in output


def test_the_plan_names_what_the_code_runs() -> None:
    text = (EXAMPLE / "PLAN.md").read_text()
    for variant in (ADAMW, ADAMS, *CANDIDATES):
        rates = ", ".join(f"{rate:.0e}".replace("e-0", "e-") for rate in variant.rates)
        [line] = [line for line in text.splitlines() if line.startswith(f"| {variant.name} |")]
        assert line.endswith(f"| {rates} |")
    assert all(change.name.removeprefix("AdamW ") in text for change in CHANGED_ADAMW)
    preset = lab_module.PRESETS["25M"]
    tokens = preset.batch * preset.seq_length
    for number in (tokens, 4 * tokens, preset.max_eval_batches * tokens):
        assert f"{number:,}" in text
    assert f"{preset.min_steps} to {preset.max_steps} steps" in text
    assert f"{schedule.MARGIN:+} nats a token" in text
    assert f"{gpu_study.TARGET_RUNS} runs of A" in text
