"""The room stands alone: torch, numpy, the standard library and itself."""

import ast
import sys
from pathlib import Path

import pytest

from recbole_mmdiff import diffusion

ROOM = Path(diffusion.__file__).parent


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda path: path.name)
def test_imports_stay_in_the_room(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        for name in names:
            root = name.split(".")[0]
            own = name.startswith("recbole_mmdiff.diffusion")
            assert own or root in ("torch", "numpy") or root in sys.stdlib_module_names, name


def test_public_names_exist_and_are_documented():
    assert sorted(diffusion.__all__) == list(diffusion.__all__)
    for name in diffusion.__all__:
        assert getattr(diffusion, name).__doc__
