"""The encoder's module, on Megatron-Core's BertModel. It imports Megatron: see encoder.py."""

from typing import Any

import torch
from encoder import Shape
from megatron.core.models.bert.bert_layer_specs import (
    bert_layer_local_spec,
    get_bert_layer_with_transformer_engine_spec,
)
from megatron.core.models.bert.bert_model import BertModel
from torch import Tensor


class Encoder(BertModel):
    """BERT with LayerNorms before the sub-layers, a masked-LM head, and no next-sentence head.

    The head's weight is the embedding's. It is computed at the asked positions alone: all others,
    85% of them in training, have no label.

    Args:
        shape: its sizes.
        vocab_size: tokens that have a meaning; those behind, up to padded_vocab_size, never get a
            probability, so that the padding has no influence on a loss.
        config: Megatron's TransformerConfig.
        padded_vocab_size: what tensor parallelism divides; vocab_size if None.
        pre_process, post_process, vp_stage: this pipeline stage.
        transformer_engine: build the layers of TransformerEngine's parts.
        projection_size: adds `hidden_projection`, (hidden_size -> projection_size), which
            distillation compares a teacher's hidden states with; None for no such part.
    """

    def __init__(
        self,
        shape: Shape,
        vocab_size: int,
        *,
        config: Any,
        padded_vocab_size: int | None = None,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        transformer_engine: bool = False,
        projection_size: int | None = None,
    ) -> None:
        spec = (
            get_bert_layer_with_transformer_engine_spec()
            if transformer_engine
            else bert_layer_local_spec
        )
        super().__init__(
            config=config,
            num_tokentypes=0,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size or vocab_size,
            max_sequence_length=shape.max_length,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=True,
            position_embedding_type=shape.position,
            add_binary_head=False,
            vp_stage=vp_stage,
        )
        self.num_tokens = vocab_size
        self.hidden_projection: torch.nn.Linear | None = None
        if post_process and projection_size is not None:
            self.hidden_projection = torch.nn.Linear(shape.hidden_size, projection_size, bias=False)
            torch.nn.init.normal_(self.hidden_projection.weight, std=config.init_method_std)

    def forward(
        self, tokens: Tensor, padding_mask: Tensor, positions: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Run this rank's stage.

        Args:
            tokens: (batch, length) int64.
            padding_mask: (batch, length); 1 for a token, 0 for padding.
            positions: (n,) int64, as indices into the flattened (batch, length); where the last
                stage computes logits. None for hidden states alone.

        Returns:
            Hidden states (length, batch, hidden_size): after the last LayerNorm on the last stage.
            There, with positions, also logits (n, padded_vocab_size / tensor-parallel size), and
            with hidden_projection also (length, batch, projection_size): the projected states.
        """
        hidden = self.encoder(
            hidden_states=self._embed(tokens),
            attention_mask=self._attention_mask(padding_mask),
            rotary_pos_emb=self._rotary(tokens.shape[1]),
        )
        if positions is None or not self.post_process:
            return hidden
        output = hidden, self.logits(hidden, positions)
        if self.hidden_projection is None:
            return output
        return (*output, self.hidden_projection(hidden))

    def _embed(self, tokens: Tensor) -> Tensor | None:
        if not self.pre_process:
            return None  # the encoder has its input from the stage before
        embedded: Tensor = self.embedding(
            input_ids=tokens, position_ids=self.bert_position_ids(tokens)
        )
        return embedded

    def _attention_mask(self, padding_mask: Tensor) -> Tensor:
        """(batch, 1, length or 1, length) bool; True hides a key from a query."""
        is_padding = (padding_mask < 0.5)[:, None, None, :]
        if self.attn_mask_dimensions == "b1ss":
            length = padding_mask.shape[1]
            return is_padding.expand(-1, -1, length, -1)
        return is_padding

    def _rotary(self, length: int) -> Tensor | None:
        if self.position_embedding_type != "rope":
            return None
        rotary: Tensor = self.rotary_pos_emb(length)
        return rotary

    def logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Compute the masked-LM head at some positions.

        Args:
            hidden: (length, batch, hidden_size), the last stage's hidden states.
            positions: (n,) int64, indices into the flattened (batch, length).

        Returns:
            (n, padded_vocab_size / tensor-parallel size).
        """
        chosen = hidden.transpose(0, 1).flatten(0, 1)[positions].unsqueeze(1)
        weight = self.shared_embedding_or_output_weight()
        logits, _ = self.output_layer(self.lm_head(chosen), weight=weight)
        return self._without_padding(logits.squeeze(1))

    def _without_padding(self, logits: Tensor) -> Tensor:
        first = self.tp_group.rank() * logits.shape[1]
        if first + logits.shape[1] <= self.num_tokens:
            return logits
        column = torch.arange(first, first + logits.shape[1], device=logits.device)
        return logits.masked_fill(column >= self.num_tokens, torch.finfo(logits.dtype).min)
