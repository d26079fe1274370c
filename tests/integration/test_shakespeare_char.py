# SPDX-License-Identifier: Apache-2.0
"""The task shakespeare-char: text, windows, splits, losses per character, and a comparison by loss."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from grng.__main__ import main
from grng.compare.evaluation import evaluate
from grng.compare.protocols import take_step
from grng.tasks import TASKS, DataError, LoadRequest, Model, ModelOptions, shakespeare_char
from grng.tasks.char_transformer import CharTransformer
from grng.tasks.shakespeare_text import PLAYS, from_first_act
from tests.integration.archives import write_archive

CPU = torch.device("cpu")
TEST = 12
# Two lines, over and over: easy to learn.
SPEECH = "\n\nKING.\nThe crown is lost to us, my lord, 1600 times;\nwho brings it back again?"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten plays of one speech each, all different in their headings."""
    plays = {
        f"shksprdata/texts/{name}_gut.txt": f"{name}\nPersons\n\nACT I. Of {name}.{SPEECH * 6}\n"
        for name in PLAYS
    }
    write_archive(tmp_path, plays, monkeypatch)
    monkeypatch.setattr(shakespeare_char, "_TEST", TEST)
    return tmp_path


def decode(characters: torch.Tensor) -> str:
    return "".join(shakespeare_char.ALPHABET[number] for number in characters.flatten().tolist())


def test_text_starts_with_the_first_act_and_has_single_blank_lines() -> None:
    play = "LEAR\n\nPersons: Kent\n\n\nACT I.  \n\n\n\nKent.\n  I thought \n\n"
    assert from_first_act(play) == "ACT I.\n\nKent.\n  I thought"


def test_alphabet_has_no_character_twice_and_others_are_left_out() -> None:
    assert len(set(shakespeare_char.ALPHABET)) == len(shakespeare_char.ALPHABET) == 65
    assert decode(shakespeare_char.encode("Wé are 16 &\tmen;\n[Exit.]")) == "W are  men;\n[Exit.]"
    assert shakespeare_char.encode("").dtype == torch.int64


def test_windows_share_no_character() -> None:
    windows = shakespeare_char.windows(torch.arange(65 * 3 + 64))
    assert torch.equal(windows, torch.arange(65 * 3).reshape(3, 65))


def test_parts_follow_one_another_in_the_text(folder: Path) -> None:
    data = shakespeare_char.load(LoadRequest(CPU, folder, validation=7))
    assert data.validation is not None
    parts = [(data.train_inputs, data.train_labels), data.validation]
    parts.append((data.test_inputs, data.test_labels))
    assert [len(inputs) for inputs, _ in parts][1:] == [7, TEST]
    for inputs, labels in parts:
        assert (inputs.shape[1:], labels.shape) == ((64,), inputs.shape)
        assert (inputs.dtype, labels.dtype) == (torch.int64, torch.int64)
        # The label of each character is the next one.
        assert torch.equal(inputs[:, 1:], labels[:, :-1])
    windows = [torch.cat([inputs, labels[:, -1:]], dim=1) for inputs, labels in parts]
    text = "\n\n".join(f"ACT I. Of {name}.{SPEECH * 6}" for name in PLAYS)
    kept = "".join(c for c in text if c in shakespeare_char.ALPHABET)
    assert decode(torch.cat(windows)) == kept[: len(kept) // 65 * 65]
    assert "1" not in kept

    limited = shakespeare_char.load(LoadRequest(CPU, folder, train_limit=3, validation=7))
    assert torch.equal(limited.train_inputs, data.train_inputs[:3])
    assert torch.equal(limited.test_inputs, data.test_inputs)
    assert limited.checksums == data.checksums
    assert re.fullmatch("[0-9a-f]{64}", data.checksums["windows"])


def test_too_little_text_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shakespeare_char, "_TEST", 10_000)
    with pytest.raises(DataError, match=r"shakespeare-char: too little text in .*: \d+ windows"):
        shakespeare_char.load(LoadRequest(CPU, folder))


def test_model_predicts_from_what_came_before_only() -> None:
    torch.manual_seed(0)
    model = shakespeare_char.build_model(ModelOptions()).eval()
    assert 800e3 < sum(parameter.numel() for parameter in model.parameters()) < 850e3
    characters = torch.randint(0, 65, (2, 64))
    changed = characters.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 65
    with torch.no_grad():
        logits, others = model(characters), model(changed)
        short = model(characters[:, :10])
    assert logits.shape == (2, 64, 65)
    torch.testing.assert_close(logits[:, :40], others[:, :40], rtol=0, atol=1e-5)
    assert not torch.allclose(logits[:, 40:], others[:, 40:], atol=1e-3)
    torch.testing.assert_close(short, logits[:, :10], rtol=0, atol=1e-5)


class Table(torch.nn.Module):
    """Logits of the next character that depend on the character alone."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Embedding(5, 5)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        return self.logits(characters)


def test_losses_and_accuracies_are_means_over_the_characters() -> None:
    torch.manual_seed(0)
    model = Table()
    inputs, labels = torch.randint(0, 5, (7, 3)), torch.randint(0, 5, (7, 3))
    with torch.no_grad():
        each = [
            (float(F.cross_entropy(logits, label)), int(logits.argmax()) == int(label))
            for logits, label in zip(model(inputs).reshape(-1, 5), labels.flatten(), strict=True)
        ]
    mean_loss = sum(loss for loss, _ in each) / 21
    accuracy = sum(is_right for _, is_right in each) / 21
    assert evaluate(model, inputs, labels, rows=4)[:2] == pytest.approx((mean_loss, accuracy))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, logits = take_step(model, optimizer, "backward", inputs, labels, lambda: None)
    assert float(loss) == pytest.approx(mean_loss)
    assert logits.shape == (7, 3, 5)


def compare(folder: Path, *options: str) -> tuple[int, dict[str, Any], Path]:
    out = folder / "results"
    before = set(out.glob("*"))
    common = ("--task", "shakespeare-char", "--data-dir", str(folder), "--out", str(out))
    code = main(["compare", *common, "--device", "cpu", "--threads", "1", *options])
    (found,) = set(out.glob("*")) - before
    return code, json.loads((found / "result.json").read_text()), found


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Model(lambda _: CharTransformer(65, 64, 16, 1, 2, 2), lambda _: "small", None, 8)
    monkeypatch.setitem(TASKS["shakespeare-char"].models, "transformer", small)


@pytest.mark.usefixtures("small_model")
def test_comparison_is_by_loss(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specs = "adamw:lr=1e-2|1e-5,sgd:lr=1e-4,ring"
    options = ("--batch-size", "8", "--steps", "12", "--checkpoints", "3", "--validation", "7")
    code, result, found = compare(folder, "--optimizers", specs, *options)
    assert code == 0
    for run in result["runs"]:
        assert [epoch["step"] for epoch in run["epochs"]] == [4, 8, 12]
        assert run["step_correct"] == []
    assert (result["config"]["measure"], result["config"]["unit"]) == ("loss", "character")
    rows = {row["optimizer"]: row for row in result["summary"]["rows"]}
    best, worse = rows["adamw:lr=1e-2"], rows["adamw:lr=1e-5"]
    # The lower loss is the better one, and the test set is looked at for that one only.
    assert best["validation_loss"] < worse["validation_loss"]
    assert (best["is_selected"], worse["is_selected"]) == (True, False)
    assert best["final_loss"] > 0
    assert worse["final_loss"] is None
    target = result["summary"]["target"]
    assert (target["optimizer"], target["measure"]) == ("adamw:lr=1e-2", "loss")
    assert target["value"] == best["validation_loss"]
    assert 0 < best["part_of_steps_to_target"] <= 1
    assert worse["part_of_steps_to_target"] is None

    printed = capsys.readouterr().out
    (header,) = (line for line in printed.splitlines() if line.startswith("| optimizer"))
    assert re.search(r"val loss.*test loss.*test acc %.*to adamw.*train loss", header)
    assert re.search(r"sgd:lr=1e-4 seed 0  step 12/12  loss \S+  val loss \d\.\d{4}  ", printed)
    assert "loss and accuracy per character on 12 test samples" in printed
    assert re.search(r"sgd:lr=1e-4 ends \d\.\d{4} above adamw:lr=1e-2; never reached", printed)
    for name in ("loss_accuracy_steps.png", "loss_accuracy_seconds.png"):
        assert (found / name).read_bytes().startswith(b"\x89PNG")


def test_stream_of_characters_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--task", "shakespeare-char", "--stream", "9", "--optimizers", "sgd"]
    assert main(["compare", *options]) == 2
    assert "--stream does not apply to task 'shakespeare-char'" in capsys.readouterr().err
