"""Build verl's optimizer from adams.yaml with verl's own code, on one CPU process.

python check.py

It needs verl and Megatron-Core, and no GPU. It builds no trainer, no rollout and no Ray.
"""

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))
os.environ["VERL_USE_EXTERNAL_MODULES"] = "use_adams"
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "RANK": "0", "WORLD_SIZE": "1"}

import torch

from megatron_adams.cpu_rehearsal import install

install()  # before anything imports Megatron

import verl
from hydra import compose, initialize_config_dir
from megatron.core import __version__ as megatron_version
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.megatron.optimizer import get_megatron_optimizer, init_megatron_optim_config

torch.distributed.init_process_group("gloo")
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)

shape = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2, bf16=True)
model = GPTModel(shape, get_gpt_layer_local_spec(), vocab_size=64, max_sequence_length=16)
model = DistributedDataParallel(
    shape,
    DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
    model.bfloat16(),
)

verl_config = Path(verl.__file__).parent / "trainer" / "config"
with initialize_config_dir(str(FOLDER), version_base=None):
    config = compose("adams", overrides=[f"hydra.searchpath=[file://{verl_config}]"])
# As verl's MegatronEngine._build_optimizer does.
optim = omega_conf_to_dataclass(config.actor_rollout_ref.actor.optim)
optimizer = get_megatron_optimizer([model], init_megatron_optim_config(optim))

for param in model.parameters():
    param.main_grad.normal_()
optimizer.step()
[inner] = {each.optimizer for each in getattr(optimizer, "chained_optimizers", [optimizer])}
[state] = {tuple(sorted(each)) for each in inner.state.values()}
group = inner.param_groups[0]
print(f"verl {verl.__version__}, megatron-core {megatron_version}: {type(optimizer).__name__}")
print(f"{type(inner).__module__}.{type(inner).__name__}, state {state}")
print(f"lr {group['lr']}, betas {group['betas']}, weight_decay {group['weight_decay']}")
