"""What a step is timed on: one tensor, or a list of tensors as in a model."""

from typing import NamedTuple


class Workload(NamedTuple):
    """Tensors of one kind.

    Attributes:
        name: its name in tables and plots.
        numels: the number of elements of each tensor.
    """

    name: str
    numels: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements of all tensors together."""
        return sum(self.numels)

    @property
    def is_list(self) -> bool:
        return len(self.numels) > 1


def one_tensor(numel: int) -> Workload:
    return Workload(size_name(numel), (numel,))


def size_name(numel: int) -> str:
    """Return a number of elements in short: 16k, 124.4M, 1G."""
    for name, factor in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if numel >= factor:
            return f"{numel / factor:.4g}{name}"
    return str(numel)


def shrunk(workload: Workload, divisor: int) -> Workload:
    """Divide the size of every tensor. Multiples of 16 stay multiples of 16."""
    if divisor == 1:
        return workload
    numels = [
        max(16, numel // divisor // 16 * 16) if numel % 16 == 0 else max(1, numel // divisor)
        for numel in workload.numels
    ]
    if not workload.is_list:
        return one_tensor(numels[0])
    return Workload(f"{workload.name}, 1/{divisor} of the size", tuple(numels))


def gpt2_numels(
    *, hidden_size: int = 768, num_layers: int = 12, num_positions: int = 1024, vocab: int = 50257
) -> tuple[int, ...]:
    """Return the elements of each parameter of GPT-2 with tied embeddings. Default: 124M."""
    h = hidden_size
    norm = (h, h)
    attention = (3 * h * h, 3 * h, h * h, h)
    mlp = (4 * h * h, 4 * h, 4 * h * h, h)
    layer = (*norm, *attention, *norm, *mlp)
    return (vocab * h, num_positions * h, *(layer * num_layers), *norm)


def llama_shard_numels(
    *,
    hidden_size: int = 4096,
    num_layers: int = 32,
    ffn_hidden_size: int = 14336,
    num_heads: int = 32,
    num_query_groups: int = 8,
    vocab: int = 128256,
    tensor_parallel: int = 8,
    data_parallel: int = 64,
) -> tuple[int, ...]:
    """Return how many elements of each Llama parameter a rank holds. Default: 8B on 512 GPUs.

    Tensor parallelism divides the matrices. Data parallelism divides every tensor, as FSDP does.
    """
    h = hidden_size
    kv = h // num_heads * num_query_groups
    matrices = (h * h, h * kv, h * kv, h * h, *(3 * (h * ffn_hidden_size,)))
    layer = (h, *(numel // tensor_parallel for numel in matrices), h)
    embedding = vocab * h // tensor_parallel
    return tuple(
        -(-numel // data_parallel) for numel in (embedding, *(layer * num_layers), h, embedding)
    )


GPT2 = Workload("GPT-2 124M, 148 tensors", gpt2_numels())
MANY = Workload("1,000 tensors of 64K", (65536,) * 1000)
LLAMA = Workload("Llama 8B on TP 8, DP 64, 291 tensors", llama_shard_numels())
LISTS = (GPT2, MANY, LLAMA)
