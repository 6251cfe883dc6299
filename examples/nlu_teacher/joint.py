"""The model for both tasks: an encoder with a head for the intent and one for the slots.

A model's folder has nlu.json (shape and head), labels.json, tokenizer.json and model.safetensors.
Like encoder.py, this module does not import Megatron by itself.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import encoder
import tokenizers
import torch
import vocabulary
from labels import Encoded, LabelSet, Tagged, encode, spoken_words
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from encoder_model import Encoder

POOLINGS = ("first", "mean")
# The masked-LM head reads no label here; only its decoder, the embedding, is used.
UNUSED = ("encoder.lm_head.", "encoder.output_layer.", "encoder.hidden_projection.")


@dataclass(frozen=True)
class Batch:
    """Utterances of one pass.

    Attributes:
        ids: (batch, length) int64, padded with [PAD].
        mask: (batch, length) int64; 1 for a sub-word, 0 for padding.
    """

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, encoded: Sequence[Encoded], device: torch.device | None = None) -> "Batch":
        """Pad utterances to the longest one."""
        length = max(len(each.ids) for each in encoded)
        rows = [[*each.ids] + [vocabulary.PAD] * (length - len(each.ids)) for each in encoded]
        ones = [[1] * len(each.ids) + [0] * (length - len(each.ids)) for each in encoded]
        device = device or torch.device("cpu")
        return cls(*(torch.tensor(x, dtype=torch.int64, device=device) for x in (rows, ones)))


class JointModel(torch.nn.Module):
    """An encoder with two heads.

    The intent's head reads tanh(W x + b) of a pooled vector x, as BERT's pooler does: the first
    token's hidden state, or the mean of all tokens' hidden states. The slots' head reads each
    token's hidden state.

    Args:
        pooling: "first" or "mean".
        dropout: before both heads, in training.
    """

    def __init__(
        self,
        encoder_model: "Encoder",
        shape: encoder.Shape,
        labels: LabelSet,
        tokenizer: tokenizers.Tokenizer,
        *,
        pooling: str = "mean",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.encoder, self.shape, self.labels = encoder_model, shape, labels
        self.tokenizer, self.pooling = tokenizer, pooling
        device = next(encoder_model.parameters()).device
        hidden, to = shape.hidden_size, {"device": device, "dtype": torch.float32}
        self.dropout = torch.nn.Dropout(dropout)
        self.pooler = torch.nn.Linear(hidden, hidden, **to)
        self.intent_head = torch.nn.Linear(hidden, len(labels.intents), **to)
        self.slot_head = torch.nn.Linear(hidden, len(labels.tags), **to)
        for head in (self.pooler, self.intent_head, self.slot_head):
            torch.nn.init.normal_(head.weight, std=0.02)
            torch.nn.init.zeros_(head.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Answer a batch.

        Args:
            ids, mask: see Batch.

        Returns:
            Logits of the intents (batch, intents), and of the tags (batch, length, tags).
        """
        hidden = self.encoder(ids, mask).transpose(0, 1)
        pooled = hidden[:, 0]
        if self.pooling == "mean":
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        pooled = torch.tanh(self.pooler(pooled))
        return self.intent_head(self.dropout(pooled)), self.slot_head(self.dropout(hidden))

    def trained(self) -> list[torch.nn.Parameter]:
        """Return the parameters that an answer depends on."""
        return [p for name, p in self.named_parameters() if not name.startswith(UNUSED)]

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors that an answer depends on, by name."""
        return {
            name: param.detach().contiguous()
            for name, param in self.named_parameters()
            if not name.startswith(UNUSED)
        }

    def num_params(self) -> int:
        """Count the parameters, with the embedding."""
        return sum(param.numel() for param in self.trained())

    def encode(self, words: Sequence[str], place: str) -> Encoded:
        """Turn words into sub-words; see `labels.encode`."""
        return encode(words, self.tokenizer, self.shape.max_length, place)

    @torch.no_grad()
    def answer(self, utterances: Sequence[Tagged], batch_size: int = 64) -> list[Tagged]:
        """Return the utterances with the intents and tags that the model says."""
        was_training = self.training
        self.eval()
        device = self.pooler.weight.device
        encoded = [self.encode(each.words, each.place) for each in utterances]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].ids))
        answers: dict[int, Tagged] = {}
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            batch = Batch.of([encoded[index] for index in chosen], device)
            intents, tags = (x.argmax(-1).tolist() for x in self(batch.ids, batch.mask))
            for index, intent, row in zip(chosen, intents, tags, strict=True):
                answers[index] = self.labelled(
                    utterances[index], intent, encoded[index].gather(row)
                )
        self.train(was_training)
        return [answers[index] for index in range(len(utterances))]

    def labelled(self, utterance: Tagged, intent: int, tags: Sequence[int]) -> Tagged:
        """Return the utterance with the labels of these numbers."""
        names = tuple(self.labels.tags[number] for number in tags)
        return Tagged(utterance.words, names, self.labels.intents[intent], utterance.place)

    def save(self, folder: Path) -> None:
        """Write the model's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"shape": asdict(self.shape), "pooling": self.pooling}
        settings["vocab_size"] = self.encoder.num_tokens
        (folder / "nlu.json").write_text(json.dumps(settings, indent=2) + "\n")
        self.labels.write(folder / "labels.json")
        self.tokenizer.save(str(folder / vocabulary.FILE))
        save_file(self.weights(), folder / "model.safetensors")


def build(
    shape: encoder.Shape,
    vocab_size: int,
    labels: LabelSet,
    tokenizer: tokenizers.Tokenizer,
    *,
    pooling: str,
    dropout: float,
) -> JointModel:
    """Build a model with random weights on this process alone."""
    encoder.start_single_process()
    config = encoder.transformer_config(shape, dropout=dropout)
    bare = encoder.build_encoder(shape, vocab_size, config=config)
    return JointModel(bare, shape, labels, tokenizer, pooling=pooling, dropout=dropout)


def load(folder: Path) -> JointModel:
    """Load a model's folder, in evaluation mode.

    Raises:
        ValueError: it is not the folder of a fine-tuned model.
    """
    try:
        settings = json.loads((folder / "nlu.json").read_text())
        labels = LabelSet.read(folder / "labels.json")
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, KeyError) as exc:
        what = "must be a folder that finetune_nlu.py wrote"
        raise ValueError(f"{folder}: {what} ({type(exc).__name__}: {exc})") from exc
    model = build(
        encoder.Shape(**settings["shape"]),
        settings["vocab_size"],
        labels,
        vocabulary.load(folder),
        pooling=settings["pooling"],
        dropout=0.0,
    )
    missing = set(model.weights()) ^ set(weights)
    if missing:
        what = f"{sorted(missing)[:3]}: must be the tensors of the shape in nlu.json"
        raise ValueError(f"{folder}/model.safetensors: {what}; fine-tune the model again")
    model.load_state_dict(weights, strict=False)
    return model.eval()


def seed_dropout(seed: int) -> None:
    """Seed torch's generator and Megatron's, so that a run does not depend on those before it."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def quiet_megatron() -> None:
    """Hide Megatron's warnings at import that TransformerEngine and Apex are not installed."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")


def tagged_text(text: str, place: str) -> Tagged:
    """Return an utterance without labels, as `answer` takes it."""
    words = tuple(spoken_words(text))
    return Tagged(words, ("O",) * len(words), "", place)
