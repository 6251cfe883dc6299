"""Build verl's optimizer from adams.yaml with verl's own code, in one CPU process.

python check.py

It needs verl and Megatron-Core, and no GPU. It starts neither Ray nor a trainer.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_adams.cpu_rehearsal import install

FOLDER = Path(__file__).resolve().parent


def enter_world() -> None:
    """Make this process the only rank of a job, with what Ray would give verl's workers."""
    sys.path.insert(0, str(FOLDER))
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "use_adams"
    install()  # before anything imports Megatron
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def make_model() -> torch.nn.Module:
    """Return a GPT of one layer in Megatron's DistributedDataParallel."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    shape = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2, bf16=True)
    model = GPTModel(shape, get_gpt_layer_local_spec(), vocab_size=64, max_sequence_length=16)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    return DistributedDataParallel(shape, ddp, model.bfloat16())


def verl_config() -> Any:
    """Return the configuration that verl's trainer has from adams.yaml."""
    import verl
    from hydra import compose, initialize_config_dir

    search_path = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(FOLDER), version_base=None):
        return compose("adams", overrides=[f"hydra.searchpath=[file://{search_path}]"])


def main() -> None:
    """Build the optimizer as verl's MegatronEngine does, take a step, and say what it is."""
    enter_world()
    import megatron.core
    import verl
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.megatron.optimizer import get_megatron_optimizer, init_megatron_optim_config

    model = make_model()
    config = omega_conf_to_dataclass(verl_config().actor_rollout_ref.actor.optim)
    optimizer = get_megatron_optimizer([model], init_megatron_optim_config(config))
    for param in model.parameters():
        param.main_grad.normal_()
    optimizer.step()
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    for inner in {part.optimizer for part in parts}:
        group = inner.param_groups[0]
        print(f"verl {verl.__version__}, megatron-core {megatron.core.__version__}")
        print(f"optimizer: {type(inner).__module__}.{type(inner).__name__}")
        print(f"state: {sorted({name for state in inner.state.values() for name in state})}")
        print(f"lr {group['lr']}, betas {group['betas']}, weight decay {group['weight_decay']}")


if __name__ == "__main__":
    main()
