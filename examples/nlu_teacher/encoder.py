"""The encoder: its shape, how it is built, and how a saved one is loaded on one process.

A model's folder is what `pretrain_encoder.py --save` and `distil_encoder.py --save` write:

    encoder.json, tokenizer.json, latest_checkpointed_iteration.txt, iter_0000100/ ...

Importing this module does not import Megatron, so that `load_encoder` can prepare a machine without
a GPU for it first."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import vocabulary

if TYPE_CHECKING:
    from encoder_model import Encoder

FILE = "encoder.json"
_LATEST = "latest_checkpointed_iteration.txt"

POSITIONS = ("learned_absolute", "rope")


@dataclass(frozen=True)
class Shape:
    """The sizes of an encoder.

    Attributes:
        max_length: tokens of a sequence at most, with [CLS] and [SEP].
        position: "learned_absolute", or "rope".
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    max_length: int
    position: str = "learned_absolute"

    def num_params_without_embeddings(self) -> int:
        """Count the parameters of the layers and of the last LayerNorm."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        attention = 4 * hidden * hidden + 4 * hidden
        mlp = 2 * hidden * ffn + hidden + ffn
        return self.num_layers * (attention + mlp + 4 * hidden) + 2 * hidden


@dataclass(frozen=True)
class Description:
    """The contents of an encoder.json.

    Attributes:
        vocabulary: `vocabulary.digest` of the tokenizer that it reads.
    """

    shape: Shape
    vocab_size: int
    vocabulary: str

    def write(self, folder: Path) -> None:
        """Write encoder.json into a folder, where other ranks may read it meanwhile."""
        unfinished = folder / f".{FILE}.unfinished"
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n")
        unfinished.rename(folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> "Description":
        """Read a folder's encoder.json.

        Raises:
            ValueError: there is none, or it is another one.
        """
        path = folder / FILE
        try:
            record = json.loads(path.read_text())
            shape = Shape(**record.pop("shape"))
            return cls(shape=shape, **record)
        except (OSError, ValueError, TypeError, KeyError) as exc:
            raise ValueError(
                f"{path}: is no description of an encoder ({type(exc).__name__}: {exc}); give a "
                "folder that pretrain_encoder.py or distil_encoder.py has saved to"
            ) from exc


def has_checkpoint(folder: Path) -> bool:
    """Say whether a checkpoint of any kind has been saved to a folder."""
    return (folder / _LATEST).is_file()


def checkpoint_folder(folder: Path) -> Path:
    """Return the last checkpoint of a model's folder.

    Raises:
        ValueError: there is none, or it is not in the format "torch_dist".
    """
    try:
        step = int((folder / _LATEST).read_text())
    except (OSError, ValueError) as exc:
        raise ValueError(
            f"{folder}: has no finished checkpoint ({_LATEST} is missing or no number); train "
            "the model first"
        ) from exc
    checkpoint = folder / f"iter_{step:07d}"
    if not (checkpoint / "metadata.json").is_file():
        raise ValueError(
            f"{checkpoint}: is no checkpoint of the format torch_dist, which every layout can "
            "load; save it again with --ckpt-format torch_dist"
        )
    return checkpoint


def transformer_config(shape: Shape, *, dropout: float = 0.0, **settings: Any) -> Any:
    """Return Megatron's TransformerConfig of an encoder that is not built from command-line flags.

    Args:
        dropout: of attention and of hidden states, in training.
        settings: more fields of it.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = {
        "attention_dropout": dropout,
        "hidden_dropout": dropout,
        "use_cpu_initialization": True,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        **settings,
    }
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        ffn_hidden_size=shape.ffn_hidden_size,
        **settings,
    )


def build_encoder(shape: Shape, vocab_size: int, **options: Any) -> "Encoder":
    """Build an encoder of Megatron-Core's BertModel, with random weights.

    Args:
        vocab_size: tokens that have a meaning.
        options: of `encoder_model.Encoder`: config, padded_vocab_size, pre_process, post_process,
            vp_stage, transformer_engine, projection_size.
    """
    from encoder_model import Encoder

    options.setdefault("config", None)
    if options["config"] is None:
        options["config"] = transformer_config(shape)
    return Encoder(shape, vocab_size, **options)


def start_single_process(seed: int = 1234) -> None:
    """Start torch.distributed and Megatron's groups in this process alone, if nobody has.

    Without a GPU, Megatron then runs as in a CPU rehearsal; it must not be imported before.
    """
    if torch.distributed.is_initialized():
        return
    if not torch.cuda.is_available():
        from megatron_adams import cpu_rehearsal

        cpu_rehearsal.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    # Nobody is spoken to, so that the backend need not be a fast one.
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(seed)


def load_weights(model: "Encoder", folder: Path) -> None:
    """Load the last checkpoint of a model's folder into a model; every rank calls this.

    The checkpoint may have been saved in another parallel layout.

    Raises:
        ValueError: there is no checkpoint.
    """
    from megatron.core import dist_checkpointing, parallel_state

    checkpoint = checkpoint_folder(folder)
    metadata = dist_checkpointing.load_content_metadata(str(checkpoint)) or {}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    wanted = {"model": model.sharded_state_dict(metadata={**metadata, "dp_cp_group": group})}
    # A teacher is on every pipeline stage while it is loaded. That is no mistake, which Megatron
    # would look for: it takes the second stage's copy for a part of another model.
    loaded = dist_checkpointing.load(wanted, str(checkpoint), validate_access_integrity=False)
    model.load_state_dict(loaded["model"])


def load_encoder(
    folder: Path, *, dropout: float = 0.0
) -> tuple["Encoder", Shape, tokenizers.Tokenizer]:
    """Load a saved encoder on this process alone, for fine-tuning or export.

    Args:
        folder: a model's. Its checkpoint may have been saved in any parallel layout.
        dropout: in training mode.

    Returns:
        The model in fp32 and in evaluation mode, its shape, and its tokenizer.

    Raises:
        ValueError: the folder holds no finished model, or a tokenizer of another model.
    """
    description = Description.read(folder)
    checkpoint_folder(folder)
    tokenizer = vocabulary.load(folder)
    if vocabulary.digest(folder) != description.vocabulary:
        raise ValueError(
            f"{folder / vocabulary.FILE}: is not the tokenizer that the model was trained with; "
            "put that one back, from the folder of its data"
        )
    start_single_process()
    config = transformer_config(description.shape, dropout=dropout)
    model = build_encoder(description.shape, description.vocab_size, config=config)
    load_weights(model, folder)
    return model.eval(), description.shape, tokenizer
