"""examples/quality on the CPU: the rule on made-up losses, the search, a study that is cut off."""

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "quality"
sys.path.insert(0, str(EXAMPLE))

import cpu_plot  # noqa: E402  (the example's files import each other by name)
import cpu_schedule  # noqa: E402
import cpu_study  # noqa: E402
import gpt  # noqa: E402
import lab as lab_module  # noqa: E402
import results  # noqa: E402
import schedule  # noqa: E402
import variants  # noqa: E402
from cpu_schedule import (  # noqa: E402
    ADAMS,
    ADAMW,
    ADAMW_99,
    CAUTIOUS,
    MARGIN,
    NESTEROV,
    PARTS,
    SETTINGS,
    Part,
    rate,
)
from schedule import Losses, Run  # noqa: E402

# Where each variant of the made-up study is best, on the grid of rates.
BEST = {"AdamW": 7, "AdamW beta2 0.99": 6, "AdamS cautious": 4}


def pretend(
    offset_of: Callable[[Run], float], num_parts: int = len(PARTS), stop: int = 10_000
) -> tuple[Losses, list[Run]]:
    """Have runs done whose loss is 2 at the best rate, plus an offset and a noise by seed."""
    losses: Losses = {}
    order = []
    while len(order) < stop and (run := cpu_schedule.next_run(losses, num_parts)) is not None:
        distance = abs(cpu_schedule.index_of(run.lr) - BEST.get(run.variant, 3))
        losses[run] = 2 + offset_of(run) + 0.05 * distance + 0.1 * run.seed
        order.append(run)
    return losses, order


def by_variant(**offsets: float) -> Callable[[Run], float]:
    """An offset for each variant, by its last word, with a little noise that is not paired."""

    def offset_of(run: Run) -> float:
        noise = 0.002 * ((7 * run.seed + len(run.variant)) % 3 - 1)
        worse = 0.05 if run.variant == ADAMW_99.name else 0.0
        return offsets.get(run.variant.replace("AdamS ", "").lower(), worse) + noise

    return offset_of


def test_every_best_rate_has_neighbors() -> None:
    losses, order = pretend(by_variant())
    assert len(set(order)) == len(order)
    for part in PARTS:
        for variant in part.variants:
            tried = {
                cpu_schedule.index_of(lr) for lr in schedule.rates_of(losses, variant, part.setting)
            }
            best = schedule.best_rate(losses, variant, part.setting)
            assert best == rate(BEST.get(variant.name, 3))
            near = (1,) if part.fine else (1, 2)
            for side in (-1, 1):
                assert any(cpu_schedule.index_of(best) + side * step in tried for step in near)
    # The first part comes first, and its seeds before the next setting.
    others = next(place for place, run in enumerate(order) if run.axis != "2k")
    assert {run.seed for run in order[:others]} == {0, 1, 2, 3}
    # The other beta2 of AdamW gets more seeds only where it is better, and it is nowhere.
    assert {run.seed for run in order if run.variant == ADAMW_99.name} == {0}


def test_the_second_gpu_plan_begins_at_the_rates_of_the_first_study() -> None:
    losses: Losses = {}
    order = []
    while (run := cpu_schedule.next_run(losses, parts=cpu_schedule.GPU_PARTS)) is not None:
        distance = abs(cpu_schedule.index_of(run.lr) - BEST.get(run.variant, 3) + 4)
        losses[run] = 2 + 0.05 * distance + 0.1 * run.seed
        order.append(run)
    assert order[0] == Run("98k", "AdamW", 1e-3, 0)
    first = {run.variant: run for run in reversed(order) if run.axis == "98k"}
    assert {name: run.lr for name, run in first.items()} == {
        name: rate(place) for name, place in cpu_schedule._GPU_STARTS.items()
    }
    other = next(run for run in order if run.axis == "24k")
    assert other.lr == schedule.best_rate(losses, ADAMW, "98k")
    by_seed = {axis: {run.seed for run in order if run.axis == axis} for axis in ("98k", "24k")}
    assert by_seed == {"98k": {0, 1, 2, 3, 4}, "24k": {0, 1, 2, 3, 4}}
    verdict = cpu_schedule.judge(losses, CAUTIOUS, cpu_schedule.GPU_SETTINGS)
    assert verdict is not None and verdict.settings == cpu_schedule.GPU_SETTINGS


def test_an_uneven_grid_keeps_its_places() -> None:
    for index in range(-8, 16):
        assert cpu_schedule.index_of(rate(index)) == index


@pytest.mark.parametrize(
    ("cautious", "nesterov", "level", "chosen"),
    [
        (-0.05, -0.02, True, CAUTIOUS),
        (-0.02, -0.05, True, NESTEROV),
        (0.05, 0.05, False, CAUTIOUS),  # both are behind AdamW, but better than AdamS
        (0.2, 0.2, False, None),
        (MARGIN, 0.2, None, CAUTIOUS),  # the interval reaches over the margin
    ],
)
def test_the_rule(
    cautious: float, nesterov: float, level: bool | None, chosen: schedule.Variant | None
) -> None:
    losses, _ = pretend(by_variant(adams=0.1, cautious=cautious, nesterov=nesterov), num_parts=2)
    verdict = cpu_schedule.judge(losses, CAUTIOUS)
    assert verdict is not None
    assert verdict.settings == ("512", "2k")
    assert verdict.improves == (cautious < 0.1)
    assert verdict.level is level
    if chosen is CAUTIOUS and cautious == nesterov:
        assert cpu_schedule.recommended(losses) in (CAUTIOUS, NESTEROV)
    else:
        assert cpu_schedule.recommended(losses) is chosen
    assert (chosen.name if chosen else "form of the paper") in cpu_schedule.decide(losses)


def test_one_bad_batch_size_is_enough_against_a_candidate() -> None:
    def offset_of(run: Run) -> float:
        bad = run.axis == "512" and run.variant == CAUTIOUS.name
        return by_variant(adams=0.1, cautious=0.2 if bad else 0.0, nesterov=0.2)(run)

    losses, _ = pretend(offset_of, num_parts=2)
    verdict = cpu_schedule.judge(losses, CAUTIOUS)
    assert verdict is not None and not verdict.improves and verdict.level is False
    assert cpu_schedule.recommended(losses) is None


def test_what_chose_a_rate_does_not_decide() -> None:
    def offset_of(run: Run) -> float:
        lucky = run.seed == 0 and run.variant == CAUTIOUS.name
        return -1.0 if lucky else by_variant(adams=0.1, cautious=0.2, nesterov=0.2)(run)

    losses, _ = pretend(offset_of, num_parts=2)
    assert cpu_schedule.recommended(losses) is None


def test_nothing_is_decided_by_one_batch_size() -> None:
    losses, _ = pretend(by_variant(adams=0.1), num_parts=1)
    assert cpu_schedule.judge(losses, CAUTIOUS) is None
    assert cpu_schedule.decide(losses).startswith("Nothing is decided yet")
    losses, _ = pretend(by_variant(adams=0.1), num_parts=2)
    assert cpu_schedule.judge(losses, CAUTIOUS) is not None


def test_the_better_adamw_is_the_one_to_beat() -> None:
    def offset_of(run: Run) -> float:
        return -0.1 if run.variant == ADAMW_99.name else 0.0

    losses, _ = pretend(offset_of, num_parts=3)
    assert cpu_schedule.reference(losses, "512") is ADAMW_99
    found = cpu_schedule.compare(losses, "512", ADAMS, ADAMW_99)
    assert found is not None and found.mean == pytest.approx(0.1)
    assert set(found.differences) == {1, 2, 3}


def test_the_interval_is_students() -> None:
    found = schedule.Paired("2k", {1: 0.01, 2: 0.02, 3: 0.03})
    assert found.half_width == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert schedule.Paired("2k", {1: 0.01}).half_width == math.inf


def test_mask_and_numerator_act_on_all_parameters() -> None:
    params = {kind: [torch.ones(3, requires_grad=True)] for kind in gpt.KINDS}
    params["head"] = []  # tied
    for variant in cpu_schedule.VARIANTS.values():
        optimizer = variants.build(variant, params, 0.5)
        assert len(optimizer.param_groups) == 3
        for group in optimizer.param_groups:
            assert group["cautious"] == variant.cautious and group["nesterov"] == variant.nesterov
            assert tuple(group["betas"]) == (variant.beta1, variant.beta2)


def test_each_axis_changes_one_thing() -> None:
    """Of AdamS and of AdamW alike, but for the cap, which AdamW's updates stay below."""
    for variant in cpu_schedule.AXES:
        plain = ADAMS if variant.family == "adams" else ADAMW
        named = {"name": variant.name, "rates": variant.rates}
        changed = {
            key
            for key, value in dataclasses.asdict(variant).items()
            if value != dataclasses.asdict(dataclasses.replace(plain, **named))[key]
        }
        assert len(changed) == 1 and changed <= {"beta1", "max_update_rms", "match_update_rms"}
        params = {"norms": [torch.ones(3, requires_grad=True)]}
        optimizer = variants.build(variant, params, 0.5)
        if variant.family == "adams":
            assert optimizer.max_update_rms == variant.max_update_rms
            assert optimizer.match_update_rms == variant.match_update_rms


@pytest.fixture
def small_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[argparse.Namespace]:
    """A study of eleven runs or so, of four steps each, and its arguments."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for name, length in (("train.bin", 20_000), ("heldout.bin", 2_000)):
        steps = generator.integers(1, 3, length)
        (np.cumsum(steps) % 64).astype(np.uint16).tofile(folder / name)
    (folder / "meta.json").write_text(
        json.dumps({"vocab_size": 64, "held_out_bytes_per_token": 2.0})
    )
    setting = dataclasses.replace(
        SETTINGS["2k"], tokens_per_step=256, steps=4, num_layers=1, width=16, num_heads=2, tied=True
    )
    monkeypatch.setitem(SETTINGS, "2k", setting)
    # So few steps need large rates.
    first = [dataclasses.replace(each, rates=(0.128, 0.256)) for each in (ADAMW, CAUTIOUS, ADAMS)]
    monkeypatch.setattr(cpu_schedule, "PARTS", (Part("2k", tuple(first), seeds=(1,)),))
    monkeypatch.setattr(cpu_study, "HELD_OUT_TOKENS", 512)
    num_threads = torch.get_num_threads()
    yield argparse.Namespace(
        out=tmp_path / "out", data=folder, parts=1, steps=None, threads=1, seconds=math.inf
    )
    torch.set_num_threads(num_threads)


def test_a_study_that_was_cut_off_gives_the_same_rows(
    small_study: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    train = lab_module.Lab.train
    num_runs = 0

    def train_until_killed(*args: object, **options: object) -> object:
        nonlocal num_runs
        num_runs += 1
        if num_runs == 4:
            raise Killed
        return train(*args, **options)

    monkeypatch.setattr(lab_module.Lab, "train", train_until_killed)
    with pytest.raises(Killed):
        cpu_study.study(small_study)
    table = small_study.out / "quality.csv"
    with table.open("a") as file:
        file.write("1x16 tied,2k,Ada")  # what a kill in the middle of a line leaves
    cpu_study.study(small_study)
    resumed = results.read_rows(table)
    num_runs = 1000
    whole_out = argparse.Namespace(**(vars(small_study) | {"out": tmp_path / "whole"}))
    cpu_study.study(whole_out)
    whole = results.read_rows(tmp_path / "whole" / "quality.csv")
    for row in (*resumed, *whole):
        row["seconds"] = row["tokens_per_second"] = ""
    assert resumed == whole
    assert num_runs - 1000 == len(whole) >= 12
    assert {row["rms_half_head"] for row in whole} == {""}  # tied: there is no head
    text = (small_study.out / "summary.md").read_text()
    assert text.count("| 2k | Adam") == 3 and (small_study.out / "quality.png").stat().st_size


def test_the_study_ends_before_its_time_is_over(small_study: argparse.Namespace) -> None:
    small_study.seconds = 0.0
    cpu_study.study(small_study)
    assert results.read_rows(small_study.out / "quality.csv") == []


def test_wrong_parts_are_refused(small_study: argparse.Namespace) -> None:
    small_study.parts = 99
    with pytest.raises(ValueError, match="--parts 99: must be from 1 to"):
        cpu_study.study(small_study)


def test_a_ramp_takes_each_sequence_once(small_study: argparse.Namespace) -> None:
    preset = lab_module.Preset(
        "1x16", 1, 16, 2, seq_length=8, batch=2, min_steps=7, max_steps=7, max_eval_batches=2,
        ramp=(1, 2, 4),
    )  # fmt: skip
    lab = lab_module.Lab(preset, small_study.data, torch.device("cpu"), cpu_schedule.VARIANTS)
    assert lab.batches_of_steps("ramp", 7) == [1, 1, 1, 2, 2, 4, 4]
    passed = []
    sequences = lab._sequences
    lab._sequences = lambda tokens, starts: passed.append(starts) or sequences(tokens, starts)
    row, _ = lab.train(schedule.Run("ramp", "AdamS", 1e-2, 0), 7)
    assert row["tokens"] == 15 * 2 * 8 and row["tokens_per_step"] == round(15 * 16 / 7)
    trained = torch.cat(passed[:15])
    assert torch.equal(trained, lab.batches(0, 15).flatten())


def test_a_batch_in_parts_takes_the_same_steps_and_held_out_text(
    small_study: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for most in (256, 64):
        monkeypatch.setattr(cpu_study, "MAX_BATCH_TOKENS", most)
        preset = cpu_study.preset_of(SETTINGS["2k"])
        lab = lab_module.Lab(preset, small_study.data, torch.device("cpu"), cpu_schedule.VARIANTS)
        assert lab.batches_of_steps("2k", 4) == [256 // most] * 4
        row, _ = lab.train(schedule.Run("2k", "AdamW", 0.01, 0), 4)
        assert (row["tokens_per_step"], row["tokens"]) == (256, 1024)
        rows.append(row)
    assert rows[0]["held_out_loss"] == pytest.approx(rows[1]["held_out_loss"], abs=1e-5)
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], abs=1e-5)


@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - {*cpu_schedule.GPU_SETTINGS, "124M"}))
def test_every_setting_is_measured_on_the_same_held_out_tokens(name: str) -> None:
    preset = cpu_study.preset_of(SETTINGS[name])
    batch_tokens = preset.batch * preset.seq_length
    assert preset.max_eval_batches * batch_tokens == cpu_study.HELD_OUT_TOKENS
    assert preset.batches_per_step[name] * batch_tokens == SETTINGS[name].tokens_per_step


def test_a_summary_of_nothing_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run cpu_study\.py"):
        cpu_plot.write(tmp_path)


def test_the_second_gpu_plan_names_what_the_code_runs() -> None:
    text = (EXAMPLE / "PLAN-GPU-2.md").read_text()
    preset = lab_module.PRESETS["25M, plan 2"]
    tokens = preset.batch * preset.seq_length
    for name in cpu_schedule.GPU_SETTINGS:
        setting = SETTINGS[name]
        assert f"| {name} | {setting.tokens_per_step:,} tokens a step, {setting.steps} st" in text
        assert setting.tokens_per_step == tokens * preset.batches_per_step.get(name, 1)
    assert f"{preset.max_eval_batches * tokens:,} tokens" in text
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| [\d, ]+ \|", line)]
    parts = [
        (int(number), setting.strip(), seeds.strip())
        for _, numbers, settings, _, seeds, _ in rows
        for number, setting in zip(numbers.split(","), settings.split(","), strict=True)
    ]
    assert parts == [
        (number, part.setting, ", ".join(map(str, part.seeds)))
        for number, part in enumerate(cpu_schedule.GPU_PARTS, start=1)
    ]


def test_the_third_gpu_plan_names_what_the_code_runs() -> None:
    text = (EXAMPLE / "PLAN-GPU-3.md").read_text()
    preset = lab_module.PRESETS["124M"]
    [name] = cpu_schedule.GPU_3_SETTINGS
    setting = SETTINGS[name]
    tokens = preset.batch * preset.seq_length
    assert f"| {name} | {setting.tokens_per_step:,} tokens a step, {setting.steps} st" in text
    assert setting.tokens_per_step == tokens * preset.batches_per_step[name]
    assert f"{preset.max_eval_batches * tokens:,} tokens" in text
    layers = f"{preset.num_layers} layers, width {preset.width}, {preset.num_heads} heads"
    assert layers in text and preset.tied == setting.tied
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| \d \|", line)]
    assert [(names.strip(), seeds.strip()) for _, _, names, seeds, _ in rows] == [
        (", ".join(each.name for each in part.variants), ", ".join(map(str, part.seeds)))
        for part in cpu_schedule.GPU_3_PARTS
    ]


def test_the_third_gpu_plan_says_how_far_each_variant_is_from_adamw() -> None:
    losses: Losses = {}
    assert "AdamW has not been run" in cpu_schedule.decide(losses, cpu_schedule.GPU_3_SETTINGS)
    order, told = [], {}
    while (run := cpu_schedule.next_run(losses, parts=cpu_schedule.GPU_3_PARTS)) is not None:
        worse = 0.03 if run.variant == ADAMS.name else 0.0
        # The noise of AdamS is not paired.
        noise = 0.001 * run.seed * (1 + (run.variant == ADAMS.name))
        distance = abs(
            cpu_schedule.index_of(run.lr) + (0 if run.variant.startswith("AdamW") else 2)
        )
        losses[run] = 1 + worse + noise + 0.05 * distance
        order.append(run)
        said = cpu_schedule.decide(losses, cpu_schedule.GPU_3_SETTINGS)
        [told[len(order)]] = [
            line for line in said.splitlines() if line.startswith("AdamS to")
        ] or [said]
    assert [run.lr for run in order[:3]] == [1e-3, 2e-3, 5e-4]
    assert "AdamW alone" in told[3]
    assert "+0.0300 with seed 0" in told[6] and "no other seed was run" in told[6]
    firsts = [n for n, run in enumerate(order, start=1) if run.variant == "AdamS" and run.seed == 1]
    assert "+0.0310 with one other seed" in told[firsts[0]]
    assert "+0.0320 ± 0.0025 with other seeds" in told[len(order)]


def test_the_plan_names_what_the_code_runs() -> None:
    text = (EXAMPLE / "PLAN-CPU.md").read_text()
    for variant in cpu_schedule.VARIANTS.values():
        [line] = [line for line in text.splitlines() if line.startswith(f"| {variant.name} |")]
        assert line.endswith(f"| {variant.rates[0] * 1e3:g}e-3 |")
    of_gpu = {*cpu_schedule.GPU_SETTINGS, *cpu_schedule.GPU_3_SETTINGS}
    for setting in (SETTINGS[name] for name in SETTINGS.keys() - of_gpu):
        assert f"{setting.tokens_per_step:,}" in text and f"{setting.steps} steps" in text
    assert f"{MARGIN:+} nats a byte" in text
    assert f"{cpu_study.HELD_OUT_TOKENS:,} tokens" in text
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| [\d, ]+ \|", line)]
    parts = [
        (int(number), setting.strip())
        for row in rows
        for number, setting in zip(row[1].split(","), row[2].split(","), strict=True)
    ]
    assert parts == [(number, part.setting) for number, part in enumerate(PARTS, start=1)]
