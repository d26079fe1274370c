# SPDX-License-Identifier: Apache-2.0
"""The shape of the repository: imports point one way, the packages are complete, no path of one machine."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grng_kernels import Info

ROOT = Path(__file__).parent.parent
KERNELS, GRNG = ROOT / "grng_kernels", ROOT / "python" / "grng"


def sources(folder):
    return sorted(folder.rglob("*.py"))


def imported(path):
    """``(top-level module, whether the import runs when the file is imported)``, for each import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
        else:
            continue
        for name in names:
            yield name.split(".")[0], id(node) not in lazy


def test_kernels_import_torch_and_nothing_above():
    allowed = {"torch", "triton", "grng_kernels"} | set(sys.stdlib_module_names)
    for path in sources(KERNELS):
        for module, _ in imported(path):
            assert module in allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_triton_is_imported_at_the_top_of_kernel_files_alone():
    for path in sources(KERNELS):
        for module, at_import in imported(path):
            if module == "triton" and at_import:
                # Imported by others when they are needed.
                assert path.name.startswith("triton_"), path.relative_to(ROOT)


def test_kernel_files_are_imported_lazily():
    for path in sources(KERNELS):
        if path.name.startswith("triton_"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                names = [node.module.split(".")[-1], *(alias.name for alias in node.names)]
                assert not any(n.startswith("triton_") for n in names), path.relative_to(ROOT)


def test_importing_the_package_imports_neither_triton_nor_the_extension():
    code = (
        "import sys, torch; before = set(sys.modules); import grng_kernels; "
        "new = set(sys.modules) - before; "
        "print(sorted(m for m in new if m.split('.')[0] in ('triton', 'numpy') or m.endswith('._C')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not (GRNG / "__init__.py").exists(), reason="grng is not there yet")
def test_kernels_do_not_import_grng():
    code = "import sys, grng_kernels; print('grng' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_grng_uses_only_public_names_of_the_kernels():
    for path in sources(GRNG):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if names and names[0].split(".")[0] == "grng_kernels":
                private = [n for n in names if re.search(r"(^|\.)_(?!_)", n)]
                assert not private, f"{path.relative_to(ROOT)}: {private}"


# ---- packaging ----


def listed_packages():
    """The packages of pyproject.toml (read by hand: tomllib came with Python 3.11)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^packages = \[\n(.*?)^\]", text, re.M | re.S).group(1)
    return re.findall(r'"([\w.]+)"', block)


def folder_of(package):
    root = ROOT / "python" if package.split(".")[0] == "grng" else ROOT
    return root.joinpath(*package.split("."))


@pytest.mark.parametrize("package", listed_packages())
def test_listed_package_exists(package):
    assert (folder_of(package) / "__init__.py").is_file()


def test_every_package_is_listed():
    found = {
        ".".join(path.parent.relative_to(root).parts)
        for root, top in ((ROOT, KERNELS), (ROOT / "python", GRNG))
        for path in top.rglob("__init__.py")
    }
    assert found <= set(listed_packages())


@pytest.mark.parametrize("folder", [KERNELS, GRNG], ids=["grng_kernels", "grng"])
def test_packages_are_typed(folder):
    assert (folder / "py.typed").is_file()


def test_info_is_the_same_in_both_languages():
    header = (ROOT / "csrc" / "kernels.h").read_text(encoding="utf-8")
    body = re.search(r"enum Info[^{]*\{(.*?)\}", header, re.S).group(1)
    there = {
        re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper(): int(value)
        for name, value in re.findall(r"k(\w+)\s*=\s*(\d+)", body)
    }
    assert there == {code.name: code.value for code in Info}


# ---- text ----


def repository_files():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file():
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_no_file_names_a_path_of_one_machine():
    tops = "|".join(("home", "root", "work", "Users", "mnt", "scratch", "private"))
    # Not behind a word, a dot or another slash: those are addresses and relative paths.
    pattern = re.compile(rf"(?<![\w./~$}}\])>-])/(?:{tops})/\w")
    found = [
        f"{name}:{number}"
        for name, text in repository_files()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found


def test_every_source_file_names_its_licence():
    missing = [
        name
        for name, text in repository_files()
        if name.endswith((".py", ".cpp", ".cu", ".h"))
        and "SPDX-License-Identifier: Apache-2.0" not in "\n".join(text.splitlines()[:3])
    ]
    assert not missing
