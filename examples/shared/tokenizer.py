"""A dataset's tokenizer: trained on its text, or taken from files of the user's.

It is kept in the dataset's folder, where Megatron finds it. Nothing here imports Megatron."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from shared.command import Flags

FOLDER = "tokenizer"
"""Where a dataset has it."""

END_OF_DOCUMENT = "<|endoftext|>"
"""What a trained tokenizer and GPT-2's call it."""

ENCODER = "encoder.json"
"""What a preparation encodes with; the dataset does not need it."""

_SENTENCEPIECE = "tokenizer.model"
# What a Hugging Face tokenizer may consist of; a folder can hold a model's weights, too.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
# GPT-2's, as Hugging Face and as OpenAI call them.
_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


@dataclass(frozen=True)
class TokenizerRecord:
    """A tokenizer in a folder.

    Attributes:
        description: what it is and where it came from.
        vocab_size: ids are smaller.
        end_of_document: the id that is put after every document.
        flags: Megatron's; tokenizer-model is relative to the dataset's folder.
    """

    description: str
    vocab_size: int
    end_of_document: int
    flags: Flags


class Encoder:
    """Texts to ids, without Megatron and without any special token.

    Args:
        folder: of the dataset that is prepared.
    """

    def __init__(self, folder: Path) -> None:
        self._fast: tokenizers.Tokenizer | None = None
        if (folder / ENCODER).exists():
            self._fast = tokenizers.Tokenizer.from_file(str(folder / ENCODER))
            # A text that contains the name of a special token is text.
            self._fast.encode_special_tokens = True
        else:
            from sentencepiece import SentencePieceProcessor

            self._sentencepiece = SentencePieceProcessor(str(folder / FOLDER / _SENTENCEPIECE))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        if self._fast is not None:
            return [item.ids for item in self._fast.encode_batch_fast(texts, False, False)]
        return [list(ids) for ids in self._sentencepiece.encode(texts)]


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _save(tokenizer: tokenizers.Tokenizer, folder: Path, description: str) -> TokenizerRecord:
    """Write a tokenizer whose documents end with END_OF_DOCUMENT, for Hugging Face's class."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(folder / "tokenizer.json", folder.parent / ENCODER)
    return TokenizerRecord(
        description=description,
        vocab_size=tokenizer.get_vocab_size(),
        end_of_document=tokenizer.token_to_id(END_OF_DOCUMENT),
        flags={"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": FOLDER},
    )


def train(texts: Iterable[str], vocab_size: int, folder: Path) -> TokenizerRecord:
    """Train a byte-level BPE, GPT-2's kind: it has a token for every byte, so that no text is lost.

    A small text has fewer pairs to merge than `vocab_size` asks for; the tokenizer is then smaller.
    """
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _save(tokenizer, folder, "byte-level BPE, trained on the training text")


def take(source: Path, folder: Path) -> TokenizerRecord:
    """Copy a user's tokenizer into a folder.

    Args:
        source: a folder with tokenizer.json (Hugging Face), with vocab.json and merges.txt (GPT-2)
            or with tokenizer.model (SentencePiece, Llama 2); or one of tokenizer.json and *.model.
        folder: an empty one, in the dataset's. What `Encoder` reads is put beside it.

    Raises:
        ValueError: there is none of these, or it cannot be read, or it has no end of document.
    """
    if source.is_file() and source.suffix == ".model":
        return _take_sentencepiece(source, folder)
    if source.is_file() and source.name == "tokenizer.json":
        source = source.parent
    if (source / "tokenizer.json").is_file():
        return _take_hugging_face(source, folder)
    for vocab, merges in _GPT2_FILES:
        if (source / vocab).is_file() and (source / merges).is_file():
            return _take_gpt2(source / vocab, source / merges, folder)
    if (source / _SENTENCEPIECE).is_file():
        return _take_sentencepiece(source / _SENTENCEPIECE, folder)
    raise ValueError(
        f"--tokenizer {source}: no tokenizer there; give a folder with tokenizer.json, with "
        "vocab.json and merges.txt (GPT-2) or with tokenizer.model (Llama 2), or leave it out to "
        "train one on the text"
    )


def _take_hugging_face(source: Path, folder: Path) -> TokenizerRecord:
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    # Megatron's HuggingFaceTokenizer loads it in the same way. What encodes here is what is kept.
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        loaded.backend_tokenizer.save(str(folder.parent / ENCODER))
    except Exception as exc:
        raise ValueError(
            f"--tokenizer {source}: Hugging Face's AutoTokenizer cannot load it ({exc}); give a "
            "folder with tokenizer.json and tokenizer_config.json"
        ) from exc
    if loaded.eos_token_id is None:
        raise ValueError(
            f"--tokenizer {source}: names no eos_token, which ends a document; add it to its "
            "tokenizer_config.json"
        )
    return TokenizerRecord(
        description=f"from {source}",
        vocab_size=len(loaded),
        end_of_document=loaded.eos_token_id,
        flags={"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": FOLDER},
    )


def _take_gpt2(vocab: Path, merges: Path, folder: Path) -> TokenizerRecord:
    try:
        tokenizer = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as exc:
        raise ValueError(
            f"--tokenizer {vocab.parent}: {vocab.name} and {merges.name} cannot be read ({exc})"
        ) from exc
    if tokenizer.token_to_id(END_OF_DOCUMENT) is None:
        raise ValueError(f"--tokenizer {vocab}: has no {END_OF_DOCUMENT}, which ends a document")
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return _save(tokenizer, folder, f"from {vocab.parent}")


def _take_sentencepiece(source: Path, folder: Path) -> TokenizerRecord:
    from sentencepiece import SentencePieceProcessor

    target = folder / _SENTENCEPIECE
    shutil.copyfile(source, target)
    try:
        loaded = SentencePieceProcessor(str(target))
    except Exception as exc:
        raise ValueError(f"--tokenizer {source}: is no SentencePiece model ({exc})") from exc
    if loaded.eos_id() < 0:
        raise ValueError(f"--tokenizer {source}: has no </s>, which ends a document")
    return TokenizerRecord(
        description=f"from {source}",
        vocab_size=loaded.vocab_size(),
        end_of_document=loaded.eos_id(),
        flags={
            "tokenizer-type": "Llama2Tokenizer",
            "tokenizer-model": f"{FOLDER}/{_SENTENCEPIECE}",
        },
    )
