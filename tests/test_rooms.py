"""The rooms of the house: imports go downward only."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "recbole_mmdiff"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "dataset_prep").rglob("*.py")])

#: lowest first; a room may import itself and what stands below it
ORDER = [
    {"errors"}, {"files", "arrays"}, {"storage"},
    {"compat"}, {"distributed", "launching"},
    {"diffusion", "transport", "graph", "negatives"},
    {"model.registry"},
    {"config"},
    {"data"},
    {"model"},
    {"evaluator"},
    {"trainer"},
    {"report", "run_folder"},
    {"run_log"},
    {"quick_start", "doctor"},
    {"check", "compare", "recommend"},
    {"cli"},
]
LOW = next(rooms for rooms in ORDER if "diffusion" in rooms)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, top_level_only=False):
    """(line, dotted name) of every import of a file, relative ones resolved."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    package = module_name(path) if path.name == "__init__.py" \
        else module_name(path).rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            if node.level:
                base = importlib.util.resolve_name(base, package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def room(name):
    """The room of a dotted name below the package, e.g. ``data`` or ``model.registry``."""
    parts = name.split(".")[1:]
    if parts[:2] == ["model", "registry"]:
        return "model.registry"
    return parts[0] if parts else "__init__"


def level(name):
    return next((number for number, rooms in enumerate(ORDER) if name in rooms), None)


def test_every_room_has_its_place():
    rooms = {room(module_name(path)) for path in FILES if PACKAGE in path.parents}
    assert {name for name in rooms if level(name) is None} <= {"__init__"}


@pytest.mark.parametrize("path", [path for path in FILES if PACKAGE in path.parents],
                         ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    own = room(module_name(path))
    for line, name in imports(path):
        if not name.startswith("recbole_mmdiff."):
            continue
        other = room(name)
        if other == own or own == "__init__" or name == "recbole_mmdiff.__version__":
            continue
        assert level(other) is not None, f"{path}:{line}: {name} is in no room"
        assert level(other) < level(own) or (own in LOW and other in LOW), \
            f"{path}:{line}: {own} must not import {name}"


@pytest.mark.parametrize("path", [path for path in FILES
                                  if room(module_name(path)) in LOW and PACKAGE in path.parents],
                         ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_low_rooms_are_plain_torch(path):
    for line, name in imports(path):
        top = name.split(".")[0]
        assert top not in {"recbole", "pandas", "dataset_prep"}, f"{path}:{line}: imports {name}"
        if top == "recbole_mmdiff":
            assert room(name) in LOW | {"errors"}, f"{path}:{line}: imports {name}"
    words = {node.arg for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.arg)}
    assert not words & {"config", "dataset"}, f"{path}: takes RecBole's objects"


def test_data_preparation_imports_files_and_nothing_of_training():
    allowed = {f"recbole_mmdiff.{name}"
               for name in ("data.features", "data.atomic", "data.splits", "files", "arrays", "errors")}
    for path in (ROOT / "dataset_prep").rglob("*.py"):
        ours = {name.rpartition(".")[0] for _, name in imports(path)
                if name.startswith("recbole") and name != "recbole_mmdiff.__version__"}
        assert ours <= allowed, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_recboles_quick_start_or_ray(path):
    """But the executor that is asked for Ray by name, when it is."""
    for line, name in imports(path, top_level_only=path.name == "workers.py"):
        assert not name.startswith("recbole.quick_start"), f"{path}:{line}"
        assert name.split(".")[0] != "ray", f"{path}:{line}"


def test_the_command_line_does_not_load_ray_or_tune():
    code = ("import sys, recbole_mmdiff.cli, recbole_mmdiff.check, recbole_mmdiff.compare\n"
            "print([name for name in ('ray', 'recbole.quick_start') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["diffusion", "negatives"])
def test_a_low_room_is_usable_without_recbole(name):
    """From a notebook: the room loads where RecBole cannot be imported."""
    code = (f"import sys; sys.modules['recbole'] = None\n"
            f"import recbole_mmdiff.{name}\n"
            f"print('pandas' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
