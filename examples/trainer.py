"""AdamS in a Hugging Face Trainer: a small GPT-2 learns to count by 3.

It downloads nothing.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from megatron_adams import AdamS

torch.manual_seed(0)
rows = (torch.randint(17, (512, 1)) + 3 * torch.arange(12)) % 17
data = [{"input_ids": row, "labels": row} for row in rows]
config = GPT2Config(
    vocab_size=17,
    n_positions=12,
    n_embd=64,
    n_layer=2,
    n_head=2,
    bos_token_id=0,
    eos_token_id=0,
)
model = GPT2LMHeadModel(config)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="runs/trainer",
        per_device_train_batch_size=32,
        max_steps=200,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
    ),
    train_dataset=data,
    optimizer_cls_and_kwargs=(AdamS, {"lr": 1e-3, "weight_decay": 0.1}),
)
trainer.train()
