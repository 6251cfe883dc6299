"""The sub-words of an encoder: trained on its text, kept as a `tokenizer.json` of Hugging Face's.

The special tokens have fixed ids: [PAD] is 0, as Megatron's masked dataset takes it to be. Nothing
here imports Megatron."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Their ids are their places."""

PAD, UNKNOWN, FIRST, LAST, MASK = range(len(SPECIAL_TOKENS))

KINDS = ("wordpiece", "bpe")

FILE = "tokenizer.json"


def _wordpiece() -> tuple[tokenizers.Tokenizer, trainers.Trainer]:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(show_progress=False)


def _bpe() -> tuple[tokenizers.Tokenizer, trainers.Trainer]:
    """Byte-level: it has a token for every byte, and never needs [UNK]."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    return tokenizer, trainer


def train(texts: Iterable[str], vocab_size: int, kind: str = "wordpiece") -> tokenizers.Tokenizer:
    """Train a tokenizer.

    Args:
        vocab_size: with the special tokens; a small text gives fewer.
        kind: "wordpiece", or "bpe" (byte-level).

    Raises:
        ValueError: the kind is not known, or vocab_size has no room beside the special tokens.
    """
    if kind not in KINDS:
        raise ValueError(f"vocabulary {kind!r}: must be one of {', '.join(KINDS)}")
    if vocab_size < 2 * len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size={vocab_size}: must be at least {2 * len(SPECIAL_TOKENS)}")
    tokenizer, trainer = _wordpiece() if kind == "wordpiece" else _bpe()
    trainer.vocab_size = vocab_size
    trainer.special_tokens = [
        tokenizers.AddedToken(token, special=True) for token in SPECIAL_TOKENS
    ]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", FIRST), ("[SEP]", LAST)]
    )
    return tokenizer


def load(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json, or the one in a folder.

    `encode(text)` puts [CLS] before and [SEP] after a text; a special token's name in a text is
    text. Nothing is truncated or padded.

    Raises:
        ValueError: it cannot be read, or its special tokens have other ids.
    """
    path = path / FILE if path.is_dir() else path
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as exc:  # tokenizers raises nothing narrower
        raise ValueError(
            f"tokenizer {path}: cannot be read ({exc}); give the tokenizer.json that "
            "prepare_text.py has written, or a folder with it"
        ) from exc
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    if ids != list(range(len(SPECIAL_TOKENS))):
        found = ", ".join(f"{t}={i}" for t, i in zip(SPECIAL_TOKENS, ids, strict=True))
        raise ValueError(
            f"tokenizer {path}: has {found}; {', '.join(SPECIAL_TOKENS)} must have the ids 0 to "
            f"{len(SPECIAL_TOKENS) - 1}; train one with prepare_text.py"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def digest(path: Path) -> str:
    """Return a hash of what a tokenizer.json does, whatever the file's layout is."""
    return hashlib.sha256(load(path).to_str().encode()).hexdigest()
