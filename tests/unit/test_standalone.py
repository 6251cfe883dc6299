"""AdamS outside Megatron: a plain PyTorch loop, a Hugging Face Trainer, an Accelerate script."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_adams import AdamS

VOCAB_SIZE, SEQ_LENGTH = 17, 12


def tokens(num_samples: int, seed: int = 0) -> torch.Tensor:
    """Return (num_samples, SEQ_LENGTH) int64: counting by 3, which a model can learn entirely."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCAB_SIZE, (num_samples, 1), generator=generator)
    return (start + 3 * torch.arange(SEQ_LENGTH)) % VOCAB_SIZE


class NextToken(nn.Module):
    """A small model with an embedding, a bias, a norm and a tied output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, 32)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.rnn = nn.GRU(32, 32, batch_first=True)
        self.norm = nn.LayerNorm(32)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.rnn(self.embedding(batch[:, :-1]))[0])
        logits = hidden @ self.embedding.weight.t()
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def assert_equal_models(first: nn.Module, second: nn.Module) -> None:
    for (name, param), twin in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(param, twin), name


def test_plain_loop_learns_and_resumes_bit_for_bit(tmp_path):
    def build():
        torch.manual_seed(0)
        model = NextToken()
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        optimizer = AdamS(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=3e-3,
            weight_decay=0.1,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=120)
        return model, optimizer, schedule

    def train(model, optimizer, schedule, steps):
        losses = []
        for step in steps:
            optimizer.zero_grad()
            loss = model(tokens(32, seed=step))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return losses

    whole = build()
    losses = train(*whole, range(120))
    # Uniform guessing is ln 17 = 2.83; each token follows from the one before it.
    assert losses[-1] < 0.3, losses[::10]

    stopped = build()
    train(*stopped, range(50))
    torch.save([part.state_dict() for part in stopped], tmp_path / "checkpoint.pt")
    resumed = build()
    for part, state in zip(resumed, torch.load(tmp_path / "checkpoint.pt"), strict=True):
        part.load_state_dict(state)
    assert train(*resumed, range(50, 120)) == losses[50:]
    assert_equal_models(resumed[0], whole[0])


@pytest.mark.parametrize("given", ["optimizer", "class"])
def test_hugging_face_trainer_resumes_from_its_checkpoint(tmp_path, given):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    data = [{"input_ids": row, "labels": row} for row in tokens(64)]

    def build(folder, seed):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(
            vocab_size=VOCAB_SIZE, n_positions=SEQ_LENGTH, n_embd=16, n_layer=1, n_head=2,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
        options = {"lr": 1e-3, "weight_decay": 0.1}
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder), per_device_train_batch_size=8, max_steps=6,
            save_steps=3, logging_steps=1, report_to=[], use_cpu=True, seed=1, disable_tqdm=True,
        )  # fmt: skip
        chosen = (
            {"optimizers": (AdamS(model.parameters(), **options), None)}
            if given == "optimizer"
            else {"optimizer_cls_and_kwargs": (AdamS, options)}
        )
        return transformers.Trainer(model=model, args=arguments, train_dataset=data, **chosen)

    def losses(trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = build("whole", seed=0)
    whole.train()
    resumed = build("resumed", seed=99)  # its weights and state come from the checkpoint
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(losses(whole)) == 6
    assert losses(resumed) == losses(whole)
    assert_equal_models(resumed.model, whole.model)
    state = torch.load(tmp_path / "whole" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert {key for entry in state["state"].values() for key in entry} == {"exp_avg"}
    assert {group["step"] for group in state["param_groups"]} == {3}


def test_accelerate_script_saves_and_resumes(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

    def build(seed):
        torch.manual_seed(seed)
        model = NextToken()
        return accelerator.prepare(model, AdamS(model.parameters(), lr=3e-3, weight_decay=0.1))

    def train(model, optimizer, steps):
        for step in steps:
            with accelerator.accumulate(model):
                accelerator.backward(model(tokens(8, seed=step)))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    whole, whole_optimizer = build(seed=0)
    train(whole, whole_optimizer, range(6))
    accelerator.save_state(tmp_path / "state")
    train(whole, whole_optimizer, range(6, 12))
    # 12 batches, accumulated by 2
    assert whole_optimizer.param_groups[0]["step"] == 6

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    resumed, resumed_optimizer = build(seed=99)
    accelerator.load_state(tmp_path / "state")
    train(resumed, resumed_optimizer, range(6, 12))
    assert resumed_optimizer.param_groups[0]["step"] == 6
    assert_equal_models(resumed, whole)


@pytest.mark.parametrize(
    ("script", "pattern"),
    [("minimal.py", r"loss (\d\.\d+)"), ("trainer.py", r"'loss': '?(\d\.\d+)")],
)
def test_example_learns(tmp_path, monkeypatch, capfd, script, pattern):
    if script == "trainer.py":
        pytest.importorskip("transformers", reason="transformers is not installed")
        pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / script), run_name="__main__")
    said = capfd.readouterr().out
    losses = [float(loss) for loss in re.findall(pattern, said)]
    assert len(losses) == 4, said
    assert losses[-1] < losses[0] / 20, losses
