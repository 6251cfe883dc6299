"""What the ranks of the tests of examples/nlu_teacher run: its scripts, losses and models."""

import functools
import hashlib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.distributed.cases import describe

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nlu_teacher"


def run(script: str, words: Sequence[str]) -> dict[str, Any]:
    """Run a script of the example as its command line would.

    Returns:
        "losses": name -> one value a step, on the last pipeline stage; "grad_norms"; "digest": of
        every bit of this rank's student and optimizer at the end; "teacher": digests of the
        teacher's parameters when it was loaded and at the end, where this rank has it;
        "names": of the parameters that the optimizer has.
    """
    from megatron.training import training

    from megatron_adams.cpu_rehearsal import rehearsal_flags

    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    sys.path.insert(0, str(EXAMPLE))
    held: dict[str, Any] = {"losses": {}, "grad_norms": [], "teacher": []}
    setup, train_step = training.setup_model_and_optimizer, training.train_step

    def recorded_setup(*args: Any, **kwargs: Any) -> Any:
        held["model"], held["optimizer"], _ = built = setup(*args, **kwargs)
        return built

    @functools.wraps(train_step)
    def recorded_train_step(*args: Any, **kwargs: Any) -> Any:
        outcome = train_step(*args, **kwargs)
        for name, loss in outcome[0].items():
            held["losses"].setdefault(name, []).append(float(loss))
        held["grad_norms"].append(outcome[5])
        return outcome

    training.setup_model_and_optimizer = recorded_setup
    training.train_step = recorded_train_step
    _record_teacher(held["teacher"])
    path = str(EXAMPLE / script)
    sys.argv = [path, *words, *rehearsal_flags(words)]
    try:
        variables = runpy.run_path(path, run_name="__main__")
    except SystemExit as exc:  # --exit-interval
        if exc.code not in (None, 0):
            raise
        variables = {}
    if getattr(variables.get("targets"), "model", None) is not None:
        held["teacher"].append(variables["targets"].digest())
    if "model" in held:
        model, optimizer = held.pop("model"), held.pop("optimizer")
        held["names"] = [name for chunk in model for name, _ in chunk.named_parameters()]
        held["digest"] = _digest(model, optimizer)
    return held


def _record_teacher(digests: list[str]) -> None:
    import teacher

    original = teacher.Teacher.__init__

    def recorded(self: Any, folder: Path, *, keep: bool = True) -> None:
        original(self, folder, keep=keep)
        if keep:
            digests.append(self.digest())

    teacher.Teacher.__init__ = recorded


def _digest(model: Sequence[torch.nn.Module], optimizer: Any) -> str:
    tensors = [param.detach() for chunk in model for param in chunk.parameters()]
    for part in optimizer.chained_optimizers:
        for shard in describe(part, {})["shards"]:
            tensors += [shard["param"], *shard["state"].values()]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def refused(script: str, words: Sequence[str]) -> str:
    """Run a script that has to refuse its flags, and return what it says."""
    try:
        run(script, words)
    except ValueError as exc:
        return str(exc)
    raise AssertionError(f"{script} was not refused")


def vocabulary_losses(seed: int, temperature: float) -> dict[str, torch.Tensor]:
    """Compute the losses of random logits, divided among all ranks, and their gradients.

    Returns:
        "student", "teacher", "labels": the whole input; "mlm", "kl": (n,); "mlm_grad", "kl_grad":
        this rank's columns of the sums' gradients; "ours", "theirs": hidden states, with their
        loss "hidden" and its gradient "hidden_grad", the same on every rank.
    """
    import megatron.core.parallel_state as parallel_state

    sys.path.insert(0, str(EXAMPLE))
    torch.distributed.init_process_group("gloo")
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    import losses

    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    student, teacher = 3 * draw(7, 24), 5 * draw(7, 24)
    teacher[:, 20:] = -torch.inf  # what a store of the largest logits leaves out
    student[:, 23:] = torch.finfo(torch.float32).min  # what fills the vocabulary up
    labels = torch.randint(0, 20, (7,), generator=generator)
    columns = slice(rank * (24 // world), (rank + 1) * (24 // world))
    group = parallel_state.get_tensor_model_parallel_group()
    result = {"student": student, "teacher": teacher, "labels": labels}
    shard = student[:, columns].clone().requires_grad_()
    mlm = losses.masked_lm_loss(shard, labels, group)
    (result["mlm_grad"],) = torch.autograd.grad(mlm.sum(), shard)
    kl = losses.distillation_loss(shard, teacher[:, columns].clone(), temperature, group)
    (result["kl_grad"],) = torch.autograd.grad(kl.sum(), shard)
    ours, theirs = draw(5, 3, 8), draw(5, 3, 8)
    hidden = losses.hidden_loss(ours.requires_grad_(), theirs)
    (result["hidden_grad"],) = torch.autograd.grad(hidden.sum(), ours)
    result |= {"ours": ours.detach(), "theirs": theirs, "hidden": hidden.detach()}
    return {**result, "mlm": mlm.detach(), "kl": kl.detach()}


def masked_samples(prefix: str, num_samples: int, seq_length: int) -> list[dict[str, Any]]:
    """Return samples of a dataset of prepare_text.py, and the sequences that they are made of."""
    import numpy as np

    sys.path.insert(0, str(EXAMPLE))
    dataset = _open_dataset(prefix, num_samples, seq_length)
    sequences = [
        (int(i), dataset.dataset[i].astype(np.int64).tolist())
        for epoch in range(-(-num_samples // len(dataset._sequences)))
        for i in dataset._order(epoch)
    ]
    return [
        {
            "sequence": sequences[i],
            **{name: value.tolist() for name, value in dataset[i].items()},
        }
        for i in range(num_samples)
    ]


def _open_dataset(prefix: str, num_samples: int, seq_length: int) -> Any:
    import numpy as np
    import vocabulary
    from masked_dataset import DatasetTokenizer, EncoderDataset, dataset_config
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    folder = Path(prefix).parent
    tokenizer = vocabulary.load(folder)
    pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
    config = dataset_config(
        DatasetTokenizer(len(pieces), vocabulary.digest(folder), pieces),
        random_seed=1,
        sequence_length=seq_length,
        masking_probability=0.15,
        split="1,0,0",
    )
    indexed = IndexedDataset(prefix)
    documents = np.arange(len(indexed.document_indices) - 1)
    return EncoderDataset(indexed, prefix, documents, num_samples, Split.train, config)


def too_long(prefix: str, seq_length: int) -> str:
    """Return what opening a dataset says whose sequences are longer than the model."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        _open_dataset(prefix, 1, seq_length)
    except ValueError as exc:
        return str(exc)
    raise AssertionError("it was not refused")


def hidden_states(folder: str, ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """Load a saved model on this process alone, and run it.

    Args:
        ids: of several texts, with [CLS] and [SEP].

    Returns:
        "together": the hidden states of the texts in one padded batch, (length, batch, hidden);
        "alone": a list of those of each text; "logits" at the first position of each.
    """
    sys.path.insert(0, str(EXAMPLE))
    import encoder

    model, shape, _ = encoder.load_encoder(Path(folder))
    longest = max(map(len, ids))
    tokens = torch.tensor([text + [0] * (longest - len(text)) for text in ids])
    padding_mask = (tokens != 0).long()
    first = torch.arange(len(ids)) * longest
    with torch.no_grad():
        together, logits = model(tokens, padding_mask, first)[:2]
        alone = [model(torch.tensor([text]), torch.ones(1, len(text)))[:, 0] for text in ids]
    return {"together": together, "alone": alone, "logits": logits, "size": shape.hidden_size}


def padded_vocabulary(vocab_size: int, padded_size: int) -> dict[str, torch.Tensor]:
    """Return the probabilities of an encoder with a filled-up vocabulary, and a gradient.

    Returns:
        "probabilities": (n, padded_size); "grad": (padded_size, hidden), of the embedding.
    """
    sys.path.insert(0, str(EXAMPLE))
    import encoder

    encoder.start_single_process()
    shape = encoder.Shape(1, 16, 2, 32, 8)
    model = encoder.build_encoder(shape, vocab_size, padded_vocab_size=padded_size)
    tokens = torch.arange(5, 13).view(1, 8)
    positions = torch.tensor([1, 6])
    _, logits = model(tokens, torch.ones_like(tokens), positions)
    probabilities = torch.softmax(logits, 1)
    torch.nn.functional.cross_entropy(logits, tokens[0, positions]).backward()
    grad = model.embedding.word_embeddings.weight.grad
    return {"probabilities": probabilities.detach(), "grad": grad}
