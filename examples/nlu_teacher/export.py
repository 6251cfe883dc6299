"""Export a fine-tuned model to Hugging Face's transformers and to ONNX, and compare the logits.

    python export.py --study runs/nlu/finetuned --name S_via --out runs/nlu/exported \\
        --check runs/nlu/snips/test.jsonl

Inputs: a model that finetune_nlu.py has kept (subset 0 and seed 0 of the study at the best rate, or
--model for a model's folder), and labelled utterances to compare with.
Outputs, in --out: config.json, model.safetensors, tokenizer.json and modeling_joint_nlu.py, which
transformers loads with trust_remote_code=True; model.onnx; and export.json, the largest difference
of a logit from Megatron's. The export fails if a difference is over 1e-4.
"""

import argparse
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import joint
import modeling_joint_nlu
import numpy as np
import torch
import vocabulary
from finetune_rows import OPTIMIZERS, kept_model
from joint import Batch, JointModel
from labels import load_tagged
from modeling_joint_nlu import JointNluConfig, JointNluModel
from torch import Tensor

TOLERANCE = 1e-4
CHECKED = 200  # utterances

_LEARNED = {
    "attention.ln": "input_layernorm",
    "attention.output.dense": "self_attention.linear_proj",
    "ln": "pre_mlp_layernorm",
    "intermediate.dense": "mlp.linear_fc1",
    "output.dense": "mlp.linear_fc2",
}
_ROTARY = {
    "attention.LayerNorm": "input_layernorm",
    "attention.output.dense": "self_attention.linear_proj",
    "LayerNorm": "pre_mlp_layernorm",
    "intermediate.dense": "mlp.linear_fc1",
    "output.dense": "mlp.linear_fc2",
}


def config_of(model: JointModel) -> JointNluConfig:
    """Return the configuration of the exported model.

    Raises:
        ValueError: the encoder computes something that transformers' class does not.
    """
    shape, megatron = model.shape, model.encoder.config
    expected = {
        "activation_func": torch.nn.functional.gelu,
        "gated_linear_unit": False,
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": False,
        "add_bias_linear": True,
        "add_qkv_bias": False,  # implied by add_bias_linear
        "bias_activation_fusion": False,  # Megatron's fused form has the tanh approximation
        "rotary_interleaved": False,
    }
    for name, value in expected.items():
        if getattr(megatron, name) != value:
            what = f"{name}={getattr(megatron, name)!r}: must be {value!r}"
            raise ValueError(f"{what}, as transformers' model computes it; export no other encoder")
    settings = {
        "vocab_size": model.encoder.num_tokens,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "intermediate_size": shape.ffn_hidden_size,
        "max_position_embeddings": shape.max_length,
        "layer_norm_eps": megatron.layernorm_epsilon,
        "pad_token_id": vocabulary.PAD,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    is_rotary = shape.position == "rope"
    if is_rotary:
        settings |= {
            "position_embedding_type": "rotary",
            "mask_token_id": vocabulary.MASK,
            "token_dropout": False,
            "emb_layer_norm_before": False,
        }
    else:
        settings |= {"type_vocab_size": 1, "hidden_act": "gelu"}
    labels = model.labels
    return JointNluConfig(
        settings, list(labels.intents), list(labels.tags), model.pooling, is_rotary
    )


def split_qkv(joined: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Split Megatron's query, key and value, which lie together head by head.

    Args:
        joined: (3 * hidden, ...); a head's query, key and value rows follow each other.

    Returns:
        Three tensors (hidden, ...).
    """
    by_head = joined.unflatten(0, (num_heads, 3, -1))
    return tuple(by_head[:, index].flatten(0, 1).contiguous() for index in range(3))


def converted(model: JointModel) -> dict[str, Tensor]:
    """Return the model's weights by the names of the exported model."""
    mine = model.weights()
    weights = {
        name: mine.pop(name)
        for head in ("pooler", "intent_head", "slot_head")
        for name in (f"{head}.weight", f"{head}.bias")
    }
    is_rotary = model.shape.position == "rope"
    embedding = "encoder.embedding"
    words = mine.pop(f"{embedding}.word_embeddings.weight")[: model.encoder.num_tokens]
    weights["bert.embeddings.word_embeddings.weight"] = words.contiguous()
    if not is_rotary:
        positions = mine.pop(f"{embedding}.position_embeddings.weight")
        weights["bert.embeddings.position_embeddings.weight"] = positions
        weights["bert.embeddings.token_type_embeddings.weight"] = torch.zeros_like(words[:1])
    last = "emb_layer_norm_after" if is_rotary else "ln"
    for kind in ("weight", "bias"):
        weights[f"bert.encoder.{last}.{kind}"] = mine.pop(f"encoder.encoder.final_layernorm.{kind}")
        for layer in range(model.shape.num_layers):
            theirs, ours = f"bert.encoder.layer.{layer}", f"encoder.encoder.layers.{layer}"
            for name, source in (_ROTARY if is_rotary else _LEARNED).items():
                weights[f"{theirs}.{name}.{kind}"] = mine.pop(f"{ours}.{source}.{kind}")
            joined = mine.pop(f"{ours}.self_attention.linear_qkv.{kind}")
            parts = split_qkv(joined, model.shape.num_attention_heads)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                weights[f"{theirs}.attention.self.{name}.{kind}"] = part
    assert not mine, f"{sorted(mine)}: not exported"
    return weights


def to_transformers(model: JointModel) -> JointNluModel:
    """Return the same model as one of transformers.

    Raises:
        ValueError: transformers has no such encoder.
    """
    exported = JointNluModel._from_config(config_of(model), attn_implementation="eager")
    found = exported.load_state_dict(converted(model), strict=False)
    # Buffers that follow from the configuration, and ESM's head for proteins, which is not read.
    allowed = ("rotary_embeddings.inv_freq", "position_ids")
    missing = [
        name
        for name in found.missing_keys
        if not name.endswith(allowed) and "contact_head" not in name
    ]
    assert not missing and not found.unexpected_keys, (missing, found.unexpected_keys)
    return exported.eval()


class Tuple(torch.nn.Module):
    """The exported model with a tuple as output, as ONNX has it."""

    def __init__(self, model: JointNluModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(input_ids, attention_mask)
        return output.intent_logits, output.slot_logits


def to_onnx(model: JointNluModel, path: Path) -> None:
    """Write a model as ONNX; batch and length are free."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision is not installed
    warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
    ids = torch.ones(2, 8, dtype=torch.int64, device=torch.device("cpu"))
    mask = ids.clone()  # given one tensor twice, the exporter takes both inputs for one
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2)
    torch.onnx.export(
        Tuple(model).eval(),
        (ids, mask),
        path,
        input_names=["input_ids", "attention_mask"],
        output_names=["intent_logits", "slot_logits"],
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


Answer = Callable[[Batch], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


def onnx_answer(path: Path, threads: int = 1) -> Answer:
    """Return a function that answers with an ONNX file on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def answer(batch: Batch) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        inputs = {"input_ids": batch.ids.numpy(), "attention_mask": batch.mask.numpy()}
        intents, tags = session.run(["intent_logits", "slot_logits"], inputs)
        return intents, tags

    return answer


@torch.no_grad()
def module_answer(module: torch.nn.Module, batch: Batch) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Answer with a JointModel or with what `Tuple` wraps."""
    intents, tags = module(batch.ids, batch.mask)
    return intents.numpy(), tags.numpy()


def largest_difference(mine: Answer, other: Answer, batches: Sequence[Batch]) -> float:
    """Return the largest difference of a logit; those of padding are left out."""
    largest = 0.0
    for batch in batches:
        (intents, tags), (other_intents, other_tags) = mine(batch), other(batch)
        is_word = batch.mask.numpy().astype(bool)
        for difference in (intents - other_intents, (tags - other_tags)[is_word]):
            largest = max(largest, float(np.abs(difference).max()))
    return largest


def export(source: Path, out: Path, check: Path) -> dict[str, Any]:
    """Write the exported model, and return what export.json says.

    Raises:
        ValueError: a folder cannot be read, or the exported logits differ by more than TOLERANCE.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = joint.load(source)
    utterances = load_tagged(check)[:CHECKED]
    encoded = [model.encode(each.words, each.place) for each in utterances]
    # One alone, as an assistant has it, and the others in batches with padding.
    batches = [Batch.of(encoded[:1])]
    batches += [Batch.of(encoded[i : i + 16]) for i in range(1, len(encoded), 16)]
    out.mkdir(parents=True, exist_ok=True)
    exported = to_transformers(model)
    exported.config.auto_map = {
        "AutoConfig": "modeling_joint_nlu.JointNluConfig",
        "AutoModel": "modeling_joint_nlu.JointNluModel",
    }
    exported.save_pretrained(out)
    shutil.copy(modeling_joint_nlu.__file__, out / "modeling_joint_nlu.py")
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    special = dict(zip(names, vocabulary.SPECIAL_TOKENS, strict=True))
    PreTrainedTokenizerFast(
        tokenizer_object=model.tokenizer, model_max_length=model.shape.max_length, **special
    ).save_pretrained(out)
    to_onnx(exported, out / "model.onnx")
    loaded = JointNluModel.from_pretrained(out).eval()
    answers: dict[str, Answer] = {
        "transformers": lambda batch: module_answer(Tuple(loaded), batch),
        "onnx": onnx_answer(out / "model.onnx"),
    }
    record: dict[str, Any] = {"utterances": len(utterances), "parameters": model.num_params()}
    for name, answer in answers.items():
        difference = largest_difference(lambda b: module_answer(model, b), answer, batches)
        record[f"largest_difference_{name}"] = difference
        if difference > TOLERANCE:
            what = f"{out}: a logit of {name} differs by {difference:.2g} from Megatron's"
            raise ValueError(f"{what}: must be {TOLERANCE:g} at most; do not use this export")
    (out / "export.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line. Returns 2 if the user has to change something."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="a folder of a study's models/")
    source.add_argument("--study", type=Path, help="finetune_nlu.py's --out")
    add("--name", help="with --study: the name of the model there")
    add("--optimizer", choices=OPTIMIZERS, default="adams", help="(%(default)s)")
    add("--shots", type=int, default=20, help="of that model; 0: all (%(default)s)")
    add("--out", type=Path, required=True)
    add("--check", type=Path, required=True, help="a jsonl of utterances")
    args = parser.parse_args(argv)
    joint.quiet_megatron()
    try:
        if (args.study is None) != (args.name is None):
            raise ValueError("--study and --name: must be given together")
        model = args.model or kept_model(args.study, args.name, args.optimizer, args.shots)
        record = export(model, args.out, args.check)
    except (ValueError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value:.3g}" for name, value in record.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
