"""The recipes' data preparation: what a dataset holds, and what is refused."""

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "examples"
sys.path.append(str(EXAMPLES))

from shared import corpus, prepare_data  # noqa: E402  (the examples are on the path now)
from shared import tokenizer as recipe_tokenizer  # noqa: E402

pytest.importorskip("megatron.core.datasets.indexed_dataset")


def texts(count: int) -> list[str]:
    """Different documents, with more than ASCII and with the name of a special token."""
    return [
        f"Document {number}: the quick brown fox jumps over {number * 7919} dogs — größer, 日本.\n"
        f"A line that names <|endoftext|> is text.\n" * (1 + number % 3)
        for number in range(count)
    ]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": text, "id": number}) for number, text in enumerate(texts(200))]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of a small corpus."""
    monkeypatch.setattr(corpus, "UNIT_BYTES", 8 * 1024)


def settings(*text: Path, **changes: Any) -> prepare_data.Settings:
    values: dict[str, Any] = {
        "key": "text",
        "tokenizer": None,
        "vocab_size": 400,
        "held_out_fraction": 0.1,
    }
    return prepare_data.Settings(text=list(text), **(values | changes))


def prepare(out: Path, *text: Path, workers: int = 1, **changes: Any) -> dict[str, Any]:
    return prepare_data.prepare(settings(*text, **changes), out, workers, lambda line: None)


def stored(folder: Path, split: str) -> list[list[int]]:
    """The documents of a dataset, as Megatron reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(folder / split))
    assert len(dataset) == len(dataset.document_indices) - 1
    return [tokens.tolist() for tokens in dataset]


def decoded(folder: Path, split: str) -> list[str]:
    """The same as text; every document ends with the end of document and has it nowhere else."""
    record = prepare_data.dataset_record(folder)
    decoder = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    end = record["tokenizer"]["end_of_document"]
    documents = stored(folder, split)
    assert all(tokens.index(end) == len(tokens) - 1 for tokens in documents)
    return [decoder.decode(tokens[:-1]) for tokens in documents]


@pytest.mark.usefixtures("small_units")
def test_dataset_holds_every_document_once_and_in_order(jsonl: Path, tmp_path: Path) -> None:
    record = prepare(tmp_path / "data", jsonl)
    train, held_out = (decoded(tmp_path / "data", split) for split in ("train", "held_out"))
    expected = texts(200)
    assert train == [text for text in expected if not corpus.is_held_out(text, 0.1)]
    assert held_out == [text for text in expected if corpus.is_held_out(text, 0.1)]
    assert 5 < len(held_out) < 40
    assert record["documents"] == {"train": len(train), "held_out": len(held_out)}
    assert record["bytes"]["train"] == sum(len(text.encode()) for text in train)
    assert record["tokens"]["train"] == sum(map(len, stored(tmp_path / "data", "train")))
    assert not (tmp_path / "data.building").exists()
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        *("dataset.json", "held_out.bin", "held_out.idx", "tokenizer", "train.bin", "train.idx")
    ]


def test_megatrons_tokenizer_reads_what_was_prepared(jsonl: Path, tmp_path: Path) -> None:
    from megatron.core.tokenizers import MegatronTokenizer

    prepare(tmp_path / "data", jsonl)
    flags = prepare_data.dataset_flags(tmp_path / "data")
    assert flags["tokenizer-type"] == "HuggingFaceTokenizer"
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(flags["tokenizer-model"]), metadata_path={"library": "huggingface"}
    )
    record = prepare_data.dataset_record(tmp_path / "data")["tokenizer"]
    assert tokenizer.eod == record["end_of_document"]
    assert tokenizer.vocab_size == record["vocab_size"] == 400
    document = stored(tmp_path / "data", "train")[0]
    assert tokenizer.detokenize(document[:-1]) == decoded(tmp_path / "data", "train")[0]
    assert max(map(max, stored(tmp_path / "data", "train"))) < tokenizer.vocab_size


def test_a_large_text_file_is_divided_and_a_packed_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "TEXT_DOCUMENT_BYTES", 2000)
    monkeypatch.setattr(corpus, "UNIT_BYTES", 5000)
    folder = tmp_path / "text"
    (folder / "sub").mkdir(parents=True)
    (folder / "book.txt").write_text("".join(texts(150)))
    (folder / "sub" / "packed.txt.gz").write_bytes(gzip.compress(b"packed\n" * 20))
    (folder / "sub" / "empty.txt").touch()
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / ".hidden").write_text("hidden")
    record = prepare(tmp_path / "data", folder)
    parts = decoded(tmp_path / "data", "train") + decoded(tmp_path / "data", "held_out")
    assert sorted("".join(parts)) == sorted("".join(texts(150)) + "packed\n" * 20)
    assert all(len(part.encode()) < 2400 and part.endswith("\n") for part in parts)
    assert record["skipped_files"] == [str(folder / "picture.png")]
    assert record["files"] == 2


@pytest.mark.usefixtures("small_units")
def test_lines_at_the_border_of_two_pieces_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(b"".join(b"%07d\n" % number for number in range(3000)))  # 8 bytes each
    files = corpus.list_files([path])
    lines = [
        line
        for unit in corpus.make_units(files)
        for piece in unit
        for _, line in corpus._lines(piece)
    ]
    assert b"".join(lines) == path.read_bytes()
    assert len(corpus.make_units(files)) == 3


@pytest.fixture
def packed_files(tmp_path: Path) -> Path:
    """Five packed files: each is a part of its own."""
    folder = tmp_path / "packed"
    folder.mkdir()
    for number in range(5):
        lines = "".join(json.dumps({"text": f"{number} {text}"}) + "\n" for text in texts(40))
        (folder / f"{number:02d}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def test_interrupted_preparation_goes_on_and_gives_the_same_bytes(
    packed_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "UNIT_BYTES", 1)  # a file a part
    prepare(tmp_path / "whole", packed_files)
    written: list[int] = []
    write = prepare_data._Worker.write

    def write_until_killed(worker: Any, index: int, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write(worker, index, *rest)
        written.append(index)

    monkeypatch.setattr(prepare_data._Worker, "write", write_until_killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "data", packed_files)
    assert not (tmp_path / "data").exists()
    with pytest.raises(ValueError, match="was begun with other held-out fraction; remove it"):
        prepare(tmp_path / "data", packed_files, held_out_fraction=0.2)

    went_on: list[int] = []
    monkeypatch.setattr(
        prepare_data._Worker,
        "write",
        lambda worker, index, *rest: went_on.append(index) or write(worker, index, *rest),
    )
    prepare(tmp_path / "data", packed_files)
    assert sorted(written + went_on) == list(range(5))
    for name in ("train.bin", "train.idx", "held_out.bin", "held_out.idx"):
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_processes_give_the_bytes_of_one(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "UNIT_BYTES", 16 * 1024)  # three parts
    prepare(tmp_path / "one", jsonl)
    prepare(tmp_path / "two", jsonl, workers=2)
    for name in ("train.bin", "train.idx", "held_out.bin", "held_out.idx"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_two_preparations_of_one_dataset_are_refused(jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / "data.building").mkdir()
    with (
        prepare_data._locked(tmp_path / "data.building"),
        pytest.raises(ValueError, match="another process prepares this dataset now"),
    ):
        prepare(tmp_path / "data", jsonl)


def gpt2_files(folder: Path) -> None:
    """vocab.json and merges.txt, as GPT-2 has them."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts(50), 350, special_tokens=["<|endoftext|>"])
    folder.mkdir()
    made.save_model(str(folder))


def sentencepiece_file(folder: Path) -> None:
    import sentencepiece

    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(50)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        minloglevel=2,
    )


def hugging_face_files(folder: Path) -> None:
    folder.mkdir()
    recipe_tokenizer.train(texts(50), 320, folder)
    (folder / "model.safetensors").write_bytes(b"not to be copied")


@pytest.mark.parametrize(
    ("make", "kind", "vocab_size"),
    [
        (gpt2_files, "HuggingFaceTokenizer", 350),
        (sentencepiece_file, "Llama2Tokenizer", 380),
        (hugging_face_files, "HuggingFaceTokenizer", 320),
    ],
    ids=["GPT-2", "SentencePiece", "Hugging Face"],
)
def test_users_tokenizer_is_taken(
    jsonl: Path, tmp_path: Path, make: Any, kind: str, vocab_size: int
) -> None:
    from megatron.core.tokenizers import MegatronTokenizer

    make(tmp_path / "mine")
    record = prepare(tmp_path / "data", jsonl, tokenizer=tmp_path / "mine")["tokenizer"]
    assert (record["flags"]["tokenizer-type"], record["vocab_size"]) == (kind, vocab_size)
    assert not list((tmp_path / "data").rglob("*.safetensors"))
    (tmp_path / "mine").rename(tmp_path / "moved")  # the dataset needs nothing of it
    flags = prepare_data.dataset_flags(tmp_path / "data")
    library = "sentencepiece" if kind == "Llama2Tokenizer" else "huggingface"
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(flags["tokenizer-model"]), metadata_path={"library": library}
    )
    assert (tokenizer.vocab_size, tokenizer.eod) == (vocab_size, record["end_of_document"])
    *document, end = stored(tmp_path / "data", "train")[0]
    assert end == tokenizer.eod
    first = next(text for text in texts(200) if not corpus.is_held_out(text, 0.1))
    assert tokenizer.detokenize(document).split() == first.split()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing", None, "no such file or folder"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n", "of its 0 documents none is train and none is held out"),
        ("one.txt", b"one document\n", "of its 1 documents none is train; give more text"),
        ("latin.txt", "ä".encode("latin1") * 9, "is not UTF-8 at byte 0 (0xe4); convert"),
        ("late.txt", b"good\n" * 99 + b"\xff\n", "is not UTF-8 at byte 495 (0xff)"),
        ("utf16.txt", "text".encode("utf-16"), "is not text (a NUL is among its first"),
        ("key.jsonl", b'{"body": "x", "id": 1}\n', "has no 'text', but 'body', 'id'; name the"),
        ("bad.jsonl", b'{"text": "x"}\n{"text"\n', "the line at byte 14 is no JSON"),
        ("list.jsonl", b'["x"]\n', "the line at byte 0 is no JSON object"),
        ("number.jsonl", b'{"text": 1}\n', "'text' of the object at byte 0 is no string"),
        ("broken.txt.gz", b"no gzip", "cannot be read as gzip"),
    ],
)
def test_text_that_cannot_be_used_is_refused(
    tmp_path: Path, name: str, data: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        prepare(tmp_path / "data", path)
    assert str(path) in str(error.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out_fraction": 0.0}, "--held-out-fraction 0.0: must be above 0"),
        ({"held_out_fraction": float("nan")}, "--held-out-fraction nan"),
        ({"vocab_size": 256}, "--vocab-size 256: must be at least 257"),
        (
            {"tokenizer": Path("/no/such")},
            "--tokenizer /no/such: no tokenizer there; give a folder",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    jsonl: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "data", jsonl, **changes)


def test_command_says_what_it_made_and_refuses_a_folder_that_exists(
    jsonl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A command's way to end on SIGTERM is not for the process of the tests.
    monkeypatch.setattr("shared.command.signal.signal", lambda *handler: None)
    made = ["--out", str(tmp_path / "data"), "--text", str(jsonl), "--workers", "1"]
    made += ["--vocab-size", "400", "--held-out-fraction", "0.1"]
    assert prepare_data.main(50257, made) == 0
    record = prepare_data.dataset_record(tmp_path / "data")
    output = capsys.readouterr().out
    assert f"{record['tokens']['train']:,} tokens in {record['documents']['train']} doc" in output
    assert "byte-level BPE, trained on the training text, 400 tokens" in output
    assert prepare_data.main(50257, made) == 2
    assert "exists already; give a new folder" in capsys.readouterr().err
    assert prepare_data.main(50257, [*made, "--tokenizer", str(tmp_path)]) == 2
    assert "--vocab-size: --tokenizer has its own" in capsys.readouterr().err
