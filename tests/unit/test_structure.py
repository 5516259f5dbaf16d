"""The project's own rules: imports go down, modules know no processes, the README's tree is the tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("app", "callbacks", "datamodules", "modules")


def test_linters_are_content() -> None:
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["lint-imports", "--no-cache"]):
        tool = Path(sys.executable).with_name(command[0])
        done = subprocess.run([str(tool), *command[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_types() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("package", ["modules", "datamodules"])
def test_no_processes_below_the_application(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("torch.distributed") for name in names), path


def test_library_code_does_not_print() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            calls = (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call))
            assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), path


def test_the_tree_in_the_readme_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"```\n(app/ .*?)```", readme, re.DOTALL)
    assert tree is not None
    shown = set(re.findall(r"[\w/]+\.py|\w+/", tree[1]))
    for package in PACKAGES:
        for path in (ROOT / package).iterdir():
            if path.suffix == ".py" and path.name not in ("__init__.py", "__main__.py"):
                assert path.name in shown, f"{path} is not in the README's tree"
            if path.is_dir() and path.name != "__pycache__":
                assert f"{path.name}/" in shown, f"{path} is not in the README's tree"
    for name in shown:
        assert any(ROOT.glob(name)) or any(match for p in PACKAGES for match in (ROOT / p).rglob(name.strip("/"))), name


def test_every_package_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            assert f'"{path.parent.relative_to(ROOT).as_posix().replace("/", ".")}"' in text, path
