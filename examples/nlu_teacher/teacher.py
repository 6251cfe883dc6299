"""The teacher in a distillation job: frozen, and beside the student on the same ranks.

It is no part of what Megatron wraps, optimizes or saves. Its tensor-parallel size is the student's;
its checkpoint may have another one. It is whole on the last pipeline stage, where the losses are,
and nowhere else: its layers are not divided into stages."""

import argparse
import copy
import hashlib
from pathlib import Path
from typing import Protocol

import encoder
import torch
from encoder import Description
from encoder_model import Encoder
from encoder_training import Batch, description_of
from megatron.training import get_args, print_rank_0
from megatron.training.argument_utils import core_transformer_config_from_args
from torch import Tensor


class Targets(Protocol):
    """What tells a student what to imitate."""

    def __call__(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """Return the teacher's hidden states and its logits for a micro-batch.

        Returns:
            (length, batch, hidden size), or None where they are not to be had; and
            (n, padded_vocab_size / tensor-parallel size).
        """


def check_teacher(folder: Path, args: argparse.Namespace) -> Description:
    """Check that a model can teach in a job.

    Raises:
        ValueError: it has another vocabulary, is shorter than the samples, or cannot be divided
            among the tensor-parallel ranks; or there is no finished model.
    """
    found = Description.read(folder)
    encoder.checkpoint_folder(folder)
    ours = description_of(args).vocabulary
    if (found.vocabulary, found.vocab_size) != (ours, args.vocab_size):
        raise ValueError(
            f"--teacher {folder}: has another vocabulary ({found.vocab_size} tokens, "
            f"{found.vocabulary[:12]}) than --encoder-tokenizer {args.encoder_tokenizer} "
            f"({args.vocab_size} tokens, {ours[:12]}); their logits are of different words: "
            f"prepare the text with --tokenizer {folder}"
        )
    if found.shape.max_length < args.seq_length and found.shape.position != "rope":
        raise ValueError(
            f"--teacher {folder}: has positions for {found.shape.max_length} tokens, and "
            f"--seq-length is {args.seq_length}; prepare the text with --max-length "
            f"{found.shape.max_length}"
        )
    size = args.tensor_model_parallel_size
    if found.shape.num_attention_heads % size:
        raise ValueError(
            f"--teacher {folder}: its {found.shape.num_attention_heads} attention heads cannot be "
            f"divided among --tensor-model-parallel-size {size}; take a divisor of them"
        )
    return found


def _teacher_args(description: Description) -> argparse.Namespace:
    """The job's own flags with the teacher's sizes, and without pipeline stages."""
    args, shape = copy.copy(get_args()), description.shape
    args.num_layers = shape.num_layers
    args.hidden_size = shape.hidden_size
    args.num_attention_heads = args.num_query_groups = shape.num_attention_heads
    args.ffn_hidden_size = shape.ffn_hidden_size
    args.kv_channels = shape.hidden_size // shape.num_attention_heads
    args.pipeline_model_parallel_size = 1
    args.virtual_pipeline_model_parallel_size = None
    args.pipeline_model_parallel_layout = None
    args.decoder_first_pipeline_num_layers = args.decoder_last_pipeline_num_layers = None
    args.perform_initialization = False
    return args


class Teacher:
    """A frozen encoder that is asked for hidden states and logits.

    Args:
        folder: a model's; `check_teacher` has looked at it.
        keep: False on ranks that only take part in loading, and need none of it.

    Every rank makes one: loading is collective.
    """

    def __init__(self, folder: Path, *, keep: bool = True) -> None:
        description = Description.read(folder)
        args = _teacher_args(description)
        config = core_transformer_config_from_args(args)
        config.perform_initialization = False
        # What building draws is not missing from the student's random numbers.
        with torch.random.fork_rng(devices=[]):
            model = encoder.build_encoder(
                description.shape,
                description.vocab_size,
                config=config,
                padded_vocab_size=args.padded_vocab_size,
                transformer_engine=args.transformer_impl == "transformer_engine",
            )
        model.cuda(torch.cuda.current_device())
        model.to(args.params_dtype)
        encoder.load_weights(model, folder)
        self.hidden_size = description.shape.hidden_size
        self.model: Encoder | None = None
        if keep:
            self.model = model.requires_grad_(False).eval()
        size = description.shape.num_params_without_embeddings()
        print_rank_0(f"> loaded the teacher {folder}: {size:,} parameters besides embeddings")

    def __call__(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """See `Targets`."""
        assert self.model is not None
        with torch.no_grad():
            hidden, logits = self.model(batch.tokens, batch.padding_mask, batch.positions)
        return hidden, logits

    def digest(self) -> str:
        """Return a hash of every bit of this rank's parameters."""
        assert self.model is not None
        result = hashlib.sha256()
        for param in self.model.parameters():
            result.update(param.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
        return result.hexdigest()
