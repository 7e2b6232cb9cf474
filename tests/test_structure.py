"""The house rules that a machine can check: import directions, quiet imports, one way, README's file map."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.command import COMMANDS

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "pipeline", "jobs")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
MAY_IMPORT = {"model": {"model"}, "pipeline": {"model", "pipeline"}, "jobs": {"model", "pipeline", "jobs"}}
MODEL_LIBRARIES = {"torch", "torchvision", "numpy", "safetensors", "triton"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, *, at_import_only: bool = False) -> set[str]:
    """Absolute names of the modules a file imports."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if not at_import_only else iter(tree.body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= members if members <= MODULES else members | {node.module}
    return names


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imported(path)} & set(PACKAGES)
    assert ours <= MAY_IMPORT[package], f"{module_name(path)} imports {ours - MAY_IMPORT[package]}"


@pytest.mark.parametrize("path", [path for path in FILES if "model" in path.parts], ids=module_name)
def test_model_imports_nothing_but_tensors(path: Path) -> None:
    foreign = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"model"}
    assert foreign <= MODEL_LIBRARIES


def test_imports_have_no_cycle() -> None:
    modules = {module_name(path): path for path in FILES}
    edges = {name: (imported(path, at_import_only=True) & set(modules)) - {name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done:
            return
        for target in edges[name]:
            visit(target, (*trail, name))
        done.add(name)

    for name in modules:
        visit(name, ())


def test_importing_everything_does_nothing(tmp_path: Path) -> None:
    """No file made, no logging set up, no Ray started, no CUDA asked for."""
    names = [module_name(path) for path in FILES]
    script = (
        "import importlib, logging, threading, warnings\n"
        "warnings.simplefilter('ignore')\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "import ray, torch\n"
        "ours = [n for n in logging.root.manager.loggerDict if n.split('.')[0] in ('model', 'pipeline', 'jobs')]\n"
        "assert not [n for n in ours if logging.getLogger(n).handlers or logging.getLogger(n).level], ours\n"
        "assert not logging.root.handlers\n"
        "assert not ray.is_initialized() and not torch.cuda.is_initialized()\n"
        "names = [t.name for t in threading.enumerate() if t is not threading.main_thread()]\n"
        "assert not [n for n in names if n in ('model', 'encode', 'decode')], names\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.iterdir())
    assert run.stdout == ""


def test_only_commands_whose_options_are_of_networks_begin_with_torch() -> None:
    names = [module for name, (module, _) in COMMANDS.items() if name not in ("train", "describe", "benchmark")]
    script = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
    script += "assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_model_has_all_that_it_names() -> None:
    import model

    assert {name: getattr(model, name).__name__ for name in model.__all__} == {name: name for name in model.__all__}
    assert set(model.__all__) <= set(dir(model))
    assert not hasattr(model, "nothing_of_that_name")


def test_readme_maps_every_file() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [
        str(path.relative_to(ROOT)) for path in FILES if path.name != "__init__.py" and f"`{path.name}`" not in readme
    ]
    assert not missing, f"README's file map lacks {missing}"


def test_readme_describes_the_schema_as_it_is() -> None:
    from pipeline.schema import as_markdown

    assert as_markdown() in (ROOT / "README.md").read_text(), "paste what `python -m pipeline.schema` prints"
