"""The model that learns Countdown: its tokenizer, its shape, and how many problems it solves."""

import random
from dataclasses import dataclass

import torch
from countdown import MAX_ANSWER_CHARS, Problem, is_correct
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END = "<pad>", "<end>"
CHARACTERS = " 0123456789+-()=:"
# An answer as they are taught, and its end. What is longer is cut, and wrong.
MAX_NEW_TOKENS = MAX_ANSWER_CHARS + 1


@dataclass(frozen=True)
class Shape:
    """The size of a Llama; every head has its own keys and values."""

    hidden: int
    layers: int
    heads: int


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each character that problems and answers have."""
    vocabulary = {token: index for index, token in enumerate([PAD, END, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a Llama with random parameters in fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def solve(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]
) -> list[str]:
    """Return the model's most probable answers, character by character (greedy)."""
    was_training = model.training
    model.eval()
    found: list[str] = []
    order = random.Random(0)  # of each problem's numbers; the same in every call
    for start in range(0, len(problems), 200):
        prompts = [problem.prompt(order) for problem in problems[start : start + 200]]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        found += tokenizer.batch_decode(new, skip_special_tokens=True)
    model.train(was_training)
    return found


def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]
) -> float:
    """Return the share of problems that the model solves."""
    found = solve(model, tokenizer, problems)
    return sum(map(is_correct, found, problems)) / len(problems)
