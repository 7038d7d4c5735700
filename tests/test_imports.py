"""Who may import whom, read from the syntax trees (docs/structure.md), and what importing must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": set(),
    "retrieval": set(),
    "engine": {"kernels"},
    "train": {"engine", "kernels"},
    "specialize": {"engine", "kernels", "retrieval", "train"},
    "bench": {"engine", "kernels", "retrieval", "train", "specialize"},
}
LEAVES = {"errors"}  # modules of the root that everyone may import
ORACLES = {"transformers", "peft"}
MODULES = sorted(p for folder in MAY_IMPORT for p in (ROOT / folder).rglob("*.py"))


def imported_modules(file: Path) -> set[str]:
    """Absolute dotted names that a file imports; relative ones are resolved as installed, under ``specialize``."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    package = parts[:-1] if parts[0] == "specialize" else ("specialize", *parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


@pytest.mark.parametrize("file", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(file):
    folder = file.relative_to(ROOT).parts[0]
    for name in imported_modules(file):
        parts = name.split(".")
        if parts[0] != "specialize" or len(parts) == 1 or parts[1] in LEAVES:
            continue
        target = parts[1] if parts[1] in MAY_IMPORT else "specialize"
        is_cli = folder == "specialize" and file.stem == "cli"
        allowed = MAY_IMPORT[folder] | {folder} | ({"bench"} if is_cli else set())
        assert target in allowed, f"{folder} imports {name}"


@pytest.mark.parametrize("file", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_oracles_stay_in_tests_and_peers(file):
    if file.relative_to(ROOT).parts[0] == "bench" and "peers" in str(file.relative_to(ROOT)):
        return
    found = {name.split(".")[0] for name in imported_modules(file)} & ORACLES
    assert not found, f"imports {', '.join(found)}"


@pytest.mark.parametrize("file", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_folders_are_imported_under_the_one_root(file):
    """``import engine`` would find a folder only from the repository's own directory, or somebody else's package."""
    own = {name.split(".")[0] for name in imported_modules(file)} & (set(MAY_IMPORT) - {"specialize"})
    assert not own, f"imports {', '.join(own)} as a top-level package"


@pytest.mark.parametrize("name", ["pages", "scheduler", "sampler"])
def test_the_host_side_imports_no_torch(name):
    code = f"import sys, specialize.engine.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_engine_imports_without_transformers():
    code = (
        "import sys\n"
        "for name in ('transformers', 'peft', 'triton'): sys.modules[name] = None\n"
        "import specialize.engine as engine\n"
        "[getattr(engine, name) for name in engine.__all__]\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
