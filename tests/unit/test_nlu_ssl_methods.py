"""examples/nlu_ssl: the CRF and the losses of PL, KD, VAT and CVT, against oracles in float64."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

for package in ("num2words", "tokenizers", "safetensors"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'megatron-adams[nlu]'")
for example in ("nlu_ssl", "nlu_teacher"):
    sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / example))

import bilstm_crf  # noqa: E402  (the example's files import each other by name)
import cvt  # noqa: E402
import losses_ssl  # noqa: E402
import torch  # noqa: E402
import vat  # noqa: E402
import vocabulary  # noqa: E402
from bilstm_crf import BiLstmCrf, LinearChainCrf, Sizes  # noqa: E402
from labels import Encoded, LabelSet  # noqa: E402
from models import Batch, Prediction, without_dropout  # noqa: E402
from torch import Tensor  # noqa: E402

F64 = {"dtype": torch.float64, "device": torch.device("cpu")}
NUM_TAGS = 3
LENGTHS = (4, 1, 2)
LABELS = LabelSet(("Play", "Stop"), ("O", "B-name", "I-name"))
TEXTS = ("play the song of anna now", "stop", "no more songs", "i want dmitri again")


def random_like(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), **F64)


def mask_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


@pytest.fixture
def crf() -> LinearChainCrf:
    crf = LinearChainCrf(NUM_TAGS).double()
    for number, param in enumerate(crf.parameters()):
        param.data = random_like(tuple(param.shape), number)
    return crf


@pytest.fixture
def scores() -> Tensor:
    return random_like((len(LENGTHS), max(LENGTHS), NUM_TAGS), 7)


def enumerated(
    crf: LinearChainCrf, scores: Tensor, length: int, temperature: float = 1.0
) -> dict[tuple[int, ...], float]:
    """The log-probability of every sequence, by adding up what the definition says."""
    totals = {}
    for tags in itertools.product(range(NUM_TAGS), repeat=length):
        total = crf.start[tags[0]].item() + crf.end[tags[-1]].item()
        total += sum(scores[word, tag].item() for word, tag in enumerate(tags))
        total += sum(crf.transitions[pair].item() for pair in itertools.pairwise(tags))
        totals[tags] = total / temperature
    whole = math.log(sum(map(math.exp, totals.values())))
    return {tags: total - whole for tags, total in totals.items()}


# --- the CRF ------------------------------------------------------------------------------------


def test_the_log_probability_is_that_of_all_sequences(crf: LinearChainCrf, scores: Tensor) -> None:
    mask = mask_of(LENGTHS)
    for row, length in enumerate(LENGTHS):
        oracle = enumerated(crf, scores[row], length)
        for tags, expected in oracle.items():
            # Padding has any tag.
            padded = torch.full((len(LENGTHS), max(LENGTHS)), 2)
            padded[row, :length] = torch.tensor(tags)
            mine = crf.log_prob(scores, mask, padded)[row].item()
            assert mine == pytest.approx(expected, abs=1e-12)


def test_several_sequences_are_scored_as_each_alone(crf: LinearChainCrf, scores: Tensor) -> None:
    mask = mask_of(LENGTHS)
    tags = torch.randint(NUM_TAGS, (3, 5, 4), generator=torch.Generator().manual_seed(0))
    together = crf.score(scores, mask, tags)
    alone = torch.stack([crf.score(scores, mask, tags[:, i]) for i in range(5)], 1)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_the_marginals_are_sums_over_sequences(
    crf: LinearChainCrf, scores: Tensor, temperature: float
) -> None:
    mine = crf.log_marginals(scores, mask_of(LENGTHS), temperature=temperature).exp()
    for row, length in enumerate(LENGTHS):
        expected = torch.zeros(length, NUM_TAGS, **F64)
        for tags, log_prob in enumerated(crf, scores[row], length, temperature).items():
            for word, tag in enumerate(tags):
                expected[word, tag] += math.exp(log_prob)
        torch.testing.assert_close(mine[row, :length], expected)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_best_sequences_are_those_of_the_enumeration(
    crf: LinearChainCrf, scores: Tensor, k: int
) -> None:
    mask = mask_of(LENGTHS)
    sequences, totals = crf.best(scores, mask, k)
    for row, length in enumerate(LENGTHS):
        oracle = enumerated(crf, scores[row], length)
        expected = sorted(oracle, key=oracle.__getitem__, reverse=True)[:k]
        num = len(expected)
        assert [tuple(each[:length]) for each in sequences[row, :num].tolist()] == expected
        assert totals[row, num:].tolist() == [-math.inf] * (k - num)
        torch.testing.assert_close(
            totals[row, :num], crf.score(scores, mask, sequences)[row, :num].detach()
        )
        assert not sequences[row, :, length:].any()


@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_sums_over_paths_are_those_of_logsumexp(temperature: float) -> None:
    """In fp32, also for values far apart, and for transitions that a product would lose."""
    transitions = random_like((40, 40), 1).float() * 5 / temperature
    values = random_like((8, 40), 2).float() * 30
    values[0] += 1000.0
    values[1] -= 1000.0
    found, expected = (
        torch.autograd.functional.vjp(
            lambda x, y, add=add: add(y)(x), (values, transitions), torch.ones(8, 40)
        )
        for add in (
            bilstm_crf._sums_over,
            lambda y: lambda x: (x.double().unsqueeze(2) + y.double()).logsumexp(1).float(),
        )
    )
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-4)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_crfs_gradients_are_numerical_ones(crf: LinearChainCrf, scores: Tensor) -> None:
    mask = mask_of(LENGTHS)
    tags = torch.tensor([[0, 1, 2, 1], [2, 0, 0, 0], [1, 0, 0, 0]])
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: crf.log_prob(x, mask, tags), scores)

    def marginals(x: Tensor) -> Tensor:
        return crf.log_marginals(x, mask, temperature=2.0)[mask]

    assert torch.autograd.gradcheck(marginals, scores)


# --- PL and KD ----------------------------------------------------------------------------------


def prediction_of(
    crf: LinearChainCrf | None, seed: int, lengths: tuple[int, ...] = LENGTHS
) -> Prediction:
    num = len(lengths)
    intents = random_like((num, 4), seed).requires_grad_()
    tags = random_like((num, max(lengths), NUM_TAGS), seed + 1).requires_grad_()
    return Prediction(intents, tags, mask_of(lengths), crf)


def grads(loss: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss, (prediction.intents, prediction.tags))


def soft_targets(teacher: Prediction, temperature: float) -> losses_ssl.SoftTargets:
    intents = teacher.intent_log_probs(temperature).detach()
    return losses_ssl.SoftTargets(intents, teacher.tag_log_probs(temperature).detach())


def distil(
    student: Prediction, teacher: Prediction, theirs: float, mine: float, task: str = "both"
) -> losses_ssl.Losses:
    mines = losses_ssl.Temperatures(mine, mine)
    return losses_ssl.distillation_loss(student, soft_targets(teacher, theirs), mines, task)


def test_kd_of_a_teacher_at_temperature_zero_is_pl() -> None:
    teacher, student = prediction_of(None, 1), prediction_of(None, 11)
    labels = teacher.intents.argmax(-1), teacher.tags.argmax(-1)
    hard = losses_ssl.label_loss(student, *labels, "both").total()
    expected = grads(hard, student)
    differences = []
    for temperature in (1.0, 0.1, 1e-4):
        found = grads(distil(student, teacher, temperature, 1.0).total(), student)
        differences.append(
            max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
        )
    assert differences[0] > 0.05 and differences[0] > differences[1] > differences[2]
    assert differences[2] < 1e-15
    assert distil(student, teacher, 1e-4, 1.0).total().item() == pytest.approx(hard.item())


def test_kd_at_a_high_temperature_compares_centered_logits() -> None:
    """Hinton et al. 2015, section 2.1: the gradient of T^2 KL becomes (z - v) / classes."""
    teacher, student = prediction_of(None, 1), prediction_of(None, 11)
    loss = distil(student, teacher, 1e5, 1e5, "ic").total()
    (found,) = torch.autograd.grad(loss, student.intents)
    centered = [each.intents - each.intents.mean(-1, keepdim=True) for each in (student, teacher)]
    expected = (centered[0] - centered[1]).detach() / 4 / len(LENGTHS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_intents_and_tags_have_their_own_temperatures(crf: LinearChainCrf) -> None:
    teacher, student = prediction_of(crf, 1), prediction_of(crf, 11)
    soft = [soft_targets(teacher, each) for each in (2.0, 0.5)]
    targets = losses_ssl.SoftTargets(soft[0].intents, soft[1].tags)
    found = losses_ssl.distillation_loss(
        student, targets, losses_ssl.Temperatures(2.0, 0.5), "both"
    )
    assert found.intents == distil(student, teacher, 2.0, 2.0).intents
    assert found.tags == distil(student, teacher, 0.5, 0.5).tags


@pytest.mark.parametrize("with_crf", [False, True])
def test_kds_gradient_is_the_numerical_one(crf: LinearChainCrf, with_crf: bool) -> None:
    shared = crf if with_crf else None
    teacher, student = prediction_of(shared, 1), prediction_of(shared, 11)

    def loss(intents: Tensor, tags: Tensor) -> Tensor:
        moved = dataclasses.replace(student, intents=intents, tags=tags)
        return distil(moved, teacher, 2.0, 2.0).total()

    assert torch.autograd.gradcheck(loss, (student.intents, student.tags))


def test_kd_with_a_crf_is_of_the_enumerated_marginals(crf: LinearChainCrf) -> None:
    teacher, student = prediction_of(crf, 1), prediction_of(crf, 11)
    found = distil(student, teacher, 2.0, 2.0, "ner")
    total, num_words = 0.0, 0
    for row, length in enumerate(LENGTHS):
        marginals = []
        for each in (teacher, student):
            table = torch.zeros(length, NUM_TAGS, **F64)
            for tags, log_prob in enumerated(crf, each.tags[row], length, 2.0).items():
                for word, tag in enumerate(tags):
                    table[word, tag] += math.exp(log_prob)
            marginals.append(table)
        p, q = marginals
        total += (p * (p / q).log()).sum().item()
        num_words += length
    assert found.intents is None and found.tags is not None
    assert found.tags.item() == pytest.approx(4 * total / num_words)


@pytest.mark.parametrize("task", losses_ssl.TASKS)
def test_a_task_has_its_losses_alone(crf: LinearChainCrf, task: str) -> None:
    student = prediction_of(crf, 1)
    labels = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)
    for found in (
        losses_ssl.label_loss(student, *labels, task),
        distil(student, prediction_of(crf, 5), 2.0, 2.0, task),
    ):
        assert (found.intents is not None, found.tags is not None) == {
            "ic": (True, False),
            "ner": (False, True),
            "both": (True, True),
        }[task]


def test_padding_may_hold_what_is_no_number() -> None:
    values, mask = random_like((2, 3), 1), mask_of((3, 1))
    expected = (values[0].sum() + values[1, 0]) / 4
    found = losses_ssl.mean_of_words(values.masked_fill(~mask, math.nan), mask)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_no_gradient_goes_to_what_is_imitated() -> None:
    target, answer = random_like((3, 4), 1), random_like((3, 4), 2)
    both = target.requires_grad_(), answer.requires_grad_()
    found = losses_ssl.kl(*(each.log_softmax(-1) for each in both)).sum()
    grads = torch.autograd.grad(found, both, allow_unused=True)
    assert grads[0] is None and grads[1] is not None and grads[1].any()


# --- VAT ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> BiLstmCrf:
    torch.manual_seed(0)
    tokenizer = vocabulary.train(list(TEXTS), 80)
    sizes = Sizes(embedding=6, hidden=5, max_length=40)
    model = BiLstmCrf(sizes, LABELS, tokenizer, dropout=0.3).double()
    with torch.no_grad():
        for param in model.parameters():
            param += 0.4 * torch.randn_like(param)
    return model


def batch_of(model: BiLstmCrf, texts: tuple[str, ...] = TEXTS) -> Batch:
    return model.batch([model.encode(text.split(), "") for text in texts])


def divergence_of(
    model: BiLstmCrf, batch: Batch, k_best: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    embedded = model.embed(batch).detach()
    with torch.no_grad():
        clean = vat.CleanAnswers(model.predict(embedded, batch), "both", k_best)

    def divergence(moved: Tensor) -> Tensor:
        of_both = clean.divergences(model.predict(moved, batch))
        return torch.stack([each for each in of_both if each is not None]).sum(0)

    return embedded, divergence


@pytest.mark.parametrize("k_best", [0, 2])
def test_vats_direction_is_that_of_finite_differences(model: BiLstmCrf, k_best: int) -> None:
    model.eval()
    batch = batch_of(model)
    embedded, divergence = divergence_of(model, batch, k_best)
    noise = random_like(tuple(embedded.shape), 3)
    xi, epsilon, step = 0.05, 0.3, 1e-4
    found = vat.adversarial(embedded, batch.mask, divergence, noise, xi=xi, epsilon=epsilon)
    shown = batch.mask.unsqueeze(-1)
    sizes = (embedded * shown).flatten(1).norm(dim=1)
    noise = noise * shown
    start = embedded + xi * (sizes / noise.flatten(1).norm(dim=1))[:, None, None] * noise
    gradient = torch.zeros_like(embedded)
    with torch.no_grad():
        # All utterances at once, as none depends on another.
        for place in itertools.product(*map(range, embedded.shape[1:])):
            moved = torch.zeros_like(embedded)
            moved[:, place[0], place[1]] = step
            ends = divergence(start + moved), divergence(start - moved)
            gradient[:, place[0], place[1]] = (ends[0] - ends[1]) / (2 * step)
    gradient = gradient * shown
    expected = gradient * (epsilon * sizes / gradient.flatten(1).norm(dim=1))[:, None, None]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not found[~batch.mask].any()


def test_vats_perturbation_moves_answers_more_than_noise_of_its_size(model: BiLstmCrf) -> None:
    model.eval()
    batch = batch_of(model)
    embedded, divergence = divergence_of(model, batch, 0)
    noise = random_like(tuple(embedded.shape), 3)
    settings = {"xi": 1e-3, "epsilon": 0.05}
    found = vat.adversarial(model.embed(batch), batch.mask, divergence, noise, **settings)
    # The embeddings are not taught to change the perturbation's size.
    assert not found.requires_grad
    with torch.no_grad():
        adverse = divergence(embedded + found)
        sizes = found.flatten(1).norm(dim=1)[:, None, None]
        of_noise = [
            divergence(
                embedded + sizes * vat.unit(random_like(tuple(embedded.shape), seed), batch.mask)
            )
            for seed in range(20)
        ]
    assert (adverse > torch.stack(of_noise).mean(0) * 2).all()


def test_seqvat_is_the_divergence_of_the_enumerated_classes(crf: LinearChainCrf) -> None:
    clean, perturbed = prediction_of(crf, 1), prediction_of(crf, 11)
    for k in (1, 2, 5):
        found = vat.sequence_kl(vat.KBest.of(clean, k), perturbed)
        for row, length in enumerate(LENGTHS):
            p, q = (enumerated(crf, each.tags[row], length) for each in (clean, perturbed))
            best = sorted(p, key=p.__getitem__, reverse=True)[:k]
            expected = sum(math.exp(p[tags]) * (p[tags] - q[tags]) for tags in best)
            rest = [1 - sum(math.exp(each[tags]) for tags in best) for each in (p, q)]
            if len(best) < len(p):
                expected += rest[0] * math.log(rest[0] / rest[1])
            # One word has as many sequences as tags: k = 5 leaves no rest, but its rounding.
            assert found[row].item() == pytest.approx(expected, abs=1e-11), (k, row)
            whole = sum(math.exp(p[tags]) * (p[tags] - q[tags]) for tags in p)
            assert -1e-12 < found[row].item() <= whole + 1e-11


@pytest.mark.parametrize("with_crf", [True, False])
def test_divergences_of_marginals_are_means_over_an_utterances_words(
    crf: LinearChainCrf, with_crf: bool
) -> None:
    clean, perturbed = (prediction_of(crf if with_crf else None, seed) for seed in (1, 11))
    # Without a CRF nobody asks for the k best sequences.
    k_best = 0 if with_crf else 3
    of_intents, of_tags = vat.CleanAnswers(clean, "both", k_best).divergences(perturbed)
    assert of_intents is not None and of_tags is not None
    for row, length in enumerate(LENGTHS):
        tags = (each.tag_log_probs()[row, :length] for each in (clean, perturbed))
        expected = losses_ssl.kl(*tags).mean()
        torch.testing.assert_close(of_tags[row], expected, rtol=1e-12, atol=0)
        intents = (each.intents[row].log_softmax(0) for each in (clean, perturbed))
        torch.testing.assert_close(of_intents[row], losses_ssl.kl(*intents), rtol=1e-12, atol=0)
    for task, found in (("ic", [True, False]), ("ner", [False, True])):
        answers = vat.CleanAnswers(clean, task, k_best).divergences(perturbed)
        assert [each is not None for each in answers] == found


def test_a_gradient_of_zero_moves_nothing() -> None:
    values, mask = torch.zeros((2, 3, 4), **F64), mask_of((3, 1))
    values[1] = 1.0
    found = vat.unit(values, mask)
    assert not found[0].any() and not found[1, 1:].any()
    assert found[1, 0].norm().item() == pytest.approx(1.0)


def test_the_rest_is_never_less_than_its_rounding() -> None:
    half = math.log(0.5)
    sums = torch.tensor([[half, half + 1e-15], [half, half], [half, math.log(0.25)]], **F64)
    found = vat._with_rest(sums)
    assert torch.equal(found[:, :2], sums)
    rounding = math.log(torch.finfo(torch.float64).eps)
    assert found[:, 2].tolist() == pytest.approx([rounding, rounding, math.log(0.25)])


def test_seqvat_is_zero_without_a_perturbation_and_has_a_numerical_gradient(
    crf: LinearChainCrf,
) -> None:
    clean, perturbed = prediction_of(crf, 1), prediction_of(crf, 11)
    assert vat.sequence_kl(vat.KBest.of(clean, 3), clean).abs().max().item() < 1e-14

    two = vat.KBest.of(clean, 2)

    def loss(tags: Tensor) -> Tensor:
        return vat.sequence_kl(two, dataclasses.replace(perturbed, tags=tags))

    assert torch.autograd.gradcheck(loss, perturbed.tags)
    # One word has three sequences: its gradient is that of the divergence over all of them.
    (of_five,) = torch.autograd.grad(
        vat.sequence_kl(vat.KBest.of(clean, 5), perturbed)[1], perturbed.tags
    )
    place = LENGTHS.index(1)
    p, q = (
        (each.tags[place, 0] + crf.start + crf.end).log_softmax(-1) for each in (clean, perturbed)
    )
    (of_all,) = torch.autograd.grad(losses_ssl.kl(p, q), perturbed.tags)
    torch.testing.assert_close(of_five, of_all, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(
        vat.sequence_kl(two, perturbed).sum(), clean.tags, allow_unused=True
    )
    assert grad is None


def test_vat_draws_from_its_generator_alone_and_teaches_the_model(model: BiLstmCrf) -> None:
    model.train()
    batch, settings = batch_of(model), vat.VatSettings()
    found = []
    for seed in (1, 1, 2):
        generator = torch.Generator("cpu").manual_seed(seed)
        found.append(vat.vat_loss(model, batch, "both", settings, generator))
    assert found[0].total().item() == found[1].total().item() != found[2].total().item()
    assert found[0].intents is not None and found[0].intents.item() > 0
    found[0].total().backward()
    assert all(param.grad is not None for param in model.parameters())
    assert model.training and model.dropout.training and model.first.training
    model.zero_grad()


# --- CVT ----------------------------------------------------------------------------------------


def seen_words(name: str, word: int, num_words: int) -> set[int]:
    return {
        "forward": set(range(word + 1)),
        "backward": set(range(word, num_words)),
        "future": set(range(word)),
        "past": set(range(word + 1, num_words)),
    }[name]


def test_a_view_sees_the_words_that_it_may_and_no_others(model: BiLstmCrf) -> None:
    model.eval()
    encoded = model.encode(["play", "the", "signs", "of", "damir"], "")
    before, num = cvt_answers(model, encoded), len(encoded.firsts)
    half = (num + 1) // 2
    ends = [*encoded.firsts[1:], len(encoded.ids) - 1]
    assert len(encoded.ids) > num + 2  # a word has several sub-words
    for changed in range(num):
        ids = list(encoded.ids)
        for place in range(encoded.firsts[changed], ends[changed]):
            ids[place] = 6 if ids[place] == 5 else 5
        after = cvt_answers(model, dataclasses.replace(encoded, ids=tuple(ids)))
        for name, rows in before["tags"].items():
            for word in range(num):
                is_equal = torch.equal(rows[word], after["tags"][name][word])
                assert is_equal == (changed not in seen_words(name, word, num)), (name, word)
        seen = {"forward": set(range(half)), "backward": set(range(num - half, num))}
        assert seen.keys() == before["intents"].keys()
        for name, row in before["intents"].items():
            assert torch.equal(row, after["intents"][name]) == (changed not in seen[name])


def cvt_answers(model: BiLstmCrf, encoded: Encoded) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(4)
    heads = cvt.AuxiliaryHeads(model, "both").double()
    # Another utterance is beside it, with more or fewer words.
    batch = model.batch([encoded, model.encode(["stop", "the", "song"], "")])
    with torch.no_grad():
        intents, tags = heads(model, batch)
    return {
        "intents": {name: each[0] for name, each in intents.items()},
        "tags": {name: each[0, : len(encoded.firsts)] for name, each in tags.items()},
    }


def test_cvts_losses_are_divergences_from_the_full_view(model: BiLstmCrf) -> None:
    model.eval()
    torch.manual_seed(4)
    heads = cvt.AuxiliaryHeads(model, "both").double()
    batch = batch_of(model)
    found = cvt.cvt_losses(model, heads, batch)
    assert list(found) == ["backward", "forward", "future", "past"]
    full = model(batch)
    intents, tags = heads(model, batch)
    for name, losses in found.items():
        assert losses.tags is not None and (losses.intents is not None) == (name in intents)
        total = 0.0
        for row, word in batch.word_mask.nonzero().tolist():
            p = full.tag_log_probs()[row, word].exp()
            total += (p * (p.log() - tags[name][row, word])).sum().item()
        assert losses.tags.item() == pytest.approx(total / batch.word_mask.sum().item())
        if losses.intents is not None:
            p = full.intent_log_probs().exp()
            expected = (p * (p.log() - intents[name])).sum(-1).mean().item()
            assert losses.intents.item() == pytest.approx(expected)


@pytest.mark.parametrize("task", ["ic", "ner"])
def test_a_task_has_its_auxiliary_heads_alone(model: BiLstmCrf, task: str) -> None:
    heads = cvt.AuxiliaryHeads(model, task).double()
    of_tags, of_intents = (len(each) for each in (heads.tags, heads.intents))
    assert (of_tags, of_intents) == {"ic": (0, 2), "ner": (4, 0)}[task]
    found = cvt.cvt_losses(model, heads, batch_of(model))
    assert len(found) == of_tags + of_intents
    for losses in found.values():
        assert (losses.intents is None, losses.tags is None) == (task == "ner", task == "ic")


def test_cvt_teaches_what_the_views_share_and_not_the_full_views_heads(model: BiLstmCrf) -> None:
    model.train()
    heads = cvt.AuxiliaryHeads(model, "both").double()
    cvt.total(cvt.cvt_losses(model, heads, batch_of(model))).total().backward()
    taught = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert taught == {"embedding", "first"}
    assert all(param.grad is not None for param in heads.parameters())
    model.zero_grad()


def test_what_is_imitated_is_computed_without_dropout_and_gradients(
    model: BiLstmCrf, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    predict = model.predict

    def noted(embedded: Tensor, batch: Batch) -> Prediction:
        passes.append((torch.is_grad_enabled(), model.dropout.training))
        return predict(embedded, batch)

    monkeypatch.setattr(model, "predict", noted)
    model.train()
    cvt.cvt_losses(model, cvt.AuxiliaryHeads(model, "both").double(), batch_of(model))
    assert passes == [(False, False)]
    passes.clear()
    generator = torch.Generator("cpu").manual_seed(0)
    vat.vat_loss(model, batch_of(model), "both", vat.VatSettings(), generator)
    # The clean answers; those that give the direction; and those that are learned from.
    assert passes == [(False, False), (True, False), (True, False)]


# --- the BiLSTM-CRF -----------------------------------------------------------------------------


def test_an_utterance_has_the_same_answer_alone_and_in_a_batch(model: BiLstmCrf) -> None:
    model.eval()
    together = model(batch_of(model))
    for row, text in enumerate(TEXTS):
        alone = model(batch_of(model, (text,)))
        num = len(text.split())
        torch.testing.assert_close(alone.intents[0], together.intents[row])
        torch.testing.assert_close(alone.tag_log_probs()[0], together.tag_log_probs()[row, :num])


def test_a_saved_model_gives_the_same_logits(model: BiLstmCrf, tmp_path: Path) -> None:
    single = BiLstmCrf(model.sizes, LABELS, model.tokenizer)
    single.load_state_dict(model.state_dict())
    single.save(tmp_path)
    loaded = bilstm_crf.load(tmp_path)
    batch = batch_of(single)
    assert not loaded.training
    assert torch.equal(loaded(batch).tag_log_probs(), single.eval()(batch).tag_log_probs())
    (tmp_path / "labels.json").unlink()
    with pytest.raises(ValueError, match=r"must be a folder that train_ssl\.py wrote"):
        bilstm_crf.load(tmp_path)


def test_a_bilstm_layer_is_torchs_on_packed_sequences(model: BiLstmCrf) -> None:
    layer, mask = model.second, mask_of((4, 1, 6))
    theirs = torch.nn.LSTM(10, 5, batch_first=True, bidirectional=True).double()
    theirs.load_state_dict(
        {
            f"{name}{ending}": param
            for part, ending in ((layer.forwards, ""), (layer.backwards, "_reverse"))
            for name, param in part.state_dict().items()
        }
    )
    inputs = random_like((3, 6, 10), 1).requires_grad_()
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        inputs, mask.sum(1), batch_first=True, enforce_sorted=False
    )
    expected = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)[0]
    found = torch.cat(layer(inputs, mask), 2)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    weights = random_like(tuple(found.shape), 2)
    grads = [torch.autograd.grad((each * weights).sum(), inputs) for each in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_the_crf_is_part_of_the_model(model: BiLstmCrf) -> None:
    # A class attribute of the same name would hide the module.
    assert isinstance(model.crf, LinearChainCrf)
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert "crf" in names and model(batch_of(model)).crf is model.crf


def test_answers_are_without_dropout(model: BiLstmCrf) -> None:
    encoded = [model.encode(text.split(), "") for text in TEXTS]
    rate, found = model.dropout.p, []
    model.dropout.p = 0.5
    for mode in (False, True):
        model.train(mode)
        found.append([answer.intents for _, answer in model.predictions(encoded)])
        assert model.training == mode
    model.dropout.p = rate
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_dropout_is_off_for_a_while_and_then_as_it_was(model: BiLstmCrf) -> None:
    model.train()
    model.pooler.eval()
    with without_dropout(model):
        assert not model.dropout.training
        assert model.first.forwards.training and model.first.backwards.training
    assert model.dropout.training and not model.pooler.training
    model.train()
