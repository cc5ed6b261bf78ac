"""What the pages quote, name and link to is there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from recbole_mmdiff.compare.plan import Comparison
from recbole_mmdiff.config.sources import properties_path
from recbole_mmdiff.model.registry import MODELS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
QUOTED = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


def named(path):
    return str(path.relative_to(ROOT))


@cache
def texts():
    """All text in the code of the package, … in place of what differs."""
    found = []
    for folder in ("recbole_mmdiff", "dataset_prep"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(part.value if isinstance(part, ast.Constant) else "…"
                                         for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[sd]|\{\w*\}", "…", node.value))
    return found


def stands_in_the_package(message):
    pattern = re.compile(".+?".join(map(re.escape, message.strip("… ").split("…"))), re.DOTALL)
    return any(pattern.search(text) for text in texts())


MESSAGES = QUOTED.findall((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_stands_in_the_package(message):
    assert stands_in_the_package(message)


def test_messages_are_found_and_others_are_not():
    assert len(MESSAGES) > 50 and len(set(MESSAGES)) == len(MESSAGES)
    assert not stands_in_the_package("the key … is not known to …")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=named)
def test_a_page_is_linked_from_the_readme(page):
    assert f"](docs/{page.name})" in PAGES[0].read_text(encoding="utf-8")


def test_every_file_of_a_paper_is_named_with_its_presets():
    page = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for path in sorted((properties_path() / "paper").glob("*.yaml")):
        paper, _, part = path.stem.partition("_")
        (row,) = [row for row in rows if f"`{paper}_" in row]
        assert f"`{path.stem}`" in row or f"`_{part}`" in row
        assert Comparison.read(path).seeds


def test_models_of_the_readme_lead_to_their_pages():
    text = PAGES[0].read_text(encoding="utf-8")
    for model in MODELS:
        assert f"| [{model}](docs/models/{model}.md) |" in text
