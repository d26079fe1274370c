# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST files: idx parsing, checksums, order of the sources, content of the cache."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from grng.tasks import DataError, LoadRequest, fashion_mnist, fashion_mnist_sources, fetch
from grng.tasks import fashion_mnist_files as files
from grng.tasks.idx import parse_idx

SHAPES = {
    files.TRAIN_IMAGES: (40, 28, 28),
    files.TRAIN_LABELS: (40,),
    files.TEST_IMAGES: (10, 28, 28),
    files.TEST_LABELS: (10,),
}


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + np.asarray(array.shape, dtype=">u4").tobytes()
    return header + array.tobytes()


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small data set in the real format, with its checksums in place of the real ones."""
    generator = np.random.default_rng(0)
    made = {}
    for name, shape in SHAPES.items():
        array = generator.integers(0, 10, size=shape).astype(np.uint8)
        made[name] = idx_bytes(array)
        expected = files.ExpectedFile(shape, hashlib.sha256(made[name]).hexdigest())
        monkeypatch.setitem(files.FILES, name, expected)
    return made


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(gzip.compress(content))
    return folder


def ignore(line: str) -> None:
    del line


def refuse(scratch: Path, names: tuple[str, ...]) -> Path:
    del scratch, names
    raise DataError("out of order")


def use_sources(monkeypatch: pytest.MonkeyPatch, *sources: files.Source) -> None:
    monkeypatch.setattr(files, "SOURCES", sources)


def test_parse_idx_reads_big_endian_sizes() -> None:
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    np.testing.assert_array_equal(parse_idx(idx_bytes(array), name="x", shape=(2, 3, 4)), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0", "header of 8 bytes was expected, got 2 bytes"),
        (b"\0\0\x0d\1\0\0\0\1\5", "magic must be 0x00000801.*got 0x00000d01"),
        (b"\0\0\x08\1\0\0\0\2\5\5", r"shape must be \[1\], got \[2\]"),
        (b"\0\0\x08\1\0\0\0\1", "must hold 9 bytes, got 8"),
        (b"\0\0\x08\1\0\0\0\1\5\5", "must hold 9 bytes, got 10"),
    ],
)
def test_parse_idx_names_what_is_wrong(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"x: .*{message}"):
        parse_idx(content, name="x", shape=(1,))


def test_load_normalises_and_limits(contents: dict[str, bytes], tmp_path: Path) -> None:
    request = LoadRequest(torch.device("cpu"), write(tmp_path, contents), train_limit=7)
    data = fashion_mnist.load(request)
    assert data.train_inputs.shape == (7, 784)
    assert data.test_inputs.shape == (10, 784)
    assert data.train_labels.dtype == torch.int64
    pixels = np.frombuffer(contents[files.TEST_IMAGES], np.uint8, offset=16).reshape(10, 784)
    expected = (torch.from_numpy(pixels.copy()).double() / 255 - 0.2860) / 0.3530
    # A few roundings of fp32 on numbers of size 1.
    torch.testing.assert_close(data.test_inputs.double(), expected, rtol=0, atol=1e-6)
    assert data.checksums == {name: file.sha256 for name, file in files.FILES.items()}


def test_labels_out_of_range_are_an_error(
    contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents[files.TEST_LABELS] = idx_bytes(np.full(10, 10, dtype=np.uint8))
    checksum = hashlib.sha256(contents[files.TEST_LABELS]).hexdigest()
    monkeypatch.setitem(files.FILES, files.TEST_LABELS, files.ExpectedFile((10,), checksum))
    with pytest.raises(DataError, match="labels must be below 10, got 10"):
        fashion_mnist.load(LoadRequest(torch.device("cpu"), write(tmp_path, contents)))


@pytest.mark.parametrize("damage", ["other content", "truncated", "not gzip"])
def test_damaged_file_names_file_and_checksums(
    contents: dict[str, bytes], tmp_path: Path, damage: str
) -> None:
    write(tmp_path, contents)
    path = tmp_path / files.TRAIN_LABELS
    whole = path.read_bytes()
    changed = {
        "other content": gzip.compress(contents[files.TRAIN_LABELS][:-1] + b"\x63"),
        "truncated": whole[: len(whole) // 2],
        "not gzip": b"<html>",
    }
    path.write_bytes(changed[damage])
    with pytest.raises(DataError) as caught:
        files.obtain(tmp_path, ignore)
    message = str(caught.value)
    assert str(path) in message
    assert f"must be {files.FILES[files.TRAIN_LABELS].sha256}, got " in message
    assert "\n" not in message


def test_checksum_ignores_how_the_file_was_compressed(
    contents: dict[str, bytes], tmp_path: Path
) -> None:
    write(tmp_path, contents)
    path = tmp_path / files.TEST_LABELS
    path.write_bytes(gzip.compress(contents[files.TEST_LABELS], compresslevel=1, mtime=12345))
    assert files.obtain(tmp_path, ignore).contents == contents


def test_sources_are_tried_in_order_and_the_first_good_one_is_cached(
    contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fail(scratch: Path, names: tuple[str, ...]) -> Path:
        tried.append("first")
        return refuse(scratch, names)

    def truncate(scratch: Path, names: tuple[str, ...]) -> Path:
        tried.append("second")
        (write(scratch, contents) / names[0]).write_bytes(b"")
        return scratch

    def provide(scratch: Path, names: tuple[str, ...]) -> Path:
        tried.append("third")
        assert names == tuple(files.FILES)
        return write(scratch, contents)

    use_sources(
        monkeypatch,
        files.Source("first", fail, is_cached=True),
        files.Source("second", truncate, is_cached=True),
        files.Source("third", provide, is_cached=True),
        files.Source("fourth", refuse, is_cached=True),
    )
    cache = tmp_path / "cache"
    reported: list[str] = []
    found = files.obtain(cache, reported.append)
    assert (found.source, found.contents, tried) == (
        "third",
        contents,
        ["first", "second", "third"],
    )
    assert [line.rsplit(" ", 1)[1] for line in reported] == tried
    # Only the four files: nothing partial is left behind.
    assert sorted(os.listdir(cache)) == sorted(files.FILES)
    assert files.obtain(cache, ignore).source == "--data-dir"
    assert tried == ["first", "second", "third"]


def test_installed_package_is_used_in_place(
    contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = write(tmp_path / "package", contents)
    use_sources(monkeypatch, files.Source("package", lambda s, n: package, is_cached=False))
    assert files.obtain(tmp_path / "cache", ignore).source == "package"
    assert not (tmp_path / "cache").exists()


def test_nothing_is_cached_when_every_source_fails(
    contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def truncate(scratch: Path, names: tuple[str, ...]) -> Path:
        (write(scratch, contents) / names[-1]).write_bytes(b"\x1f\x8b")
        return scratch

    use_sources(
        monkeypatch,
        files.Source("package", refuse, is_cached=False),
        files.Source("download", truncate, is_cached=True),
    )
    with pytest.raises(DataError) as caught:
        files.obtain(tmp_path / "cache", ignore)
    message = str(caught.value)
    assert "apt-get install dataset-fashion-mnist" in message
    assert "--data-dir" in message
    assert "package: out of order" in message
    assert f"download: {tmp_path}" not in message
    assert f"{files.TEST_LABELS}: damaged" in message
    assert not (tmp_path / "cache").exists()


def test_default_order_of_sources() -> None:
    functions = [source.provide for source in files.SOURCES]
    assert functions == [
        fashion_mnist_sources.find_debian_package,
        fashion_mnist_sources.extract_debian_package,
        fashion_mnist_sources.download,
    ]


def test_cache_folder_follows_the_environment(
    contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRNG_DATA", str(tmp_path))
    write(tmp_path / "fashion-mnist", contents)
    assert files.obtain(None, ignore).source == "cache folder"
    monkeypatch.delenv("GRNG_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / ".cache/grng/fashion-mnist"


def test_apt_failure_gives_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        del options
        return subprocess.CompletedProcess(command, 100, "", "W: old\nE: Unable to locate package")

    monkeypatch.setattr(fashion_mnist_sources.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(fetch.subprocess, "run", run)
    with pytest.raises(DataError, match=r"`apt-get .*` failed: E: Unable to locate package"):
        fashion_mnist_sources.extract_debian_package(tmp_path, ())


@pytest.mark.parametrize(
    ("has_lists", "uid", "updates"), [(True, 0, False), (False, 0, True), (False, 1000, False)]
)
def test_apt_updates_only_empty_lists_and_only_as_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_lists: bool, uid: int, updates: bool
) -> None:
    commands = []

    def run(command: list[str], folder: Path) -> None:
        commands.append(command[:2])
        if command[1] == "download":
            (folder / "package.deb").touch()
        if command[0] == "dpkg":
            (folder / "unpacked/usr/share/datasets/fashion-mnist").mkdir(parents=True)

    lists = tmp_path / "lists"
    lists.mkdir()
    if has_lists:
        (lists / "main_Packages.lz4").touch()
    monkeypatch.setattr(fashion_mnist_sources, "_APT_LISTS", lists)
    monkeypatch.setattr(fashion_mnist_sources, "run_command", run)
    monkeypatch.setattr(fashion_mnist_sources.os, "geteuid", lambda: uid)
    monkeypatch.setattr(fashion_mnist_sources.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    fashion_mnist_sources.extract_debian_package(tmp_path, ())
    assert (["apt-get", "update"] in commands) == updates
    assert commands[-2:] == [["apt-get", "download"], ["dpkg", "-x"]]


def test_download_error_names_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_connection(address: str, timeout: float) -> None:
        assert timeout > 0
        raise OSError("no route to host")

    monkeypatch.setattr(fetch.urllib.request, "urlopen", refuse_connection)
    with pytest.raises(DataError, match=r"https://.*train-images.*: no route to host"):
        fashion_mnist_sources.download(tmp_path, tuple(files.FILES))
