"""The exported model for transformers. export.py copies this file beside the weights.

    from transformers import AutoModel
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)

It needs transformers alone. Megatron's BERT has its LayerNorms before the sub-layers, so that it is
no BertModel: with learned positions it is transformers' MegatronBertModel, and with rotary ones
its EsmModel without the parts that are for proteins.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EsmConfig,
    EsmModel,
    MegatronBertConfig,
    MegatronBertModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput


class JointNluConfig(PretrainedConfig):  # type: ignore[misc]
    """The encoder's settings and the labels.

    Args:
        encoder: settings of MegatronBertConfig, or of EsmConfig if is_rotary.
        intents: the names of the intents, by their numbers.
        tags: the names of the BIO tags of words, by their numbers.
        pooling: "first" or "mean": which vector the intent's head reads.
    """

    model_type = "joint-nlu"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        intents: list[str] | None = None,
        tags: list[str] | None = None,
        pooling: str = "mean",
        is_rotary: bool = False,
        **kwargs: Any,
    ) -> None:
        self.encoder = encoder or {}
        self.intents, self.tags = intents or ["none"], tags or ["O"]
        self.pooling, self.is_rotary = pooling, is_rotary
        super().__init__(**kwargs)


@dataclass
class JointNluOutput(ModelOutput):  # type: ignore[misc]
    """Logits of the intents (batch, intents), and of the tags (batch, length, tags)."""

    intent_logits: Tensor | None = None
    slot_logits: Tensor | None = None


class JointNluModel(PreTrainedModel):  # type: ignore[misc]
    """An encoder with a head for the intent and one for the slots."""

    config_class = JointNluConfig

    def __init__(self, config: JointNluConfig) -> None:
        super().__init__(config)
        if config.is_rotary:
            self.bert = EsmModel(EsmConfig(**config.encoder), add_pooling_layer=False)
        else:
            self.bert = MegatronBertModel(
                MegatronBertConfig(**config.encoder), add_pooling_layer=False
            )
        hidden = config.encoder["hidden_size"]
        self.pooler = torch.nn.Linear(hidden, hidden)
        self.intent_head = torch.nn.Linear(hidden, len(config.intents))
        self.slot_head = torch.nn.Linear(hidden, len(config.tags))
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> JointNluOutput:
        """Answer a batch.

        Args:
            input_ids: (batch, length) int64, with [CLS] in front and [SEP] behind.
            attention_mask: (batch, length) int64; 1 for a sub-word, 0 for padding.
        """
        encoded = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        hidden = encoded.last_hidden_state
        pooled = hidden[:, 0]
        if self.config.pooling == "mean":
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        pooled = torch.tanh(self.pooler(pooled))
        return JointNluOutput(self.intent_head(pooled), self.slot_head(hidden))
