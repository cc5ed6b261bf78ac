"""``--dataset=PRESET`` finds the two data sets that the preset writes, and a model trains on them."""

from pathlib import Path

import pytest
import yaml
from amazon_files import write_preset

from dataset_prep.cli import main
from dataset_prep.presets import PRESETS
from recbole_mmdiff.quick_start import run

FOLDER = Path(__file__).resolve().parents[2] / "properties" / "dataset"
PAIRS = {name: preset.domains for name, preset in PRESETS.items() if len(preset.domains) == 2}


def test_every_pair_has_its_file():
    files = {path.stem for path in FOLDER.glob("*.yaml")}
    assert files - {"ml100k-pair", "ml1m-pair", "amazon-beauty-sports"} == set(PAIRS)


@pytest.mark.parametrize("name", PAIRS)
def test_it_names_what_the_preset_writes(name):
    keys = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert [keys[f"{role}_domain"]["dataset"] for role in ("source", "target")] == [
        domain.name for domain in PAIRS[name]]


@pytest.mark.parametrize(("name", "model", "metric"), [
    ("diffcdr-task1", "CMF", ("rating", "mae")),
    ("sieoug-clothes-home", "BPR", ("ranking_full", "ndcg@10")),    # ratings are 1: all of them count
])
def test_a_model_trains_on_a_prepared_pair(tmp_path, name, model, metric):
    write_preset(tmp_path / "raw", PRESETS[name])
    main(["amazon", "--preset", name, "--raw", str(tmp_path / "raw"), "--output", str(tmp_path / "data")])
    finished = run(model, name, overrides={"data_path": str(tmp_path / "data"), "epochs": 1},
                   output=tmp_path / "run", console=False)
    assert 0 < finished.metrics["test"][metric[0]][metric[1]] < 5
