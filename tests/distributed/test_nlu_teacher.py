"""examples/nlu_teacher on ranks of real Megatron-Core: parity, resume, losses, refusals."""

import json
import math
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.cluster import REPO, Cluster
from tests.harness.thinning import thinned

EXAMPLE = REPO / "examples" / "nlu_teacher"
sys.path.append(str(EXAMPLE))

import pipeline  # noqa: E402  (the example's files import each other by name)
import train_encoder  # noqa: E402
import vocabulary  # noqa: E402
from prepare_text import Settings, prepare  # noqa: E402
from shared import launch  # noqa: E402
from shared.command import RunError, command_line_flags  # noqa: E402
from shared.recipe import Recipe, parse_flags  # noqa: E402

CASES = "tests.distributed.nlu_cases"

_WORDS = [f"{a}{b}" for a in ("pla", "ri", "mo", "tel") for b in ("ne", "so", "ka", "ter", "ly")]
MAX_LENGTH = 16

MODEL = (
    "--num-attention-heads 4 --position-embedding-type rope --max-position-embeddings 16 "
    "--seq-length 16 --micro-batch-size 4 --global-batch-size 8 --lr 1e-2 "
    "--lr-decay-style constant --weight-decay 0.1 --clip-grad 1.0 --calculate-per-token-loss "
    "--use-cpu-initialization --log-interval 1 --num-workers 0 --eval-iters 1 "
    "--eval-interval 1000 --save-interval 3 --attention-dropout 0 --hidden-dropout 0 "
    "--optimizer adams --use-distributed-optimizer --ckpt-format torch_dist "
    "--make-vocab-size-divisible-by 16 --dist-ckpt-strictness raise_unexpected "
    "--no-bias-gelu-fusion "
)
TEACHER = "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 "
STUDENT = "--num-layers 2 --hidden-size 16 --ffn-hidden-size 32 "
ALL_LOSSES = "--mlm-weight 0.3 --kl-weight 0.5 --hidden-weight 0.2 --temperature 2 "


def make_text(path: Path, num_lines: int, seed: int = 0) -> None:
    generator = random.Random(seed)
    lines = {
        " ".join(generator.choices(_WORDS, k=generator.randint(3, 9))) for _ in range(num_lines)
    }
    path.write_text("\n".join(sorted(lines)) + "\n")


def settings(text: Path, **changed: Any) -> Settings:
    return Settings(
        **{
            "text": [text],
            "key": "text",
            "utterances": True,
            "spoken_share": 0.7,
            "held_out_fraction": 0.1,
            "max_length": MAX_LENGTH,
            "tokenizer": None,
            "vocabulary": "wordpiece",
            "vocab_size": 61,
            "forbid": [],
            "drop_forbidden": False,
            "drop_long": True,
            **changed,
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset of utterances."""
    folder = tmp_path_factory.mktemp("nlu")
    make_text(folder / "pool.txt", 300)
    prepare(settings(folder / "pool.txt"), folder / "data")
    return folder / "data"


def data_flags(data: Path) -> str:
    return (
        f"--encoder-tokenizer {data} --train-data-path {data}/train "
        f"--valid-data-path {data}/held_out "
    )


def run(cluster: Cluster, script: str, flags: str, num_ranks: int = 1) -> list[Any]:
    outcome = cluster.run(f"{CASES}:run", num_ranks, script=script, words=flags.split())
    return list(outcome.results)


@pytest.fixture(scope="module")
def teacher(cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that one process has trained for some steps."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    flags = MODEL + TEACHER + data_flags(data) + f"--train-iters 12 --save {folder}"
    (result,) = run(cluster, "pretrain_encoder.py", flags)
    losses = result["losses"]["lm loss"]
    # It has learned something: an untrained one guesses among the vocabulary.
    assert losses[0] == pytest.approx(math.log(61), rel=0.05)
    assert losses[-1] < losses[0] - 0.2
    return folder


@pytest.fixture(scope="module")
def student(
    cluster: Cluster, data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A student from which every layout starts: stages of a pipeline would draw other weights."""
    folder = tmp_path_factory.mktemp("student") / "model"
    run(
        cluster,
        "distil_encoder.py",
        distil_flags(data, teacher) + f"--train-iters 1 --save {folder}",
    )
    return folder


def distil_flags(data: Path, teacher: Path) -> str:
    return MODEL + STUDENT + ALL_LOSSES + data_flags(data) + f"--teacher {teacher} "


@pytest.fixture(scope="module")
def one_process(cluster: Cluster, data: Path, teacher: Path, student: Path) -> Any:
    """Four steps of distillation on one process."""
    flags = distil_flags(data, teacher) + f"--train-iters 4 --pretrained-checkpoint {student} "
    (result,) = run(cluster, "distil_encoder.py", flags)
    return result


LAYOUTS = {
    "dp2": "",
    "tp2": "--tensor-model-parallel-size 2 ",
    "pp2": "--pipeline-model-parallel-size 2 ",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_distillation_is_the_same_in_every_layout(
    cluster: Cluster, data: Path, teacher: Path, student: Path, one_process: Any, layout: str
) -> None:
    flags = distil_flags(data, teacher) + LAYOUTS[layout]
    flags += f"--train-iters 4 --pretrained-checkpoint {student} "
    results = run(cluster, "distil_encoder.py", flags, num_ranks=2)
    expected = one_process["losses"]
    assert expected.keys() == {"lm loss", "kl loss", "hidden loss", "distillation loss"}
    for name, losses in expected.items():
        assert len(losses) == 4
        assert results[-1]["losses"][name] == pytest.approx(losses, rel=2e-5), name
    assert results[0]["grad_norms"] == pytest.approx(one_process["grad_norms"], rel=2e-4)
    # The losses change from step to step: equal ones are not equal because nothing is learned.
    assert len({round(loss, 3) for loss in expected["distillation loss"]}) == 4
    # On a pipeline, the first stage has no teacher.
    assert [len(result["teacher"]) for result in results] == ([0, 2] if layout == "pp2" else [2, 2])
    for result in results:
        assert len(set(result["teacher"])) <= 1
        assert not [name for name in result["names"] if "teacher" in name]


@pytest.mark.parametrize("layout", thinned(LAYOUTS, full=["dp2"]))
def test_pretraining_is_the_same_in_every_layout(
    cluster: Cluster, data: Path, teacher: Path, layout: str
) -> None:
    flags = MODEL + TEACHER + data_flags(data)
    flags += f"--train-iters 3 --pretrained-checkpoint {teacher} "
    (expected,) = run(cluster, "pretrain_encoder.py", flags)
    results = run(cluster, "pretrain_encoder.py", flags + LAYOUTS[layout], num_ranks=2)
    print(results[0]["grad_norms"], expected["grad_norms"])
    losses = expected["losses"]["lm loss"]
    assert results[-1]["losses"]["lm loss"] == pytest.approx(losses, rel=2e-5)
    assert results[0]["grad_norms"] == pytest.approx(expected["grad_norms"], rel=2e-4)


def test_bf16_distils_as_fp32_does(
    cluster: Cluster, data: Path, teacher: Path, student: Path, one_process: Any
) -> None:
    """The teacher's weights were saved in fp32, and it answers in bf16."""
    flags = distil_flags(data, teacher) + LAYOUTS["tp2"] + "--bf16 "
    flags += f"--train-iters 2 --pretrained-checkpoint {student} "
    results = run(cluster, "distil_encoder.py", flags, num_ranks=2)
    for name, losses in one_process["losses"].items():
        assert results[0]["losses"][name] == pytest.approx(losses[:2], rel=0.03), name
    assert len(set(results[0]["teacher"])) == 1


def test_losses_add_up_with_their_weights(one_process: Any) -> None:
    losses = one_process["losses"]
    for step, total in enumerate(losses["distillation loss"]):
        mlm, kl, hidden = (losses[f"{name} loss"][step] for name in ("lm", "kl", "hidden"))
        # The hidden states' loss has another weight among micro-batches, which is near.
        assert total == pytest.approx(0.3 * mlm + 0.5 * kl + 0.2 * hidden, rel=5e-3)
        assert kl > 0 and hidden > 0


def test_distillation_resumes_to_the_same_bits(
    cluster: Cluster, data: Path, teacher: Path, tmp_path: Path
) -> None:
    flags = distil_flags(data, teacher) + "--train-iters 5 "
    flags += "--tensor-model-parallel-size 2 "
    whole = run(cluster, "distil_encoder.py", flags + f"--save {tmp_path}/whole", num_ranks=2)
    saved = f"--save {tmp_path}/parts --load {tmp_path}/parts "
    run(cluster, "distil_encoder.py", flags + saved + "--exit-interval 3 ", num_ranks=2)
    resumed = run(cluster, "distil_encoder.py", flags + saved, num_ranks=2)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours["losses"] == {name: losses[3:] for name, losses in theirs["losses"].items()}
        assert ours["digest"] == theirs["digest"]


def test_stored_logits_teach_as_the_teacher_does(
    cluster: Cluster, data: Path, teacher: Path, tmp_path: Path
) -> None:
    flags = MODEL + STUDENT + data_flags(data) + "--train-iters 3 "
    (online,) = run(cluster, "distil_encoder.py", flags + f"--teacher {teacher}")
    size = vocabulary.load(data).get_vocab_size()
    store = f"--teacher {teacher} --top-k {size} --out {tmp_path}/all "
    outcome = cluster.run(
        f"{CASES}:run", 2, script="teacher_logits.py", words=(flags + store).split()
    )
    rows = (tmp_path / "all" / "logits.bin").stat().st_size // (4 * size)
    assert f"take {rows * size * 8:,} bytes" in outcome.log
    offline = run(cluster, "distil_encoder.py", flags + f"--teacher-logits {tmp_path}/all")[0]
    assert offline["losses"] == online["losses"]
    assert offline["digest"] == online["digest"]
    # Stored logits are divided among tensor-parallel ranks, too.
    divided = run(
        cluster,
        "distil_encoder.py",
        flags + f"--teacher-logits {tmp_path}/all --tensor-model-parallel-size 2",
        num_ranks=2,
    )
    assert divided[0]["losses"]["kl loss"] == pytest.approx(online["losses"]["kl loss"], rel=1e-5)
    said = cluster.run(
        f"{CASES}:refused",
        script="distil_encoder.py",
        words=(flags + f"--teacher-logits {tmp_path}/all --seed 7").split(),
    ).results[0]
    assert "seed 1234 and not 7" in said and "write them again" in said


def test_largest_logits_alone_are_another_teacher(
    cluster: Cluster, data: Path, teacher: Path, tmp_path: Path
) -> None:
    flags = MODEL + STUDENT + data_flags(data) + "--train-iters 1 "
    run(cluster, "teacher_logits.py", flags + f"--teacher {teacher} --top-k 5 --out {tmp_path}/5")
    (few,) = run(cluster, "distil_encoder.py", flags + f"--teacher-logits {tmp_path}/5")
    (all_,) = run(cluster, "distil_encoder.py", flags + f"--teacher {teacher}")
    assert few["losses"]["lm loss"] == all_["losses"]["lm loss"]
    assert few["losses"]["kl loss"] != pytest.approx(all_["losses"]["kl loss"], rel=0.05)


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_against_float64(cluster: Cluster, ranks: int) -> None:
    temperature = 1.7
    outcome = cluster.run(f"{CASES}:vocabulary_losses", ranks, seed=3, temperature=temperature)
    first = outcome.results[0]
    student = first["student"].double().requires_grad_()
    teacher = first["teacher"].double()
    mlm = torch.nn.functional.cross_entropy(student, first["labels"], reduction="none")
    (mlm_grad,) = torch.autograd.grad(mlm.sum(), student)
    log_student = torch.log_softmax(student / temperature, 1)
    probability = torch.softmax(teacher / temperature, 1)
    terms = torch.special.xlogy(probability, probability)[:, :20]
    kl = terms.sum(1) - (probability[:, :20] * log_student[:, :20]).sum(1)
    kl = temperature**2 * kl
    (kl_grad,) = torch.autograd.grad(kl.sum(), student)
    ours = first["ours"].double().requires_grad_()
    hidden = (ours - first["theirs"].double()).pow(2).sum(2) / 8
    (hidden_grad,) = torch.autograd.grad(hidden.sum(), ours)
    torch.testing.assert_close(first["hidden_grad"].double(), hidden_grad, rtol=1e-5, atol=1e-6)
    for name, expected in (("mlm", mlm), ("kl", kl), ("hidden", hidden)):
        for result in outcome.results:
            torch.testing.assert_close(result[name].double(), expected, rtol=1e-5, atol=1e-5)
    for name, expected in (("mlm_grad", mlm_grad), ("kl_grad", kl_grad)):
        found = torch.cat([result[name] for result in outcome.results], 1).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_masking_statistics(cluster: Cluster, data: Path) -> None:
    num_samples = 3000
    outcome = cluster.run(
        f"{CASES}:masked_samples",
        prefix=str(data / "train"),
        num_samples=num_samples,
        seq_length=MAX_LENGTH,
    )
    kinds: Counter[str] = Counter()
    number_of_special = len(vocabulary.SPECIAL_TOKENS)
    for sample in outcome.results[0]:
        ids = sample["sequence"][1]
        chosen = [i for i, label in enumerate(sample["labels"]) if label >= 0]
        # 15%, and at least one; Python rounds a half to the even number, as Megatron does.
        assert len(chosen) == max(1, round(0.15 * len(ids)))
        whole = [vocabulary.FIRST, *ids, vocabulary.LAST]
        whole += [vocabulary.PAD] * (MAX_LENGTH - len(whole))
        assert all(sample["labels"][i] == whole[i] for i in chosen)
        for i, (token, original) in enumerate(zip(sample["tokens"], whole, strict=True)):
            if i not in chosen:
                assert token == original
            elif token == vocabulary.MASK:
                kinds["mask"] += 1
            else:
                assert token >= number_of_special
                kinds["kept" if token == original else "random"] += 1
    total = sum(kinds.values())
    shares = {"mask": 0.8, "random": 0.1, "kept": 0.1}
    for name, share in shares.items():
        # Four standard deviations; a random token is the original one in 1 of 56 cases.
        deviation = 4 * math.sqrt(share * (1 - share) / total) + 0.1 / 56
        assert kinds[name] / total == pytest.approx(share, abs=deviation), name


def test_every_epoch_has_every_sequence_once_and_masks_it_anew(
    cluster: Cluster, data: Path
) -> None:
    num_samples = 700
    samples = cluster.run(
        f"{CASES}:masked_samples",
        prefix=str(data / "train"),
        num_samples=num_samples,
        seq_length=MAX_LENGTH,
    ).results[0]
    numbers = [sample["sequence"][0] for sample in samples]
    size = len(set(numbers))
    assert sorted(numbers[:size]) == sorted(numbers[size : 2 * size]) == list(range(size))
    assert numbers[:size] != numbers[size : 2 * size]
    first = {sample["sequence"][0]: sample["tokens"] for sample in samples[:size]}
    again = {sample["sequence"][0]: sample["tokens"] for sample in samples[size : 2 * size]}
    assert sum(first[i] != again[i] for i in first) > size / 2


def test_longer_sequences_than_the_model_are_refused(cluster: Cluster, data: Path) -> None:
    said = cluster.run(f"{CASES}:too_long", prefix=str(data / "train"), seq_length=8).results[0]
    assert "--seq-length 8" in said and "nothing is cut off" in said


def test_saved_model_loads_on_one_process(cluster: Cluster, data: Path, student: Path) -> None:
    ids = vocabulary.load(data).encode("plane riso moka").ids
    texts = [ids, [*ids[:-1], *ids[1:]], ids[:3]]
    outcome = cluster.run(f"{CASES}:hidden_states", folder=str(student), ids=texts)
    result = outcome.results[0]
    assert result["together"].shape == (max(map(len, texts)), 3, 16)
    assert result["logits"].shape == (3, vocabulary.load(data).get_vocab_size())
    for i, text in enumerate(texts):
        # Padding has no influence on a text.
        torch.testing.assert_close(result["together"][: len(text), i], result["alone"][i])


def test_checkpoint_of_another_layout_loads_on_one_process(
    cluster: Cluster, data: Path, teacher: Path, tmp_path: Path
) -> None:
    """Two stages of a pipeline save the weights that they have loaded: the rate is 0."""
    flags = MODEL + TEACHER + data_flags(data) + LAYOUTS["pp2"] + "--weight-decay 0 --lr 0 "
    flags += f"--train-iters 1 --pretrained-checkpoint {teacher} --save {tmp_path}/model"
    run(cluster, "pretrain_encoder.py", flags, num_ranks=2)
    ids = [vocabulary.load(data).encode("plane riso").ids]
    first, second = (
        cluster.run(f"{CASES}:hidden_states", folder=str(folder), ids=ids).results[0]
        for folder in (teacher, tmp_path / "model")
    )
    assert torch.equal(first["together"], second["together"])
    assert torch.equal(first["logits"], second["logits"])


def test_padding_of_the_vocabulary_has_no_probability(cluster: Cluster) -> None:
    outcome = cluster.run(f"{CASES}:padded_vocabulary", vocab_size=20, padded_size=32)
    result = outcome.results[0]
    assert result["probabilities"].shape == (2, 32)
    assert not result["probabilities"][:, 20:].any() and not result["grad"][20:].any()
    assert result["probabilities"][:, :20].all() and result["grad"][:20].any(1).all()


REFUSALS = {
    "--hidden-size 48": "hidden_size 32 and not 48",
    "--sequence-parallel --tensor-model-parallel-size 2": "--sequence-parallel",
    "--untie-embeddings-and-output-weights": "--untie-embeddings-and-output-weights",
}


@pytest.mark.parametrize("flags", thinned(REFUSALS, full=list(REFUSALS)[1:]))
def test_pretraining_refuses(cluster: Cluster, data: Path, teacher: Path, flags: str) -> None:
    given = MODEL + TEACHER + data_flags(data) + f"--train-iters 1 --load {teacher} "
    outcome = cluster.run(
        f"{CASES}:refused",
        1 + ("parallel-size" in flags),
        script="pretrain_encoder.py",
        words=(given + flags).split(),
    )
    assert REFUSALS[flags] in outcome.results[0]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", thinned(["17m", "9.3b"], full=["9.3b"]))
def test_size_rehearses_in_its_layout(cluster: Cluster, tmp_path: Path, model: str) -> None:
    recipe = Recipe.load(train_encoder.RECIPE)
    args = launch.parser(recipe).parse_args(
        ["--model", model, "--cpu-rehearsal", "--out", str(tmp_path)]
    )
    extra = parse_flags(["--train-iters", "3", "--exit-interval", "2", "--eval-interval", "1"])
    job = launch.make_job(recipe, args, extra, train_encoder.SCRIPT)
    outcome = cluster.run(
        f"{CASES}:run",
        job.num_ranks,
        script="pretrain_encoder.py",
        words=command_line_flags(job.flags),
        timeout_s=280,
    )
    assert job.num_ranks == {"17m": 2, "9.3b": 8}[model]
    losses = outcome.results[-1]["losses"]["lm loss"]
    # An untrained model guesses among the 512 made-up tokens, and never among those that pad them.
    assert losses == pytest.approx([math.log(512)] * 2, rel=0.05)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_pipeline_trains_a_chain_once(data: Path, tmp_path: Path) -> None:
    """run_training.py under pipeline.py: a teacher, its second stage, and a student."""
    common = '"--data", "${data}", "--steps", "4", "--batch", "8", "--gate", "say"'
    steps = {
        "T1": "",
        "T2": ', "--start", "${work}/T1/model", "--blend", "${data}", "0.5"',
        "S": ', "--teacher", "${work}/T2/model", "--", "--hidden-weight", "0.1"',
    }
    text = "[numbers]\n[quick]\n"
    for name, more in steps.items():
        script = EXAMPLE / "run_training.py"
        words = f'"{script}", "--model", "tiny", "--out", "${{work}}/{name}", {common}{more}'
        text += f'[[step]]\nname = "{name}"\ncommand = [{words}]\ninputs = ["${{data}}"]\n'
        text += f'outputs = ["${{work}}/{name}/model", "${{work}}/{name}/curve.json"]\n'
    (tmp_path / "steps.toml").write_text(text)
    variables = {"work": tmp_path / "work", "data": data}
    found = pipeline.load_steps(tmp_path / "steps.toml", variables)
    assert pipeline.run_steps(found, tmp_path / "work") == ["T1", "T2", "S"]
    assert pipeline.run_steps(found, tmp_path / "work") == []
    curve = json.loads((tmp_path / "work" / "S" / "curve.json").read_text())
    assert [step for step, _ in curve["train"]] == [1, 2, 3, 4]
    assert curve["optimizer_bytes"].keys() == {"exp_avg", "param"}
    assert "kl loss" in (tmp_path / "work" / "S" / "log.txt").read_text()
    # Four steps teach nothing: said here, and a failure where it is not to be passed.
    assert curve["held_out"][-1][1] > curve["unigram_loss"]
    assert "passed, as --gate is say" in (tmp_path / "work" / "steps" / "S.log").read_text()
    stopping = tuple("stop" if word == "say" else word for word in found[0].command)
    step = replace(found[0], command=stopping)
    with pytest.raises(RunError, match=r"(?s)step T1 failed.*nats after 4 steps: must be below"):
        pipeline.run_steps([step], tmp_path / "work")
    assert not pipeline.is_done(step, tmp_path / "work")


@pytest.mark.parametrize("kind", ["gpt", "legacy"])
def test_checkpoint_of_something_else_is_refused(
    cluster: Cluster, data: Path, tmp_path: Path, kind: str
) -> None:
    """A torch_dist checkpoint without an encoder's description, and one in the older format."""
    step = tmp_path / "iter_0000012"
    step.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    if kind == "gpt":
        (step / "metadata.json").write_text("{}")
    flags = MODEL + TEACHER + data_flags(data) + f"--train-iters 1 --load {tmp_path}"
    (said,) = cluster.run(
        f"{CASES}:refused", script="pretrain_encoder.py", words=flags.split()
    ).results
    expected = "is no description of an encoder" if kind == "gpt" else "--ckpt-format torch_dist"
    assert expected in said and str(tmp_path) in said


def test_rehearsal_distils_on_made_up_text(cluster: Cluster, tmp_path: Path) -> None:
    mock = "--mock-data --vocab-size 40 --train-iters 1 "
    run(cluster, "pretrain_encoder.py", MODEL + TEACHER + mock + f"--save {tmp_path}/T")
    flags = MODEL + STUDENT + ALL_LOSSES + mock + f"--teacher {tmp_path}/T"
    (result,) = run(cluster, "distil_encoder.py", flags)
    assert result["losses"]["lm loss"] == pytest.approx([math.log(40)], rel=0.1)
    other = flags.replace("--vocab-size 40", "--vocab-size 41")
    (said,) = cluster.run(
        f"{CASES}:refused", script="distil_encoder.py", words=other.split()
    ).results
    assert "40 tokens" in said and "41 tokens" in said


def test_teacher_of_another_vocabulary_is_refused(
    cluster: Cluster, data: Path, teacher: Path, tmp_path: Path
) -> None:
    make_text(tmp_path / "other.txt", 200, seed=5)
    prepare(settings(tmp_path / "other.txt", vocab_size=50), tmp_path / "other")
    for script, flag in (("distil_encoder.py", "--teacher"), ("pretrain_encoder.py", "--load")):
        flags = MODEL + TEACHER + data_flags(tmp_path / "other") + "--train-iters 1 "
        flags += f"{flag} {teacher}"
        (said,) = cluster.run(f"{CASES}:refused", script=script, words=flags.split()).results
        assert f"{flag} {teacher}" in said and "another vocabulary" in said
