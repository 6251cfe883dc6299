"""What pretraining and distillation share: flags, data, batches, and the model's folder.

It imports Megatron, and is imported by scripts that `python -m megatron_adams.launch` runs."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import encoder
import torch
import vocabulary
from encoder import Description, Shape
from encoder_model import Encoder
from masked_dataset import (
    NO_LABEL,
    DatasetTokenizer,
    EncoderDataset,
    MadeUpDataset,
    dataset_config,
)
from megatron.core import mpu, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers, print_rank_0
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

# Flags that ask for another model or another kind of batch, and what they would change.
_UNSUPPORTED = {
    "sequence_parallel": "the masked-LM head reads whole sequences",
    "swiglu": "the encoder's layers are BERT's",
    "untie_embeddings_and_output_weights": "the head's weight is the embedding's",
    "num_experts": "the encoder is dense",
}
_TRIM_MULTIPLE = 8

Report = dict[str, Tensor]


def add_tokenizer_argument(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add --encoder-tokenizer."""
    parser.add_argument(
        "--encoder-tokenizer",
        type=Path,
        help="tokenizer.json of the datasets, or a folder with it; not with --mock-data",
    )
    return parser


def _vocab_size(argv: list[str]) -> int | None:
    """Return the vocabulary's size, which Megatron wants to know before it reads its flags."""
    parser = add_tokenizer_argument(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    path = parser.parse_known_args(argv)[0].encoder_tokenizer
    return None if path is None else vocabulary.load(path).get_vocab_size()


def parse_args(
    add_arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
) -> argparse.Namespace:
    """Read Megatron's flags and an encoder's, and check them.

    Args:
        add_arguments: adds the script's own.

    Raises:
        ValueError: flags that an encoder cannot be trained with.
    """

    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_arguments(add_tokenizer_argument(parser))

    # NullTokenizer is Megatron's name for: the dataset holds ids.
    defaults: dict[str, Any] = {"tokenizer_type": "NullTokenizer"}
    size = _vocab_size(sys.argv[1:])
    if size is not None:
        defaults["vocab_size"] = size
    args: argparse.Namespace = parse_and_validate_args(add, args_defaults=defaults)
    refuse_unsupported_flags(args)
    if (args.encoder_tokenizer is None) != args.mock_data:
        raise ValueError(
            "--encoder-tokenizer: must be given for a dataset of prepare_text.py, and not with "
            "--mock-data, which has no words"
        )
    return args


def refuse_unsupported_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that need another model or batch."""
    for name, reason in _UNSUPPORTED.items():
        if getattr(args, name, None):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: an encoder is not trained with it: {reason}; leave it out")
    if args.bias_gelu_fusion:
        raise ValueError(
            "--no-bias-gelu-fusion: must be given for an encoder: Megatron's fused GELU is an "
            "approximation, and fine-tuning and the exports compute GELU itself"
        )
    if args.context_parallel_size > 1:
        raise ValueError(
            f"--context-parallel-size {args.context_parallel_size}: must be 1 for an encoder, "
            "whose attention is not divided; leave it out"
        )


def shape_of(args: argparse.Namespace) -> Shape:
    """Return the encoder's shape that Megatron's flags ask for."""
    return Shape(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        ffn_hidden_size=args.ffn_hidden_size,
        max_length=args.max_position_embeddings,
        position=args.position_embedding_type,
    )


def description_of(args: argparse.Namespace) -> Description:
    """Return what the model's folder says of the model."""
    path = args.encoder_tokenizer
    digest = "made up" if path is None else vocabulary.digest(path)
    return Description(shape=shape_of(args), vocab_size=args.vocab_size, vocabulary=digest)


def check_folder(folder: Path, expected: Description, flag: str) -> None:
    """Check that a folder holds the model that is trained, or none yet.

    Raises:
        ValueError: it holds a model of another shape or another vocabulary, a checkpoint of
            something else, or one in another format.
    """
    if encoder.has_checkpoint(folder):
        encoder.checkpoint_folder(folder)
    elif not (folder / encoder.FILE).is_file():
        return
    found = Description.read(folder)
    if found.vocabulary != expected.vocabulary or found.vocab_size != expected.vocab_size:
        raise ValueError(
            f"{flag} {folder}: holds a model of another vocabulary ({found.vocab_size} tokens, "
            f"{found.vocabulary[:12]}) than --encoder-tokenizer ({expected.vocab_size} tokens, "
            f"{expected.vocabulary[:12]}); give the tokenizer.json of that folder"
        )
    theirs, ours = dataclasses.asdict(found.shape), dataclasses.asdict(expected.shape)
    differing = [name for name in ours if theirs[name] != ours[name]]
    if differing:
        difference = ", ".join(f"{name} {theirs[name]} and not {ours[name]}" for name in differing)
        raise ValueError(
            f"{flag} {folder}: holds an encoder with {difference}; give the flags of that shape, "
            "or another folder"
        )


def prepare_folders(args: argparse.Namespace) -> None:
    """Check the folders that are loaded and saved, and describe the model in the latter.

    Raises:
        ValueError: one holds another model, or --pretrained-checkpoint holds none.
    """
    expected = description_of(args)
    for name in ("load", "save", "pretrained_checkpoint"):
        folder = getattr(args, name)
        if folder is not None:
            check_folder(Path(folder), expected, f"--{name.replace('_', '-')}")
    if args.pretrained_checkpoint is not None:
        encoder.checkpoint_folder(Path(args.pretrained_checkpoint))
    if args.save is not None and args.rank == 0:
        folder = Path(args.save)
        folder.mkdir(parents=True, exist_ok=True)
        expected.write(folder)
        if args.encoder_tokenizer is not None:
            unfinished = folder / f".{vocabulary.FILE}.unfinished"
            vocabulary.load(args.encoder_tokenizer).save(str(unfinished))
            unfinished.rename(folder / vocabulary.FILE)


def build_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
    projection_size: int | None = None,
) -> Encoder:
    """Build this rank's stage of the encoder that is trained: Megatron's model provider.

    Args:
        projection_size: see `Encoder`.
        pg_collection: Megatron's groups, which BertModel takes from their global place.
    """
    args = get_args()
    return encoder.build_encoder(
        shape_of(args),
        args.vocab_size,
        config=config or core_transformer_config_from_args(args),
        padded_vocab_size=args.padded_vocab_size,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        transformer_engine=args.transformer_impl == "transformer_engine",
        projection_size=projection_size,
    )


def _dataset_tokenizer(args: argparse.Namespace) -> DatasetTokenizer:
    if args.encoder_tokenizer is None:
        pieces = {index: str(index) for index in range(args.vocab_size)}
        return DatasetTokenizer(args.vocab_size, "made up", pieces)
    tokenizer = vocabulary.load(args.encoder_tokenizer)
    pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
    return DatasetTokenizer(len(pieces), vocabulary.digest(args.encoder_tokenizer), pieces)


class Numbered(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset whose samples say their number: the place of what is stored beside them."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.split = getattr(dataset, "split", None) or dataset.index_split

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self._dataset[index]
        return {
            "tokens": sample["tokens"],
            "labels": sample["labels"],
            "number": torch.tensor([int(index)], dtype=torch.int64, device="cpu"),
        }


def is_dataset_built_on_rank(vp_stage: int | None = None) -> bool:
    """Say whether this rank reads data: tp rank 0 of every stage, which needs the padding."""
    return bool(mpu.get_tensor_model_parallel_rank() == 0)


def build_datasets(
    num_samples: list[int], vp_stage: int | None = None, on_every_rank: bool = False
) -> list[Numbered | None]:
    """Build the training, validation and test sets that Megatron's data flags name."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = dataset_config(
        _dataset_tokenizer(args),
        random_seed=args.seed,
        sequence_length=args.seq_length,
        masking_probability=args.mask_prob,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
    )
    print_rank_0("> building the training, validation and test sets ...")
    kind = MadeUpDataset if args.mock_data else EncoderDataset
    build_on_rank = partial(is_dataset_built_on_rank, vp_stage=vp_stage)
    if on_every_rank:
        build_on_rank = partial(bool, True)
    datasets = BlendedMegatronDatasetBuilder(kind, num_samples, build_on_rank, config).build()
    return [None if dataset is None else Numbered(dataset) for dataset in datasets]


# Every rank takes part in building them.
build_datasets.is_distributed = True  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Batch:
    """A micro-batch on this rank's device.

    Attributes:
        tokens: (batch, length) int64.
        padding_mask: (batch, length) int64; 1 for a token.
        positions: (n,) int64; the places with a label in the flattened (batch, length).
        labels: (n,) int64.
        numbers: (batch,) int64; the samples' numbers in their dataset.
    """

    tokens: Tensor
    padding_mask: Tensor
    positions: Tensor
    labels: Tensor
    numbers: Tensor


def make_batch(tokens: Tensor, labels: Tensor, numbers: Tensor, *, trim: bool) -> Batch:
    """Find what is to be told, and cut off columns that are padding in every sample.

    Args:
        tokens, labels: (batch, seq_length) int64, as `EncoderDataset` gives them.
        trim: not with pipeline stages, which tell each other a fixed size.
    """
    padding_mask = (tokens != vocabulary.PAD).long()
    if trim:
        longest = int(padding_mask.sum(dim=1).max())
        length = min(-(-longest // _TRIM_MULTIPLE) * _TRIM_MULTIPLE, tokens.shape[1])
        tokens, labels = tokens[:, :length].contiguous(), labels[:, :length]
        padding_mask = padding_mask[:, :length].contiguous()
    flat = labels.flatten()
    positions = (flat != NO_LABEL).nonzero().squeeze(1)
    return Batch(tokens, padding_mask, positions, flat[positions], numbers.flatten())


def get_batch(data_iterator: Iterator[dict[str, Tensor]] | None) -> Batch:
    """Return the next micro-batch, which tp rank 0 reads for its group."""
    sample = None if data_iterator is None else next(data_iterator)
    keys = ["tokens", "labels", "number"]
    data = tensor_parallel.broadcast_data(keys, sample, torch.int64)
    trim = mpu.get_pipeline_model_parallel_world_size() == 1
    return make_batch(data["tokens"], data["labels"], data["number"], trim=trim)


def run_stage(data_iterator: Iterator[dict[str, Tensor]] | None, model: Any) -> tuple[Batch, Any]:
    """Run the next micro-batch through this rank's stage; return it and the stage's output."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    is_last = get_attr_wrapped_model(model, "post_process")
    return batch, model(batch.tokens, batch.padding_mask, batch.positions if is_last else None)


def check_loss(loss: Tensor) -> None:
    """Have Megatron's rerun machine look at a loss, as the flags ask for."""
    if not get_args().check_for_nan_in_loss_and_grad:
        return
    for rejects, message in ((torch.isnan, "the loss is NaN"), (torch.isinf, "the loss is Inf")):
        get_rerun_state_machine().validate_result(
            result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=True
        )


def report(total: Tensor, count: Tensor) -> Tensor:
    """Return a sum and its count as Megatron's log takes them: it divides after its reduction."""
    return torch.stack([total.detach().float(), count.float()])
