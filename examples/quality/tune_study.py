"""How near `megatron-adams tune` comes to the best swept learning rate, on one CPU core.

    python tune_study.py [--out FOLDER] [--settings NAME ...]

For each setting, the rates of AdamW and of AdamS are swept over whole jobs, by factors of 2 until
the best one has a worse one on both sides. Then the rule of `tune` is applied as `tune` does it: to
the first 200 steps of a job with AdamS at 0.3 of AdamW's best rate, of which the later half counts.
The rule has no parameter that was chosen by these settings. Writes tune.csv (one row a job) and
tune.md. Jobs that are in tune.csv are not repeated. tune.md has the settings of the other studies,
too, as far as their results are in --out: there the update RMS is that of the middle and the end of
the AdamS run whose rate is nearest to the trial's.
"""

import argparse
import csv
import hashlib
import math
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from gpt import Gpt, Shape, initialize_, kind_of
from torch import Tensor

from megatron_adams import AdamS
from megatron_adams.tuning import suggest

BETAS, EPS, WEIGHT_DECAY, CLIP_NORM = (0.9, 0.95), 1e-8, 0.1, 1.0
SEED, VOCABULARY = 0, 256
HELD_OUT_BYTES = 32_768
# As in tune: of AdamW's rate, and the steps of the trial.
TRIAL_RATIO, TRIAL_STEPS = 0.3, 200
FIRST_RATES = {"AdamW": 4e-3, "AdamS": 2e-3}
SKIPPED = {"encodings", "site-packages", "test", "tests", "idlelib"}
FIELDS = ("setting", "optimizer", "lr", "steps", "held_out_loss", "rms_adams", "rms_adamw")


@dataclass(frozen=True)
class Setting:
    """A model and a job; a token is a byte."""

    num_layers: int
    width: int
    num_heads: int
    seq_length: int
    batch: int
    steps: int
    tied: bool = False

    def __str__(self) -> str:
        ends = "tied" if self.tied else "not tied"
        return (
            f"{self.num_layers} x {self.width}, {ends}, "
            f"{self.batch * self.seq_length:,} tokens a step, {self.steps:,} steps"
        )


SETTINGS = {
    "1k": Setting(2, 64, 4, 64, 16, 300),
    "256": Setting(2, 64, 4, 64, 4, 300),
    "512 tied": Setting(2, 64, 4, 64, 8, 300, tied=True),
    "256 deep": Setting(6, 48, 3, 64, 4, 300),
    "256 wide": Setting(1, 128, 4, 64, 4, 300),
}


@dataclass(frozen=True)
class StudySetting:
    """A setting of another study: its file, its axis there, its model."""

    file: str
    axis: str
    words: str
    num_layers: int
    width: int
    vocabulary: int
    tied: bool = False

    def num_elements(self) -> dict[str, int]:
        """Return the number of parameters of each kind."""
        ends = self.vocabulary * self.width
        return {
            "matrices": 12 * self.num_layers * self.width**2,
            "embedding": ends,
            **({} if self.tied else {"head": ends}),
            "norms": (2 * self.num_layers + 1) * self.width,
        }


CPU, GPU_2, GPU_3 = "cpu/quality.csv", "gpu-2/quality.csv", "gpu-3/quality.csv"
STUDIES = (
    StudySetting("quality.csv", "A", "GPU study: 6 x 512, not tied", 6, 512, 4096),
    StudySetting(GPU_2, "98k", "second GPU study: 6 x 512, not tied", 6, 512, 4096),
    StudySetting(GPU_2, "24k", "second GPU study: 6 x 512, not tied", 6, 512, 4096),
    StudySetting(GPU_3, "124M", "third GPU study: 12 x 768, tied", 12, 768, 50304, tied=True),
    StudySetting(CPU, "512", "CPU study: 3 x 48, not tied", 3, 48, 512),
    StudySetting(CPU, "2k", "CPU study: 3 x 48, not tied", 3, 48, 512),
    StudySetting(CPU, "8k", "CPU study: 3 x 48, not tied", 3, 48, 512),
    StudySetting(CPU, "16k", "CPU study: 3 x 48, not tied", 3, 48, 512),
    StudySetting(CPU, "64k", "CPU study: 3 x 48, not tied", 3, 48, 512),
    StudySetting(CPU, "4k", "CPU study: 3 x 48, not tied", 3, 48, 512),
    StudySetting(CPU, "long", "CPU study: 3 x 48, not tied", 3, 48, 512),
    StudySetting(CPU, "tied", "CPU study: 3 x 48, tied", 3, 48, 512, tied=True),
    StudySetting(CPU, "wide", "CPU study: 2 x 96, not tied", 2, 96, 512),
)


def read_text() -> tuple[Tensor, Tensor]:
    """Return the bytes of the standard library's sources, (n,) uint8: training and held-out."""
    train, held_out, seen = [], [], set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if SKIPPED & {*path.parts} or not 512 < len(content) < 200_000 or digest in seen:
            continue
        seen.add(digest)
        (held_out if digest[0] < 13 else train).append(content)
    random.Random(0).shuffle(train)
    return tuple(
        torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in (train, held_out)
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step, from 0: linear warm-up over a tenth, then a cosine to a tenth."""
    warmup = max(1, round(0.1 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


class Moments:
    """The exp_avg of a job, and AdamW's exp_avg_sq."""

    def __init__(self, params: list[Tensor]) -> None:
        self.exp_avgs = [torch.zeros_like(param) for param in params]
        self.exp_avg_sqs = [torch.zeros_like(param) for param in params]
        self.num_steps = 0

    @torch.no_grad()
    def add(self, grads: list[Tensor]) -> tuple[float, float]:
        """Add a step's gradients; return the mean squares of AdamS's and of AdamW's update."""
        (beta1, beta2), numel = BETAS, sum(grad.numel() for grad in grads)
        self.num_steps += 1
        first, second = 1 - beta1**self.num_steps, 1 - beta2**self.num_steps
        adams, adamw = 0.0, 0.0
        for m, s, grad in zip(self.exp_avgs, self.exp_avg_sqs, grads, strict=True):
            v = beta2 * m.square() + (1 - beta2) * grad.square()
            m.lerp_(grad, 1 - beta1)
            s.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            adams += (m / (v.sqrt() + EPS)).square().sum().item()
            adamw += (m / first / ((s / second).sqrt() + EPS)).square().sum().item()
        return adams / numel, adamw / numel


class Lab:
    """The text; `train` does a job, or the beginning of one."""

    def __init__(self) -> None:
        self.train_text, self.held_out_text = read_text()

    def train(
        self, setting: Setting, optimizer: str, lr: float, last_step: int | None = None
    ) -> dict[str, float | str]:
        """Train, and return the columns of the row that follow its rate.

        Args:
            last_step: end after as many steps, and measure the updates of the later half of them;
                None: do the whole job, and measure the held-out loss in nats a byte.
        """
        shape = Shape(
            setting.num_layers, setting.width, setting.num_heads, setting.seq_length, VOCABULARY
        )
        model = Gpt(shape, torch.device("cpu"), torch.float32)
        initialize_(model.params, shape, SEED)
        if setting.tied:
            model.params["head"] = model.params["embedding"]
        unique = {id(param): (name, param) for name, param in reversed(model.params.items())}
        params = [param for _, param in unique.values()]
        is_norm = [kind_of(name) == "norms" for name, _ in unique.values()]
        groups = [
            {
                "params": [p for p, norm in zip(params, is_norm, strict=True) if norm == norms],
                "weight_decay": 0.0 if norms else WEIGHT_DECAY,
            }
            for norms in (False, True)
        ]
        make = torch.optim.AdamW if optimizer == "AdamW" else AdamS
        adam = make(groups, lr=lr, betas=BETAS, eps=EPS)
        moments = Moments(params)
        squares: list[tuple[float, float]] = []
        generator = torch.Generator().manual_seed(SEED + 100)
        for step in range(last_step or setting.steps):
            for group in adam.param_groups:
                group["lr"] = learning_rate(step, setting.steps, lr)
            starts = torch.randint(
                len(self.train_text) - setting.seq_length - 1, (setting.batch,), generator=generator
            )
            model.loss(self._sequences(self.train_text, starts, setting)).backward()
            torch.nn.utils.clip_grad_norm_(params, CLIP_NORM)
            if last_step is not None:
                squares.append(moments.add([param.grad for param in params]))
            adam.step()
            adam.zero_grad()
        if last_step is None:
            loss = self.held_out_loss(model, setting)
            return {"steps": setting.steps, "held_out_loss": f"{loss:.5f}"}
        adams, adamw = torch.tensor(squares[last_step // 2 :]).mean(dim=0).sqrt().tolist()
        return {"steps": last_step, "rms_adams": f"{adams:.4f}", "rms_adamw": f"{adamw:.4f}"}

    @torch.no_grad()
    def held_out_loss(self, model: Gpt, setting: Setting) -> float:
        """Return the mean loss of HELD_OUT_BYTES, spread over the held-out text."""
        number = HELD_OUT_BYTES // setting.seq_length
        starts = torch.arange(number) * ((len(self.held_out_text) - 1) // number - 1)
        parts = starts.split(64)
        sequences = (self._sequences(self.held_out_text, part, setting) for part in parts)
        return sum(model.loss(part).item() for part in sequences) / len(parts)

    def _sequences(self, text: Tensor, starts: Tensor, setting: Setting) -> Tensor:
        return text[starts[:, None] + torch.arange(setting.seq_length + 1)].long()


Losses = dict[float, float]


def next_rate(losses: Losses, first: float) -> float | None:
    """Return the rate to try next; None if the best one has a worse one on both sides."""
    if not losses:
        return first
    best = min(losses, key=lambda lr: losses[lr])
    return next((lr for lr in (best / 2, best * 2) if lr not in losses), None)


def best_rate(losses: Losses) -> float:
    """Return the minimum of the parabola in log lr through the best rate and its neighbors.

    Raises:
        ValueError: the best rate has no worse one on both sides.
    """
    rates = sorted(losses)
    place = rates.index(min(losses, key=lambda lr: losses[lr]))
    if place in (0, len(rates) - 1):
        raise ValueError(f"lr={rates[place]}: is the first or last of {rates}; try more rates")
    near = rates[place - 1 : place + 2]
    x, y = [math.log(lr) for lr in near], [losses[lr] for lr in near]
    first, second = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (second - first) / (x[2] - x[0])
    return math.exp((x[0] + x[1]) / 2 - first / (2 * curvature))


def losses_of(rows: list[dict[str, str]], setting: str, optimizer: str) -> Losses:
    """Return the losses of the whole jobs, by their rate."""
    return {
        float(row["lr"]): float(row["held_out_loss"])
        for row in rows
        if (row["setting"], row["optimizer"]) == (setting, optimizer) and row["held_out_loss"]
    }


def own_line(row: dict[str, str], rows: list[dict[str, str]]) -> str:
    """Return the line of a setting, from the row of its trial."""
    name = row["setting"]
    best = {each: best_rate(losses_of(rows, name, each)) for each in FIRST_RATES}
    return line(str(SETTINGS[name]), best, float(row["rms_adams"]), float(row["rms_adamw"]))


def line(words: str, best: dict[str, float], rms_adams: float, rms_adamw: float) -> str:
    """Return a line of the table."""
    lr = suggest(lr_adamw=best["AdamW"], rms_adams=rms_adams, rms_adamw=rms_adamw, origin=words).lr
    return (
        f"| {words} | {best['AdamW']:.2g} | {best['AdamS']:.2g} | {lr:.2g} | "
        f"{best['AdamS'] / lr:.2f} |"
    )


def study_line(setting: StudySetting, folder: Path) -> str | None:
    """Return the line of a setting of another study, None while it has no best rates."""
    if not (folder / setting.file).exists():
        return None
    with (folder / setting.file).open(newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if (row["axis"], row["seed"]) == (setting.axis, "0")
        ]
    runs = {
        name: {float(row["lr"]): row for row in rows if row["variant"] == name}
        for name in FIRST_RATES
    }
    try:
        best = {
            name: best_rate({lr: float(row["held_out_loss"]) for lr, row in found.items()})
            for name, found in runs.items()
        }
    except ValueError:
        return None
    trial = math.log(TRIAL_RATIO * best["AdamW"])
    row = runs["AdamS"][min(runs["AdamS"], key=lambda lr: abs(math.log(lr) - trial))]
    sizes = setting.num_elements()

    def rms(name: str) -> float:
        squares = [
            size * float(row[f"{name}_{place}_{kind}"]) ** 2
            for place in ("half", "end")
            for kind, size in sizes.items()
        ]
        return math.sqrt(sum(squares) / (2 * sum(sizes.values())))

    words = f"{setting.words}, {int(row['tokens_per_step']):,} tokens a step, {row['steps']} steps"
    return line(words, best, rms("rms"), rms("adamw_rms"))


def table(rows: list[dict[str, str]], folder: Path) -> str:
    """Return what came out, as Markdown: a line for each setting whose trial is done."""
    lines = [
        "| setting | best lr, AdamW | AdamS | tune suggests | best / suggestion |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(own_line(row, rows) for row in rows if row["rms_adams"]),
        *filter(None, (study_line(setting, folder) for setting in STUDIES)),
    ]
    return "\n".join(lines) + "\n"


def study(name: str, out: Path, lab: Lab, rows: list[dict[str, str]]) -> None:
    """Do the jobs of a setting that are not done yet, and its trial."""

    def do(optimizer: str, lr: float, last_step: int | None = None) -> None:
        result = lab.train(SETTINGS[name], optimizer, lr, last_step)
        row = {"setting": name, "optimizer": optimizer, "lr": f"{lr:.4g}", **result}
        rows.append({field: str(row.get(field, "")) for field in FIELDS})
        with (out / "tune.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)

    for optimizer, first in FIRST_RATES.items():
        while (lr := next_rate(losses_of(rows, name, optimizer), first)) is not None:
            do(optimizer, lr)
    if not any(row["setting"] == name and row["rms_adams"] for row in rows):
        steps = min(TRIAL_STEPS, SETTINGS[name].steps)
        do("AdamS", TRIAL_RATIO * best_rate(losses_of(rows, name, "AdamW")), steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    folder = Path(__file__).resolve().parent / "results"
    parser.add_argument("--out", type=Path, default=folder, help="results (%(default)s)")
    parser.add_argument(
        "--settings", nargs="*", metavar="NAME", default=list(SETTINGS), choices=SETTINGS
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    if (args.out / "tune.csv").exists():
        with (args.out / "tune.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    lab = Lab()
    for name in args.settings:
        study(name, args.out, lab, rows)
    (args.out / "tune.md").write_text(table(rows, args.out))
    print(table(rows, args.out), end="")


if __name__ == "__main__":
    main()
