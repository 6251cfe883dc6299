"""The sub-words of an encoder: trained on its text, kept as a `tokenizer.json` of Hugging Face's.

The special tokens have fixed ids: [PAD] is 0, as Megatron's masked dataset takes it to be. Nothing
here imports Megatron."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Their ids are their places."""

PAD, UNKNOWN, FIRST, LAST, MASK = range(len(SPECIAL_TOKENS))

KINDS = ("wordpiece", "bpe")

MIN_SIZES = {"wordpiece": 20, "bpe": 256 + len(SPECIAL_TOKENS)}
"""Of a vocabulary: a byte-level BPE has a token for every byte."""

COVERAGE = 0.9999
"""The share of a text's characters that a WordPiece has a piece for; the others are [UNK]."""

FILE = "tokenizer.json"


def _alphabet(texts: list[str], limit: int) -> list[str]:
    """Return the most frequent characters that make up COVERAGE of a text, at most `limit`."""
    counts = Counter(char for text in texts for char in unicodedata.normalize("NFKC", text))
    counts = Counter({char: n for char, n in counts.items() if not char.isspace()})
    needed, alphabet = COVERAGE * counts.total(), []
    for char, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]:
        if needed <= 0:
            break
        alphabet.append(char)
        needed -= count
    return sorted(alphabet)


def _train_wordpiece(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a WordPiece that is the same for the same text.

    The trainer numbers the pieces inside words in the order of a hash table, and breaks ties by
    their numbers. They are given as special tokens, whose numbers are their places, and are
    ordinary pieces of the tokenizer that is made of the result.
    """
    alphabet = _alphabet(texts, vocab_size // 4)
    inside = [f"##{char}" for char in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *inside],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    trained = _wordpiece({})
    trained.train_from_iterator(texts, trainer)
    tokenizer = _wordpiece(trained.get_vocab())
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _wordpiece(vocab: dict[str, int]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _train_bpe(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE: it has a token for every byte, and never needs [UNK]."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


_TRAINERS = {"wordpiece": _train_wordpiece, "bpe": _train_bpe}


def train(texts: Iterable[str], vocab_size: int, kind: str = "wordpiece") -> tokenizers.Tokenizer:
    """Train a tokenizer; the same text gives the same one.

    Args:
        vocab_size: with the special tokens; a small text gives fewer.
        kind: "wordpiece", or "bpe" (byte-level).

    Raises:
        ValueError: the kind is not known, or vocab_size has no room beside the special tokens.
    """
    if kind not in KINDS:
        raise ValueError(f"vocabulary {kind!r}: must be one of {', '.join(KINDS)}")
    smallest = MIN_SIZES[kind]
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size}: must be at least {smallest} for {kind}")
    tokenizer = _TRAINERS[kind](list(texts), vocab_size)
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
