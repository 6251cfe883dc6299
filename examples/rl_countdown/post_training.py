"""One seed's SFT, and one run of GRPO from it with AdamS or AdamW, through TRL's trainers."""

import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from countdown import Problem, Split, answers, is_correct
from datasets import Dataset, disable_progress_bars
from policy import MAX_NEW_TOKENS, Shape, accuracy, make_model, make_tokenizer
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from megatron_adams import AdamS

disable_progress_bars()  # of the tokenization

OPTIMIZERS = {"AdamS": AdamS, "AdamW": torch.optim.AdamW}
# The same for both; torch's AdamW would have a beta2 of 0.999 and a weight decay of 0.01.
SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


@dataclass(frozen=True)
class Preset:
    """The size of a study's runs."""

    shape: Shape
    num_taught: int
    num_held_out: int
    sft_steps: int
    sft_batch: int  # answers a step
    sft_lr: float
    grpo_steps: int
    prompts: int  # problems a step
    generations: int  # answers a problem
    evaluate_every: int  # steps


@dataclass
class Curves:
    """What a run of GRPO leaves."""

    steps: list[int] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)  # of each step: the share of right answers
    held_out_steps: list[int] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)  # the share of held-out problems solved


# What both trainers are told: fp32 on the CPU, nothing saved, nothing reported, no bar.
_PLAIN: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_grad_norm": 1.0,
}


class _Watch(TrainerCallback):
    """Collects the curves, and says every now and then how a run is doing."""

    def __init__(self, label: str, evaluate: Any, every: int) -> None:
        self.label, self.evaluate, self.every = label, evaluate, every
        self.curves = Curves()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "reward" in logs:
            self.curves.steps.append(state.global_step)
            self.curves.reward.append(logs["reward"])
        if logs and "loss" in logs and state.global_step % self.every == 0:
            recent = self.curves.reward[-self.every :]
            shown = f"reward {statistics.mean(recent):.3f}" if recent else f"loss {logs['loss']}"
            self.curves.held_out_steps.append(state.global_step)
            self.curves.held_out.append(self.evaluate())
            print(
                f"{self.label}: step {state.global_step}/{state.max_steps}, {shown}, "
                f"held-out {self.curves.held_out[-1]:.3f}",
                flush=True,
            )


def teach(preset: Preset, split: Split, seed: int, folder: Path) -> LlamaForCausalLM:
    """Train a model from scratch on answers to `split.taught`, with AdamW.

    Args:
        folder: where the trainer may write.
    """
    tokenizer = make_tokenizer()
    model = make_model(preset.shape, tokenizer, seed)
    order = random.Random(seed)
    rows = [
        {"prompt": problem.prompt(order), "completion": answer}
        for _ in range(4)  # the numbers in four orders
        for problem in split.taught
        for answer in answers(problem.numbers)[problem.target]
    ]
    watch = _Watch(
        f"SFT seed {seed}",
        lambda: accuracy(model, tokenizer, split.held_out),
        max(1, preset.sft_steps // 4),
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **_PLAIN,
            output_dir=str(folder),
            seed=seed,
            max_steps=preset.sft_steps,
            per_device_train_batch_size=preset.sft_batch,
            learning_rate=preset.sft_lr,
            warmup_steps=preset.sft_steps // 20,
            lr_scheduler_type="cosine",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)  # a line of all metrics at every step
    trainer.train()
    return model


def reward(
    prompts: list[str], completions: list[str], numbers: list[Any], target: list[int], **_: Any
) -> list[float]:
    """Return 1 for a right answer and 0 for any other text."""
    problems = [Problem(tuple(each), made) for each, made in zip(numbers, target, strict=True)]
    return [float(is_correct(*pair)) for pair in zip(completions, problems, strict=True)]


def post_train(
    model: LlamaForCausalLM,
    preset: Preset,
    split: Split,
    *,
    optimizer: str,
    lr: float,
    seed: int,
    folder: Path,
) -> Curves:
    """Train a model in place with GRPO, and return its curves.

    Args:
        optimizer: a name of OPTIMIZERS.
        lr: the rate after the warm-up; it then falls linearly to zero.
        seed: sets the order of the problems, and the sampling.
        folder: where the trainer may write.
    """
    tokenizer = make_tokenizer()
    order = random.Random(seed)
    rows = [
        {"prompt": each.prompt(order), "numbers": list(each.numbers), "target": each.target}
        for each in split.train
    ]

    def evaluate() -> float:
        return accuracy(model, tokenizer, split.held_out)

    watch = _Watch(f"{optimizer} {lr:g} seed {seed}", evaluate, preset.evaluate_every)
    watch.curves.held_out_steps.append(0)
    watch.curves.held_out.append(evaluate())
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            **_PLAIN,
            output_dir=str(folder),
            seed=seed,
            max_steps=preset.grpo_steps,
            per_device_train_batch_size=preset.prompts * preset.generations,
            num_generations=preset.generations,
            max_completion_length=MAX_NEW_TOKENS,
            learning_rate=lr,
            warmup_steps=preset.grpo_steps // 20,
            lr_scheduler_type="linear",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(OPTIMIZERS[optimizer](model.parameters(), lr=lr, **SETTINGS), None),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)  # a line of all metrics at every step
    trainer.train()
    return watch.curves
