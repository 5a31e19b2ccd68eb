"""The shape of the project: imports run one way, files stay readable, start-up is light, names shadow nothing."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
# Highest first; a room may import from itself and from those after it.
ROOMS = [
    *("cli", "doctor", "evaluate", "train", "export", "objective"),
    *("models", "loaders", "samples", "config", "errors"),
]
HEAVY = ("torch", "numpy", "numba", "pyarrow", "PIL", "timm", "open_clip", "nvidia.dali", "torchvision", "rich", "yaml")


def imports_of(source: str) -> set[str]:
    """The absolute names of the modules a file imports, `from package import module` spelled out."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def wrong_imports(room: str, source: str) -> list[str]:
    """Imports from a room above."""
    above = tuple(f"mvp_fast.{each}." for each in ROOMS[: ROOMS.index(room)])
    return [name for name in imports_of(source) if f"{name}.".startswith(above)]


def python_files() -> list[Path]:
    return sorted([*REPO.glob("mvp_fast/**/*.py"), *REPO.glob("kernels/**/*.py")])


def test_every_folder_is_a_known_room() -> None:
    rooms = {path.name for path in (REPO / "mvp_fast").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= set(ROOMS)


@pytest.mark.parametrize("path", [p for p in python_files() if p.is_relative_to(REPO / "mvp_fast")], ids=str)
def test_imports_run_downward(path: Path) -> None:
    room = path.relative_to(REPO / "mvp_fast").parts[0].removesuffix(".py")
    if room in ROOMS:  # the package's own __init__ and __main__ stand above all
        assert wrong_imports(room, path.read_text()) == []


def test_an_upward_import_is_found() -> None:
    assert wrong_imports("loaders", "import mvp_fast.samples.plan\nfrom mvp_fast.train import loop") == [
        "mvp_fast.train.loop"
    ]
    assert wrong_imports("config", "def f():\n    from mvp_fast import samples") == ["mvp_fast.samples"]


@pytest.mark.parametrize("path", sorted((REPO / "kernels").glob("**/*.py")), ids=str)
def test_kernels_import_nothing_of_mvp_fast(path: Path) -> None:
    assert not [name for name in imports_of(path.read_text()) if name.startswith("mvp_fast")]


@pytest.mark.parametrize("path", python_files(), ids=str)
def test_files_fit_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 330


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {
        ".".join(path.parent.relative_to(REPO).parts).replace("kernels.mvp_kernels", "mvp_kernels")
        for path in [*REPO.glob("mvp_fast/**/__init__.py"), *REPO.glob("kernels/**/__init__.py")]
    }
    assert on_disk == set(settings["packages"])


def test_no_top_level_package_named_kernels(tmp_path: Path) -> None:
    """transformers probes for Hugging Face's `kernels`; this repository's folder of that name must not answer."""
    code = "import importlib.util, mvp_kernels; s = importlib.util.find_spec('kernels'); print(s.origin if s else None)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(REPO) not in found.stdout
    assert not (REPO / "kernels" / "__init__.py").exists()
    assert importlib.util.find_spec("mvp_kernels") is not None


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["finetune", "--help"],
        ["segment", "--help"],
        ["teacher", "--help"],
        ["teacher", "fit", "--help"],
        ["export", "--help"],
        ["probe", "--help"],
        ["visualize", "--help"],
        ["data", "--help"],
        ["data", "scenes", "--help"],
        ["data", "index", "--help"],
        ["data", "convert", "--help"],
        ["data", "plan", "--help"],
        ["data", "render", "--help"],
        ["data", "bench", "--help"],
        ["doctor", "--help"],
        ["bench", "--help"],
        ["bench", "history", "--help"],
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom mvp_fast.cli.main import main\n"
        f"try:\n    code = main({words!r})\nexcept SystemExit as end:\n    code = end.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules], code or 0)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "HEAVY [] 0"
    assert len(shown.splitlines()) > 5
