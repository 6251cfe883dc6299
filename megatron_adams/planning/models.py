"""Models by name, as Megatron's flags, for `megatron-adams plan --model`.

Sources: GPT-2, Radford et al. 2019, Table 2 (sizes as of the released checkpoints); GPT-3, Brown
et al. 2020, arXiv:2005.14165, Table 2.1; Llama-2, Touvron et al. 2023, arXiv:2307.09288 and the
released config.json; llama2-1b is TinyLlama, Zhang et al. 2024, arXiv:2401.02385. Batch sizes are
those of the recipes in examples/, and of GPT-3's paper.
"""

import difflib
import shlex

_COMMON = (
    "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
    "--tokenizer-type NullTokenizer --lr 3e-4 --train-iters 1000 --clip-grad 1.0 "
    "--attention-dropout 0 --hidden-dropout 0 --recompute-activations"
)
_GPT = "--position-embedding-type learned_absolute --normalization LayerNorm"
_LLAMA = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights"
)
_GPT_VOCAB, _LLAMA_VOCAB = 50257, 32000


def _flags(
    family: str,
    vocab_size: int,
    *,
    layers: int,
    hidden: int,
    heads: int,
    seq: int,
    micro_batch: int = 1,
    more: str = "",
) -> str:
    # NullTokenizer adds the end of a document to the vocabulary.
    return (
        f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} {more} "
        f"--seq-length {seq} --max-position-embeddings {seq} --micro-batch-size {micro_batch} "
        f"--vocab-size {vocab_size - 1} {family} {_COMMON}"
    )


def _gpt2(layers: int, hidden: int, heads: int, micro_batch: int) -> str:
    return _flags(
        _GPT,
        _GPT_VOCAB,
        layers=layers,
        hidden=hidden,
        heads=heads,
        seq=1024,
        micro_batch=micro_batch,
    )


def _llama2(
    layers: int, hidden: int, heads: int, ffn: int, groups: int | None = None, seq: int = 4096
) -> str:
    grouped = f" --group-query-attention --num-query-groups {groups}" if groups else ""
    return _flags(
        _LLAMA,
        _LLAMA_VOCAB,
        layers=layers,
        hidden=hidden,
        heads=heads,
        seq=seq,
        more=f"--ffn-hidden-size {ffn}{grouped}",
    )


MODELS = {
    "gpt2-124m": _gpt2(12, 768, 12, micro_batch=8),
    "gpt2-350m": _gpt2(24, 1024, 16, micro_batch=8),
    "gpt2-774m": _gpt2(36, 1280, 20, micro_batch=4),
    "gpt2-1.5b": _gpt2(48, 1600, 25, micro_batch=4),
    "llama2-1b": _llama2(22, 2048, 32, 5632, groups=4, seq=2048),
    "llama2-7b": _llama2(32, 4096, 32, 11008),
    "llama2-13b": _llama2(40, 5120, 40, 13824),
    "llama2-70b": _llama2(80, 8192, 64, 28672, groups=8),
    "gpt3-175b": _flags(_GPT, _GPT_VOCAB, layers=96, hidden=12288, heads=96, seq=2048),
}


# Sequences of a step.
_BATCHES = {"gpt2": 480, "llama2": 1024, "gpt3": 1536}


def batch_size(name: str, num_sequences: int) -> int:
    """The sequences of a named model's step, rounded up to a multiple of `num_sequences`."""
    batch = _BATCHES[name.partition("-")[0]]
    return -(-batch // num_sequences) * num_sequences


def model_flags(name: str) -> list[str]:
    """Return Megatron's flags of a named model, but for its layout and --global-batch-size.

    Raises:
        ValueError: unknown; with the names that are known.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.6)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"--model {name} is not known{hint}: must be one of {', '.join(MODELS)}; for another, "
            f"give Megatron's flags after --"
        )
    return shlex.split(MODELS[name])
