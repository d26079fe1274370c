# SPDX-License-Identifier: Apache-2.0
"""The tasks of the papers on small files of the hub's format: splits, kept data, models, errors."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grng.__main__ import main
from grng.tasks import (
    TASKS,
    ClassificationData,
    DataError,
    LoadRequest,
    ModelOptions,
    glue,
    hub,
    image_files,
    images,
    parquet,
    pretrained,
)
from grng.tasks.image_model import Enter
from grng.tasks.prepared import Prepared, read_or_prepare
from tests.integration import paper_files as small

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in hub.LIBRARIES),
    reason="needs datasets, transformers, peft and pillow (scripts/setup.sh installs them)",
)
CPU = torch.device("cpu")
TEXT_TASKS = [glue.MNLI, glue.QNLI, glue.SST2, glue.COLA, glue.MRPC, glue.STSB]
IMAGE_TASKS = [images.CIFAR10, images.CIFAR100, images.FOOD101, images.OXFORD_PET]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both models."""
    folder = tmp_path_factory.mktemp("papers")
    small.write_roberta(folder)
    small.write_vit(folder)
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A folder with both models and no data."""
    (tmp_path / "models").symlink_to(models / "models")
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is not there is not fetched."""
    import huggingface_hub

    def refuse(name: str, **options: Any) -> None:
        raise OSError(f"no network to {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    yield


def write(task: glue.Glue | images.ImageSet, folder: Path, **options: Any) -> None:
    """Small files of a task."""
    own = folder / task.name
    if isinstance(task, glue.Glue):
        labels = [0.0, 5.0, 2.25] if task.classes is None else list(range(task.classes))
        small.write_texts(own, task.texts, labels, test=task.test, **options)
        return
    size = (32, 32) if task.side == 32 else (40, 30)
    columns, parts = (task.image, task.label), ("train", task.test)
    # As on the hub, in a folder of their own.
    small.write_images(own / task.folder, columns, task.classes, size=size, parts=parts, **options)


def load(name: str, folder: Path, **options: Any) -> ClassificationData:
    return TASKS[name].load(LoadRequest(CPU, folder, **options))


@pytest.mark.parametrize("task", [*TEXT_TASKS, *IMAGE_TASKS], ids=lambda task: task.name)
def test_task_is_loaded_and_its_model_predicts(
    task: glue.Glue | images.ImageSet, folder: Path
) -> None:
    write(task, folder)
    entry = TASKS[task.name]
    data = load(task.name, folder, validation=6)
    assert data.validation is not None
    parts = (data.train_labels, data.validation[1], data.test_labels)
    assert [len(labels) for labels in parts] == [18, 6, 12]
    torch.manual_seed(0)
    model = entry.models[entry.default_model].build(ModelOptions(lora_rank=2, data_dir=folder))
    outputs = model(data.test_inputs[:3])
    assert outputs.shape == (3, entry.classes)
    if entry.likelihood == "gaussian":
        assert sorted(set(data.test_labels.tolist())) == [-2.5, -0.25, 2.5]
    else:
        assert set(torch.cat(parts).tolist()) <= set(range(entry.classes))
    assert {"train-00000-of-00001.parquet"} < set(data.checksums)
    # Made again, it is the same; so is the file that was kept.
    again = load(task.name, folder, validation=6)
    assert torch.equal(again.train_inputs, data.train_inputs)
    assert again.checksums == data.checksums


@pytest.mark.parametrize("name", ["cola", "stsb", "cifar10"])
def test_task_is_compared(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = next(task for task in (*TEXT_TASKS, *IMAGE_TASKS) if task.name == name)
    write(task, folder)
    options = ("--optimizers", "ring,rkalman,adamw", "--steps", "3", "--checkpoints", "1")
    shared = ("--validation", "4", "--batch-size", "4", "--device", "cpu", "--threads", "1")
    rank = ("--lora-rank", "3", "--data-dir", str(folder), "--out", str(tmp_path / "out"))
    assert main(["compare", "--task", name, *options, *shared, *rank]) == 0
    (path,) = (tmp_path / "out").glob("*/result.json")
    result = json.loads(path.read_text())
    assert result["config"]["model_options"] == {"lora_rank": 3}
    assert str(tmp_path) not in path.read_text()
    measure = result["config"]["measure"]
    assert measure == {"cola": "matthews", "stsb": "pearson"}.get(name, "accuracy")
    for run in result["runs"]:
        (last,) = run["epochs"]
        assert len(run["step_loss"]) == 3
        assert (last["test_correlation"] is None) == (measure == "accuracy")
        assert (last["test_accuracy"] is None) == (measure == "pearson")
    kept = [key for key in result["data"]["sha256_decompressed"] if "labels" in key]
    assert len(kept) == 2
    assert f"test {'acc %' if measure == 'accuracy' else measure}" in capsys.readouterr().out


def grng_offline(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, where the hub's library knows from the start that it is offline."""
    return subprocess.run(
        [sys.executable, "-m", "grng", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_task_is_compared_offline_with_its_own_numbers_of_samples(folder: Path) -> None:
    """Nothing but the task, its data and what to run is said."""
    write(glue.SST2, folder, rows=(1100, 30))
    options = ("--data-dir", str(folder), "--optimizers", "ring,adamw", "--steps", "3")
    done = grng_offline(folder, "compare", "--task", "sst2", *options)
    assert (done.returncode, done.stderr) == (0, "")
    (path,) = (folder / "results").glob("*/result.json")
    data = json.loads(path.read_text())["data"]
    samples = [data[f"{part}_samples"] for part in ("train", "validation", "test")]
    assert samples == [100, 1000, 30]


def test_rank_zero_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--task", "sst2", "--lora-rank", "0"]) == 2
    assert "--lora-rank must be at least 1, got 0" in capsys.readouterr().err


def test_numbers_have_no_stream(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--task", "stsb", "--stream", "9"]) == 2
    assert "--stream does not apply to task 'stsb'" in capsys.readouterr().err


# ---- splits ----


def test_samples_are_in_the_order_of_a_hash_and_images_stay_with_their_labels(
    folder: Path,
) -> None:
    write(images.CIFAR10, folder, files=2)
    data = load("cifar10", folder, validation=6, train_limit=10)
    # The files one after the other: even numbers, then odd ones.
    numbers = [*range(0, 24, 2), *range(1, 24, 2)]
    order = sorted(range(24), key=lambda i: hashlib.sha256(f"cifar10 train {i}".encode()).digest())
    assert order != list(range(24))
    expected = [numbers[index] for index in order]
    from PIL import Image

    def pixels(number: int) -> torch.Tensor:
        with Image.open(io.BytesIO(small.picture(32, 32, seed=number))) as image:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    assert data.validation is not None
    parts = [
        (data.train_inputs, data.train_labels, expected[:10]),
        (*data.validation, expected[18:]),
        (data.test_inputs, data.test_labels, list(range(12))),
    ]
    for inputs, labels, those in parts:
        assert inputs.dtype == torch.uint8
        assert labels.tolist() == [number % 10 for number in those]
        for place, number in enumerate(those):
            assert torch.equal(inputs[place], pixels(number))


def test_texts_are_in_the_order_of_a_hash(folder: Path) -> None:
    own = folder / "stsb"
    columns = ("sentence1", "sentence2")
    small.write_texts(own, columns, [index / 4 for index in range(20)], rows=(20, 12))
    data = load("stsb", folder, validation=5, train_limit=9)
    order = sorted(range(20), key=lambda i: hashlib.sha256(f"stsb {i}".encode()).digest())
    assert data.validation is not None
    expected = [index / 4 - 2.5 for index in order]
    assert data.train_labels.tolist() == expected[:9]
    assert data.validation[1].tolist() == expected[15:]
    assert data.test_labels.tolist() == [index / 4 - 2.5 for index in range(12)]
    # <s> first </s> </s> second </s>, padded with 1.
    first, second = small.sentences(20, 0), small.sentences(20, 1)
    words = {word: 5 + place for place, word in enumerate(small.WORDS)}
    index = order[0]
    ids = [0, *(words[w] for w in first[index].split()), 2, 2]
    ids += [*(words[w] for w in second[index].split()), 2]
    row = data.train_inputs[0].tolist()
    assert row[: len(ids)] == ids
    assert set(row[len(ids) :]) <= {glue.PAD_ID}
    # No column is padding alone.
    assert (data.train_inputs.ne(glue.PAD_ID).sum(dim=1).max()) <= data.train_inputs.shape[1] <= 20


def test_files_that_datasets_wrote_are_read_like_plain_ones(folder: Path) -> None:
    """With its own types of images and classes, as the hub's files have them."""
    import datasets

    write(images.OXFORD_PET, folder)
    plain = load("oxford-pet", folder)
    types = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=37)}
    )
    own = folder / "oxford-pet/data"
    for path in own.glob("*.parquet"):
        rows = datasets.load_dataset(
            "parquet", data_files=str(path), split="train", cache_dir=str(folder / "hf")
        )
        rows.cast(types).to_parquet(path)
    typed = load("oxford-pet", folder)
    assert typed.checksums["train-00000-of-00001.parquet"] != plain.checksums.get(
        "train-00000-of-00001.parquet"
    )
    assert torch.equal(typed.train_inputs, plain.train_inputs)
    assert torch.equal(typed.train_labels, plain.train_labels)


def test_folders_may_have_any_name(tmp_path: Path) -> None:
    path = small.write_parquet(tmp_path / "a [b] *c#d?" / "train.parquet", label=[1, 2])
    assert [row["label"] for _, row in parquet.read_rows([path], ["label"])] == [1, 2]


# ---- kept data ----


def refuse_rows(*_: Any) -> Iterator[None]:
    raise AssertionError("the source was read again")


@pytest.mark.parametrize(("name", "module"), [("sst2", glue), ("cifar10", image_files)])
def test_what_was_made_is_kept_and_made_again_if_damaged_or_of_other_files(
    name: str, module: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = glue.SST2 if name == "sst2" else images.CIFAR10
    write(task, folder)
    data = load(name, folder)
    read = module.read_rows
    monkeypatch.setattr(module, "read_rows", refuse_rows)
    assert torch.equal(load(name, folder).train_inputs, data.train_inputs)
    suffix = ".npz" if name == "sst2" else ".npy"
    (kept,) = (folder / name).glob(f"train-*{suffix}")
    content = bytearray(kept.read_bytes())
    # One bit of the data.
    content[len(content) // 2] ^= 1
    # Another file of the same name: the first is still mapped.
    kept.unlink()
    kept.write_bytes(content)
    with pytest.raises(AssertionError, match="read again"):
        load(name, folder)
    monkeypatch.setattr(module, "read_rows", read)
    assert torch.equal(load(name, folder).train_inputs, data.train_inputs)
    write(task, folder, rows=(25, 12))
    assert len(load(name, folder).train_labels) == 25


def test_kept_token_ids_must_be_those_of_their_checksum(tmp_path: Path) -> None:
    """A whole file with other content: what its own format checks is not enough."""
    made = Prepared(np.arange(6, dtype=np.int32).reshape(2, 3), np.asarray([0, 1]))
    path = tmp_path / "kept.npz"
    np.savez(path, token_ids=made.token_ids + 1, labels=made.labels, sha256=made.sha256())
    reported: list[str] = []
    found = read_or_prepare(path, lambda: made, reported.append)
    assert np.array_equal(found.token_ids, made.token_ids)
    # Now it is whole, and nothing is made.
    again = read_or_prepare(path, refuse_prepared, reported.append)
    assert np.array_equal(again.token_ids, made.token_ids)
    assert reported == []


def refuse_prepared() -> Prepared:
    raise AssertionError("it was made again")


def test_interrupted_preparation_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(images.CIFAR10, folder)
    calls = []

    def interrupt(content: bytes, side: int) -> Any:
        calls.append(content)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return np.zeros((3, side, side), dtype=np.uint8)

    monkeypatch.setattr(image_files, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load("cifar10", folder)
    left = [path for path in (folder / "cifar10").rglob("*") if path.is_file()]
    assert {path.suffix for path in left} == {".parquet"}


def test_images_are_in_a_mapped_file(folder: Path) -> None:
    write(images.CIFAR10, folder)
    data = load("cifar10", folder)
    (kept,) = (folder / "cifar10").glob("train-*.npy")
    # Address of the tensor in one of the file's own mappings.
    address = data.train_inputs.data_ptr()
    maps = Path("/proc/self/maps").read_text().splitlines()
    mine = [line for line in maps if line.endswith(str(kept.resolve()))]
    spans = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in mine]
    assert any(low <= address < high for low, high in spans)


# ---- images ----


def test_shorter_side_is_resized_and_the_middle_is_kept() -> None:
    from PIL import Image

    # Red, then a green square in the middle, then blue.
    wide = np.zeros((64, 192, 3), dtype=np.uint8)
    wide[:, :64, 0] = wide[:, 64:128, 1] = wide[:, 128:, 2] = 255
    for pixels in (wide, wide.transpose(1, 0, 2)):
        stream = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
        found = image_files.decode(stream.getvalue(), 32)
        assert found.shape == (3, 32, 32)
        middle = found[:, 2:-2, 2:-2]
        assert (middle[1].min(), middle[0].max(), middle[2].max()) == (255, 0, 0)


def test_images_without_three_channels_are_read() -> None:
    from PIL import Image

    for mode in ("L", "P", "RGBA", "CMYK"):
        stream = io.BytesIO()
        file_format = "JPEG" if mode == "CMYK" else "PNG"
        Image.new(mode, (40, 50)).save(stream, file_format)
        assert image_files.decode(stream.getvalue(), 32).shape == (3, 32, 32)


def test_bytes_become_numbers_on_the_model_s_side() -> None:
    levels = torch.tensor([0, 255, 51], dtype=torch.uint8)
    batch = levels[:, None, None, None].expand(3, 3, 8, 8)
    found = Enter(16)(batch)
    assert (found.shape, found.dtype) == ((3, 3, 16, 16), torch.float32)
    torch.testing.assert_close(found[:, 0, 3, 5], torch.tensor([-1.0, 1.0, -0.6]))
    # Nothing is enlarged that has the size already.
    same = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(Enter(16)(same), same.float() / 127.5 - 1, rtol=0, atol=1e-6)


# ---- models ----


def build(name: str, folder: Path, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    entry = TASKS[name]
    return entry.models[entry.default_model].build(ModelOptions(lora_rank=2, data_dir=folder))


@pytest.mark.parametrize("name", ["sst2", "cifar10"])
def test_only_lora_and_head_are_trained_and_weights_follow_the_seed(
    name: str, folder: Path
) -> None:
    model = build(name, folder)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # 2 layers, query and value, A and B, width 16; then the head.
    classes = TASKS[name].classes
    assert sum(p.numel() for p in trained.values()) == 2 * 2 * 2 * 2 * 16 + 17 * classes
    assert all("lora_" in n or n.startswith("head.") for n in trained)
    # The first model of a process reads the file; the draws of the seed must not depend on it.
    again, other = build(name, folder), build(name, folder, seed=1)
    pairs = list(zip(model.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(one, two) for one, two in pairs)
    assert all(one.data_ptr() != two.data_ptr() for one, two in pairs)
    pretrained._read.cache_clear()
    fresh = build(name, folder)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True)
    )
    assert not torch.equal(model.head.weight, other.head.weight)


def test_pretrained_weights_are_in_their_places(folder: Path) -> None:
    import transformers

    path = folder / "models" / "roberta-base"
    whole = transformers.RobertaModel.from_pretrained(path, add_pooling_layer=False).eval()
    model = build("sst2", folder)
    model.head = torch.nn.Identity()
    ids = torch.tensor([[0, 5, 6, 7, 2, 1, 1], [0, 9, 8, 7, 6, 5, 2]])
    with torch.no_grad():
        expected = whole(ids, attention_mask=ids.ne(1).long()).last_hidden_state[:, 0]
        # LoRA starts at zero, and the model, in training mode, drops nothing out.
        assert model.training
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5)
        longer = torch.cat([ids, torch.ones(2, 9, dtype=torch.int64)], dim=1)
        torch.testing.assert_close(model(longer), expected, rtol=0, atol=1e-5)
    vit = transformers.ViTModel.from_pretrained(
        folder / "models" / "vit-base-patch16-224-in21k", add_pooling_layer=False
    ).eval()
    classifier = build("cifar10", folder)
    classifier.head = torch.nn.Identity()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        state = vit(pixels.float() / 127.5 - 1).last_hidden_state[:, 0]
        torch.testing.assert_close(classifier(pixels), state, rtol=0, atol=1e-5)


# ---- errors ----


def error_of(name: str, folder: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(name, folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_data_says_what_was_looked_for_where_and_what_to_do(folder: Path) -> None:
    message = error_of("food101", folder)
    assert f"{folder}/food101: lacks train.parquet or train-*-of-*.parquet" in message
    assert "fetching ethz/food101 failed: no network to ethz/food101" in message
    by_hand = '`hf download ethz/food101 --include "data/*" --repo-type dataset --revision e06acf2a'
    assert by_hand in message
    assert message.endswith("--local-dir DATA_DIR/food101`, then pass --data-dir DATA_DIR")


def test_missing_data_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = grng_offline(tmp_path, "compare", "--task", "sst2", "--data-dir", str(tmp_path))
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"grng compare: {tmp_path}/models/roberta-base: lacks config.json")
    assert "HF_HUB_OFFLINE" in lines[0]


def test_missing_libraries_name_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(glue.SST2, folder)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("datasets", "PIL") else find(name),
    )
    wanted = 'the tasks of the papers need datasets, PIL: pip install "grng-kernels[papers]"'
    assert wanted in error_of("sst2", folder)
    with pytest.raises(DataError, match="need datasets, PIL"):
        build("sst2", folder)


def test_a_missing_file_of_several_is_named(folder: Path) -> None:
    write(images.CIFAR10, folder, files=3)
    (folder / "cifar10/plain_text/train-00001-of-00003.parquet").unlink()
    assert "lacks train-00001-of-00003.parquet" in error_of("cifar10", folder)


def test_a_file_too_many_is_named(folder: Path) -> None:
    write(images.CIFAR10, folder)
    small.write_images(folder / "cifar10", ("img", "label"), 10)
    assert "has 2 files for train, 1 expected" in error_of("cifar10", folder)


def test_wrong_columns_name_file_and_column(folder: Path) -> None:
    small.write_texts(folder / "sst2", ("text",), [0, 1])
    message = error_of("sst2", folder)
    assert (
        "train-00000-of-00001.parquet: lacks the column 'sentence'; it has text, label" in message
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sentence": ["a"], "label": [-1]}, "column 'label' must have 0..1, got -1"),
        ({"sentence": ["a"], "label": [None]}, "column 'label' must have 0..1, got None"),
        ({"sentence": [None], "label": [0]}, "column 'sentence' must have texts, got None"),
        ({"sentence": [], "label": []}, "has no rows"),
    ],
)
def test_wrong_texts_name_file_and_column(
    columns: dict[str, list[Any]], message: str, folder: Path
) -> None:
    write(glue.SST2, folder)
    path = small.write_parquet(folder / "sst2/validation-00000-of-00001.parquet", **columns)
    assert f"{path}: {message}" in error_of("sst2", folder)


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        ({"bytes": b"no image", "path": ""}, 0, "column 'img' has an image that is damaged"),
        ({"bytes": small.picture(8, 8, 0)[:90], "path": ""}, 0, "has an image that is damaged"),
        ({"bytes": None, "path": "a.png"}, 0, "column 'img' must have images with their bytes"),
        ({"bytes": small.picture(8, 8, 0), "path": ""}, 10, "'label' must have 0..9, got 10"),
    ],
)
def test_wrong_images_name_file_and_column(
    image: dict[str, Any], label: int, message: str, folder: Path
) -> None:
    write(images.CIFAR10, folder)
    path = folder / "cifar10/plain_text/train-00000-of-00001.parquet"
    small.write_parquet(path, img=[image], label=[label])
    found = error_of("cifar10", folder)
    assert str(path) in found and message in found


@pytest.mark.parametrize("damage", [lambda b: b[:200], lambda b: b"<html>", lambda b: b""])
def test_damaged_files_are_named(damage: Callable[[bytes], bytes], folder: Path) -> None:
    write(glue.SST2, folder)
    path = folder / "sst2/train-00000-of-00001.parquet"
    path.write_bytes(damage(path.read_bytes()))
    message = error_of("sst2", folder)
    assert message.startswith(f"{path}: damaged: ")
    assert "delete the file to have it fetched again" in message


def test_file_damaged_in_the_middle_is_named(folder: Path) -> None:
    """Its last bytes, which say what is in it, are whole."""
    write(glue.SST2, folder)
    path = folder / "sst2/train-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet: damaged"):
        list(parquet.read_rows([path], ["sentence", "label"]))


def test_damaged_weights_are_named(folder: Path, tmp_path: Path) -> None:
    real = (folder / "models").resolve()
    (folder / "models").unlink()
    for name in ("roberta-base", "vit-base-patch16-224-in21k"):
        own = folder / "models" / name
        own.mkdir(parents=True)
        for path in (real / name).iterdir():
            (own / path.name).write_bytes(path.read_bytes())
    roberta = folder / "models" / "roberta-base"
    weights = (roberta / "model.safetensors").read_bytes()
    (roberta / "model.safetensors").write_bytes(weights[:-50])
    with pytest.raises(DataError, match=r"roberta-base: not a RobertaModel: .") as caught:
        build("sst2", folder)
    assert "\n" not in str(caught.value)
    # Those of another model.
    other = folder / "models/vit-base-patch16-224-in21k/model.safetensors"
    (roberta / "model.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"model\.safetensors: lacks \d+ weights of a RobertaModel"):
        build("sst2", folder)
    (roberta / "tokenizer.json").unlink()
    with pytest.raises(
        DataError, match=r"roberta-base: lacks tokenizer\.json; fetching \S+ failed"
    ):
        build("sst2", folder)


# ---- fetching ----


def test_what_is_missing_is_fetched_at_its_revision_and_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    calls: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **options: Any) -> None:
        calls.append((name, options))
        # As on the hub: in the folder of the task.
        small.write_texts(options["local_dir"] / "mnli", ("premise", "hypothesis"), [0, 1, 2])
        own = options["local_dir"] / "mnli"
        (own / "validation-00000-of-00001.parquet").rename(
            own / "validation_matched-00000-of-00001.parquet"
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    reported: list[str] = []
    data = load("mnli", folder, report=reported.append)
    ((name, options),) = calls
    assert name == "nyu-mll/glue"
    assert options["revision"] == glue.REPOSITORY.revision
    assert options["repo_type"] == "dataset"
    wanted = ["mnli/train-*.parquet", "mnli/validation_matched-*.parquet"]
    assert options["allow_patterns"] == wanted
    assert data.source == f"nyu-mll/glue at {glue.REPOSITORY.revision}"
    assert "fetching nyu-mll/glue from the Hugging Face hub" in reported[0]
    assert load("mnli", folder).source == "--data-dir"
    assert len(calls) == 1


def test_without_data_dir_the_cache_folder_is_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRNG_DATA", str(folder))
    write(glue.MRPC, folder)
    data = TASKS["mrpc"].load(LoadRequest(CPU))
    assert (len(data.train_labels), data.source) == (24, "cache folder")


def test_every_revision_is_a_commit() -> None:
    repositories = [glue.REPOSITORY, *(task.repository for task in IMAGE_TASKS)]
    repositories += [pretrained.ROBERTA.repository, pretrained.VIT.repository]
    assert all(len(r.revision) == 40 and int(r.revision, 16) for r in repositories)


def test_longer_texts_are_cut(folder: Path) -> None:
    own = folder / "sst2"
    small.write_texts(own, ("sentence",), [0, 1])
    small.write_parquet(
        own / "train-00000-of-00001.parquet", sentence=["good " * 300, "bad"], label=[0, 1]
    )
    data = load("sst2", folder)
    assert data.train_inputs.shape == (2, glue.TOKENS)
