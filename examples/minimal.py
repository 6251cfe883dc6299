"""AdamS in a plain PyTorch loop: a small network learns to sort two numbers."""

import torch

from megatron_adams import AdamS

torch.manual_seed(0)
layers = torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2)
model = torch.nn.Sequential(*layers)
optimizer = AdamS(model.parameters(), lr=3e-3, weight_decay=0.1)

for step in range(301):
    numbers = torch.rand(256, 2)
    loss = torch.nn.functional.mse_loss(model(numbers), numbers.sort(dim=1).values)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.5f}")
