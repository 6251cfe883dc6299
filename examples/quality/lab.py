"""What all runs share: the tokens and the model on the device. The studies drive it."""

import json
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
from gpt import KINDS, Gpt, Shape, initialize_, kind_of
from schedule import VARIANTS, WEIGHT_DECAY, Run, Variant
from torch import Tensor
from variants import Shadow, build

from megatron_adams import AdamS

CLIP_NORM = 1.0
WARMUP_SHARE, LAST_LR_SHARE = 0.1, 0.1
# The steps of axis B, relative to axis A's.
STEPS_FACTOR = 1 / 3
# The gradients of one matrix are kept for this many steps, from the middle of a run on (in short
# runs, from the first quarter on), and compared up to this many steps apart.
KEPT_STEPS, MAX_LAG = 30, 10
COMPILE_TIMEOUT_S = 75


@dataclass(frozen=True)
class Preset:
    """The sizes of a study.

    Attributes:
        batch: how many sequences pass through the model at once.
        min_steps, max_steps: the limits for the steps of a run of A.
        max_eval_batches: the held-out loss is that of at most this many batches.
        batches_per_step: axis -> how many batches a step has; of an axis that is not in it, one.
        ramp: the steps are cut into as many equal parts, and a step of each has this many times as
            many batches.
    """

    name: str
    num_layers: int
    width: int
    num_heads: int
    seq_length: int
    batch: int
    min_steps: int
    max_steps: int
    max_eval_batches: int
    tied: bool = False
    batches_per_step: Mapping[str, int] = field(default_factory=lambda: {"B": 4}, hash=False)
    ramp: tuple[int, ...] = (1,)


# "98k" and "24k" are settings of the second plan. Both have batches of one shape, so that the model
# is compiled once. "124M" is the setting of the third. Twice its batch would not fit into 80 GB
# without the compiler: the logits and their gradients alone would take 40 GB.
PRESETS = {
    "25M": Preset("25M", 6, 512, 8, 512, batch=192, min_steps=100, max_steps=300,
                  max_eval_batches=8),
    "25M, plan 2": Preset("25M", 6, 512, 8, 512, batch=48, min_steps=225, max_steps=225,
                          max_eval_batches=32, batches_per_step={"98k": 4}),
    # 124 million parameters with 50,304 tokens to know.
    "124M": Preset("124M", 12, 768, 12, 1024, batch=24, min_steps=160, max_steps=160,
                   max_eval_batches=16, tied=True, batches_per_step={"124M": 4}),
    "rehearsal": Preset("rehearsal", 2, 32, 2, 32, batch=8, min_steps=40, max_steps=60,
                        max_eval_batches=4),
    "rehearsal, plan 2": Preset("rehearsal", 2, 32, 2, 32, batch=2, min_steps=40, max_steps=60,
                                max_eval_batches=16, batches_per_step={"98k": 4}),
    "rehearsal, plan 3": Preset("rehearsal", 2, 32, 2, 32, batch=2, min_steps=32, max_steps=32,
                                max_eval_batches=16, tied=True, batches_per_step={"124M": 4}),
}  # fmt: skip


class OutOfTime(Exception):
    """A run would end after the deadline."""


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step, from 0: linear warm-up, then a cosine to a tenth of the peak."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (LAST_LR_SHARE + (1 - LAST_LR_SHARE) * (1 + math.cos(math.pi * progress)) / 2)


def gradient_cosines(grads: Tensor, max_lag: int) -> list[float]:
    """Return the mean cosine of gradients 1, 2, ..., max_lag steps apart; (steps, numel) fp32."""
    unit = grads.float()
    unit = unit / unit.norm(dim=1, keepdim=True)
    gram = (unit @ unit.T).double().cpu()
    return [gram.diagonal(lag).mean().item() for lag in range(1, max_lag + 1)]


def rms_by_kind(updates: Sequence[Tensor], kinds: Sequence[str]) -> Tensor:
    """Return the root mean square of the updates of each of KINDS, (4,) fp32; NaN for no tensor."""
    results = []
    for kind in KINDS:
        chosen = [update for update, each in zip(updates, kinds, strict=True) if each == kind]
        if not chosen:
            results.append(torch.full((), math.nan, dtype=torch.float32, device=updates[0].device))
            continue
        squares = torch.stack([update.square().sum() for update in chosen]).sum()
        results.append((squares / sum(update.numel() for update in chosen)).sqrt())
    return torch.stack(results)


class Lab:
    """The tokens and the model on a device; `train` does a run.

    Args:
        data: the folder that prepare.py wrote.
        variants: the study's variants by name.
    Raises:
        ValueError: the data is missing, or too short for one step.
    """

    def __init__(
        self,
        preset: Preset,
        data: Path,
        device: torch.device,
        variants: Mapping[str, Variant] = VARIANTS,
    ) -> None:
        self.preset, self.device, self.variants = preset, device, variants
        if not (data / "meta.json").exists():
            raise ValueError(f"{data}: must hold train.bin, heldout.bin, meta.json; run prepare.py")
        meta = json.loads((data / "meta.json").read_text())
        self.bytes_per_token = float(meta["held_out_bytes_per_token"])
        self.train_tokens = self._read(data / "train.bin")
        self.held_out_tokens = self._read(data / "heldout.bin")
        self.batch_tokens = preset.batch * preset.seq_length
        for name in ("train_tokens", "held_out_tokens"):
            if len(getattr(self, name)) <= self.batch_tokens:
                raise ValueError(
                    f"{name}={len(getattr(self, name))}: must be over {self.batch_tokens}, one "
                    "step; prepare more text"
                )
        shape = Shape(
            preset.num_layers,
            preset.width,
            preset.num_heads,
            preset.seq_length,
            meta["vocab_size"],
            preset.tied,
        )
        # A CPU is slow in bf16, and a rehearsal does not need it.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = Gpt(shape, device, dtype)
        self.params = list(self.model.params.values())
        self.kinds = [kind_of(name) for name in self.model.params]
        self.num_params = sum(param.numel() for param in self.params)
        self.compiled = "no: not asked for"
        self._offsets = torch.arange(preset.seq_length + 1, device=device)
        self._probe = self.model.params[f"{preset.num_layers // 2}.mlp_in"]

    def _read(self, path: Path) -> Tensor:
        tokens = torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int32))
        return tokens.to(self.device)

    def wait(self) -> None:
        """Wait until the device has finished all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _sequences(self, tokens: Tensor, starts: Tensor) -> Tensor:
        return tokens[starts[:, None] + self._offsets].long()

    def batches(self, seed: int, num_batches: int) -> Tensor:
        """Return where a run's sequences start, (num_batches, batch) int64; each once per epoch."""
        seq = self.preset.seq_length
        num_sequences = (len(self.train_tokens) - 1) // seq
        generator = torch.Generator().manual_seed(seed)
        needed = num_batches * self.preset.batch
        order = torch.cat(
            [
                torch.randperm(num_sequences, generator=generator)
                for _ in range(-(-needed // num_sequences))
            ]
        )
        starts = order[:needed].view(num_batches, self.preset.batch) * seq
        return starts.to(self.device)

    def compile(self, timeout_s: float) -> None:
        """Compile the model. If that fails or takes too long, go on without and say why."""

        def give_up(*_: object) -> None:
            raise TimeoutError(f"took over {timeout_s:.0f} s")

        handler = signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            self.model.compile()
            self._forward_and_backward()
            self.wait()
            self.compiled = "yes"
        except Exception as exc:  # the compiler raises a dozen kinds
            self.model.forget_compiled()
            reason = str(exc).strip().splitlines() or [""]
            self.compiled = f"no: {type(exc).__name__}: {reason[0][:120]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)

    def compile_optimizer(self) -> None:
        """Compile AdamS's kernel now, so that no run waits for it."""
        optimizer = build(VARIANTS["AdamS"], self._params_by_kind(), 1e-3)
        assert isinstance(optimizer, AdamS)
        optimizer.compile_kernels()

    def _forward_and_backward(self) -> None:
        starts = self.batches(0, 1)[0]
        self.model.loss(self._sequences(self.train_tokens, starts)).backward()

    def seconds_per_batch(self, num_batches: int) -> float:
        """Measure the time of a step of A with AdamW. This changes the parameters."""
        initialize_(self.model.params, self.model.shape, 0)
        optimizer = build(VARIANTS["AdamW"], self._params_by_kind(), 1e-3)
        for batch in range(2 + num_batches):
            if batch == 2:
                self.wait()
                start = time.monotonic()
            self._forward_and_backward()
            torch.nn.utils.clip_grad_norm_(self.params, CLIP_NORM, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        self.wait()
        return (time.monotonic() - start) / num_batches

    def _params_by_kind(self) -> dict[str, list[Tensor]]:
        return {
            kind: [p for p, each in zip(self.params, self.kinds, strict=True) if each == kind]
            for kind in KINDS
        }

    def held_out_loss(self) -> float:
        """Return the mean loss of all whole batches of held-out text, in nats per token."""
        seq, batch = self.preset.seq_length, self.preset.batch
        num_batches = (len(self.held_out_tokens) - 1) // (seq * batch)
        num_batches = min(num_batches, self.preset.max_eval_batches)
        starts = torch.arange(num_batches * batch, device=self.device).view(num_batches, -1) * seq
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for each in starts:
            # Gradients stay enabled, although nothing needs them. Otherwise the model would be
            # compiled again.
            total += self.model.loss(self._sequences(self.held_out_tokens, each)).detach()
        return total.item() / num_batches

    def steps_of(self, axis: str, steps: int) -> int:
        """Return the steps of a run of an axis, given those of a run of A."""
        return steps if axis == "A" else max(2, round(steps * STEPS_FACTOR))

    def batches_of_steps(self, axis: str, steps: int) -> list[int]:
        """Return how many batches pass through the model in each step."""
        ramp = self.preset.ramp
        batches = self.preset.batches_per_step.get(axis, 1)
        return [batches * ramp[step * len(ramp) // steps] for step in range(steps)]

    def train(
        self,
        run: Run,
        steps: int,
        deadline: float = math.inf,
        report: Callable[[str], None] = lambda text: None,
        on_step: Callable[[], object] = lambda: None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Do a run of `steps` steps.

        Args:
            deadline: a time on the clock of time.monotonic().
            report: called at each quarter with the run's progress.
            on_step: called after each step.
        Returns:
            The row of quality.csv and the entry of curves.jsonl.
        Raises:
            OutOfTime: at a quarter, if the run would end after the deadline.
        """
        begin = time.monotonic()
        variant = self.variants[run.variant]
        batches_of_steps = self.batches_of_steps(run.axis, steps)
        initialize_(self.model.params, self.model.shape, run.seed)
        starts = self.batches(run.seed, sum(batches_of_steps)).split(batches_of_steps)
        optimizer = build(variant, self._params_by_kind(), run.lr)
        shadow = (
            Shadow(self.params, variant.beta1, self.variants["AdamW"].beta2)
            if variant.family == "adams"
            else None
        )
        losses = torch.zeros(steps, device=self.device)
        half, last = steps // 2, steps - 1
        first_kept = min(half, max(steps // 4, steps - KEPT_STEPS))
        kept: list[Tensor] = []
        rms: dict[str, Tensor] = {}
        diverged = False
        for step in range(steps):
            lr = learning_rate(step, steps, run.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in starts[step]:
                tokens = self._sequences(self.train_tokens, batch)
                loss = self.model.loss(tokens) / batches_of_steps[step]
                loss.backward()
                losses[step] += loss.detach()
            if first_kept <= step < first_kept + KEPT_STEPS:
                kept.append(self._probe.grad.flatten().clone())
            torch.nn.utils.clip_grad_norm_(self.params, CLIP_NORM, foreach=True)
            if shadow is not None:
                shadow.count()
            place = {half: "half", last: "end"}.get(step)
            before = [param.detach().clone() for param in self.params] if place else []
            optimizer.step()
            if place:
                rms[f"rms_{place}"] = self._rms(before, optimizer, lr)
                if shadow is not None:
                    updates = shadow.updates(optimizer)
                    ordered = dict(zip(map(id, shadow.params), updates, strict=True))
                    rms[f"adamw_rms_{place}"] = rms_by_kind(
                        [ordered[id(param)] for param in self.params], self.kinds
                    )
            optimizer.zero_grad(set_to_none=False)
            on_step()
            if step in (steps // 4, half, 3 * steps // 4):
                now = losses[step].item()  # waits for the device
                if not math.isfinite(now):
                    diverged = True
                    break
                seconds = time.monotonic() - begin
                if time.monotonic() + seconds * (steps - step - 1) / (step + 1) > deadline:
                    raise OutOfTime(f"{run}: stopped at step {step} of {steps}, out of time")
                report(f"{run}  step {step + 1}/{steps}  loss {now:.4f}  {seconds:.1f} s")
        held_out = math.inf if diverged else self.held_out_loss()
        if not math.isfinite(held_out):
            held_out = math.inf
        seconds = time.monotonic() - begin
        curve = losses.tolist()[: step + 1]
        tokens = sum(batches_of_steps) * self.batch_tokens
        row = {
            "model": self.preset.name,
            "axis": run.axis,
            "variant": run.variant,
            "lr": run.lr,
            "seed": run.seed,
            "beta1": variant.beta1,
            "beta2": variant.beta2,
            "weight_decay": WEIGHT_DECAY,
            "num_params": self.num_params,
            "steps": steps,
            "tokens_per_step": round(tokens / steps),
            "tokens": tokens,
            "held_out_loss": round(held_out, 6),
            "held_out_loss_per_byte": round(held_out / self.bytes_per_token, 6),
            "train_loss": round(sum(curve[-10:]) / len(curve[-10:]), 6),
            "seconds": round(seconds, 2),
            "tokens_per_second": round(tokens * len(curve) / steps / seconds),
            "compiled": self.compiled,
            "device": self._device_name(),
            "torch": torch.__version__,
        }
        for place in ("half", "end"):
            for name in (f"rms_{place}", f"adamw_rms_{place}"):
                values = rms[name].tolist() if name in rms else [None] * len(KINDS)
                for kind, value in zip(KINDS, values, strict=True):
                    is_there = value is not None and not math.isnan(value)
                    row[f"{name}_{kind}"] = f"{value:.5g}" if is_there else ""
        curves: dict[str, Any] = {
            "steps": list(range(0, len(curve), 10)),
            "loss": [round(loss, 5) for loss in curve[::10]],
        }
        if len(kept) > MAX_LAG and not diverged:
            cosines = gradient_cosines(torch.stack(kept), MAX_LAG)
            curves["gradient_cosines"] = [round(cosine, 5) for cosine in cosines]
        return row, curves

    def record(self, run: Run, steps: int, out: Path, **options: Any) -> dict[str, Any]:
        """Do a run, append it to the files in the folder `out`, and return its row.

        Args:
            options: for `train`, which says what is raised.
        """
        row, curves = self.train(run, steps, **options)
        results.append_curves(out / "curves.jsonl", run, curves)
        results.append_row(out / "quality.csv", row)
        return row

    @torch.no_grad()
    def _rms(self, before: list[Tensor], optimizer: torch.optim.Optimizer, lr: float) -> Tensor:
        """Return the RMS of the last step's updates before lr and weight decay, by kind: (4,)."""
        decays = {
            id(param): group["weight_decay"]
            for group in optimizer.param_groups
            for param in group["params"]
        }
        updates = [
            (old - new) / lr - decays[id(new)] * old
            for old, new in zip(before, self.params, strict=True)
        ]
        return rms_by_kind(updates, self.kinds)

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type
