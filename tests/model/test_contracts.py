"""No model of ours without its contract, its defaults, its citation and its row in the README."""

import importlib
import re
from pathlib import Path

import pytest
from contract import RankingContract, contracts

from recbole_mmdiff.config.sources import properties_path
from recbole_mmdiff.model.pairwise import PairwiseRecommender
from recbole_mmdiff.model.registry import MODELS, get_model

HERE = Path(__file__).resolve().parent
README = HERE.parent.parent / "README.md"
TABLE_ROW = re.compile(r"^\|.*\|\s*$", re.MULTILINE)


@pytest.fixture(scope="module")
def found():
    """Model -> contract class."""
    for path in HERE.glob("test_*.py"):
        importlib.import_module(path.stem)
    return contracts()


@pytest.mark.parametrize("model", MODELS)
def test_has_contract_defaults_and_citation(model, found):
    ranks = issubclass(get_model(model), PairwiseRecommender)
    kind = "RankingContract" if ranks else "ModelContract"
    assert model in found, f"write a class Test{model}({kind}) in tests/model"
    assert issubclass(found[model], RankingContract) == ranks, f"the contract of {model} is a {kind}"
    assert (properties_path() / "model" / f"{model}.yaml").is_file()
    assert get_model(model).citation


@pytest.mark.parametrize("model", MODELS)
def test_has_a_row_in_the_readme(model):
    rows = TABLE_ROW.findall(README.read_text(encoding="utf-8")) if README.is_file() else []
    if not rows:
        pytest.skip("README.md has no table yet")
    assert any(re.search(rf"\b{model}\b", row.split("|")[1]) for row in rows)


def test_no_contract_without_a_model(found):
    assert set(found) <= set(MODELS)
