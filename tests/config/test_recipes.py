"""Every recipe and every properties file builds a configuration, and its keys are read by its models."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from recbole_mmdiff.compare.cells import cell_config
from recbole_mmdiff.compare.embeddings import check_models
from recbole_mmdiff.compare.plan import Comparison
from recbole_mmdiff.compare.runner import check_metrics
from recbole_mmdiff.config import Config, find_config_file, properties_path
from recbole_mmdiff.config.sources import read_yaml
from recbole_mmdiff.data import splits
from recbole_mmdiff.model import MODELS

RUNS = sorted(properties_path().glob("*.yaml"))
RUN_RECIPES = [path for path in RUNS if "model" in read_yaml(path)]
PAPER = sorted((properties_path() / "paper").glob("*.yaml"))
COMPARISONS = [*PAPER, *sorted((properties_path() / "compare").glob("*.yaml"))]
#: the papers' tables and figures
TABLES = {"ccdrec": {"table2", "table3", "figure3", "grids"},
          "diffcdr": {"table2", "table3", "table4", "figure3", "figure4", "grids"},
          "mmdcdr": {"table2", "table3", "sensitivity"},
          "music": {"table2", "table3", "table4", "sensitivity"},
          "sieoug": {"table1", "figure5", "figure7", "figure8"}}
#: recipes of one domain, by how their names begin
SINGLE = ("ccdrec", "ml1m_action", "amazon_sports")
#: paper -> model of the ablation table -> its name in the main one
IN_BOTH = {"diffcdr": {"PTUPCDR": "PTUPCDR", "DiffCDR DAT": "DiffCDR"},
           "mmdcdr": {"MMDCDR": "MMDCDR"}, "music": {"MuSiC": "MuSiC"}}
#: MMDCDR, Table II, column "Improve": MAE and RMSE, in %
IMPROVE = [(6.91, 3.35), (6.10, 4.97), (6.69, 3.51), (14.54, 15.37), (12.68, 5.99), (1.41, 4.14),
           (13.60, 11.08), (19.53, 12.62), (18.22, 11.24)]
#: CCDRec, Table 2, rows "Improvement" of LATTICE, FREEDOM, MCDRec, MG on Baby, Sports, Clothing, in %
RISE = [[(5.40, 9.36, 10.09, 11.68), (9.51, 8.47, 9.60, 8.54), (7.35, 2.46, 5.49, 3.21),
         (2.31, 4.33, 3.56, 4.24)],
        [(18.99, 14.40, 20.15, 17.46), (5.71, 6.59, 5.35, 5.73), (3.24, 4.37, 3.28, 3.63),
         (6.30, 4.48, 5.63, 4.94)],
        [(19.09, 22.85, 19.35, 21.32), (7.44, 8.67, 8.68, 9.20), (4.58, 2.60, 4.35, 3.12),
         (7.00, 6.75, 7.58, 7.44)]]
#: paper -> ablation -> the keys by which it differs from the whole model
ABLATIONS = {
    "mmdcdr": {"w/o diff": {"use_diffusion": False}, "w/o mm": {"modalities": [], "use_ids": True},
               "w/o text": {"modalities": ["image"]}, "w/o image": {"modalities": ["text"]},
               "w/o cl": {"contrastive_weight": 0.0}},
    "music": {"w/o MLLM": {"modalities": [], "user_modalities": [], "use_ids": True},
              "w/o diffusion": {"use_diffusion": False}, "w/o side": {"use_side_users": False}}}
#: SIEOUG, sections 4.2 and 4.4
SIEOUG = {"train_batch_size": 256, "knn_k": 5, "graph_weight": 0.1, "cluster_weight": 0.1, "num_clusters": 15,
          "num_layers": 3, "embedding_size": 128, "epsilon": 0.1, "guidance_weight": 0.6}


@pytest.mark.parametrize("path", RUN_RECIPES, ids=lambda path: path.name)
def test_run_recipes_name_a_model_and_data(path):
    config = Config(config_file_list=[path])
    assert config["model"] in MODELS and config.cross_domain != path.stem.startswith(SINGLE)


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.name)
def test_every_model_key_and_metric_of_a_comparison_exists(path):
    """Each model in each table once, and each setting once."""
    comparison, seen = Comparison.read(path), set()
    for cell in comparison.cells():
        for place in ((cell.model, cell.table), cell.setting):
            if place not in seen:
                seen.add(place)
                config = cell_config(cell.keys, cell.files, {})
                assert config.cross_domain != path.stem.startswith(SINGLE)
                assert {key: config[key] for key in cell.keys if key != "dataset"
                        and not isinstance(cell.keys[key], dict)} \
                    == {key: value for key, value in cell.keys.items() if key != "dataset"
                        and not isinstance(value, dict)}
                check_metrics(config, comparison.tables[cell.table]["metrics"])


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.name)
def test_models_of_a_picture_have_something_to_show(path):
    comparison = Comparison.read(path)
    if comparison.embeddings:
        check_models(comparison)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.name)
def test_paper_recipes_say_what_was_published(path):
    comparison = Comparison.read(path)
    assert re.fullmatch(r"[a-z0-9]+_(table|figure|grids|sensitivity)\d*\.yaml", path.name)
    assert comparison.preset or "prepare mmrec" in path.read_text(encoding="utf-8"), \
        "name the data preparation that the settings need"
    published = comparison.published
    if path.stem.split("_")[1].startswith("table"):
        assert published["source"] and published["values"]
    for metric, tolerance in (published or {}).get("tolerance", {}).items():
        assert 0 < tolerance < 0.2, metric
    labels, metrics = comparison.labels(), [name for table in comparison.tables.values()
                                            for name in table["metrics"]]
    for model in (published or {}).get("models", []):
        assert model in labels
    for setting, rows in (published or {}).get("values", {}).items():
        assert set(rows) <= set(metrics), setting
        assert all(isinstance(value, (int, float)) and math.isfinite(value) and value > 0
                   for row in rows.values() for value in row)


def published_values(name):
    """setting -> metric -> model -> the paper's number."""
    published = Comparison.read(f"paper/{name}.yaml").published
    models = published["models"]
    return {setting: {metric: dict(zip(models, row, strict=True)) for metric, row in rows.items()}
            for setting, rows in published["values"].items()}


def test_recipes_cover_the_tables_of_the_papers():
    assert {path.stem for path in PAPER} \
        == {f"{paper}_{table}" for paper, tables in TABLES.items() for table in tables}


@pytest.mark.parametrize("name, setting, metric, model, value", [
    # Read off the papers' pages: first rows, last rows, columns beside those that were left out.
    ("ccdrec_table2", "Baby", "ranking_full.recall@5", "BPR-MF", 0.0208),
    ("ccdrec_table2", "Sports", "ranking_full.ndcg@5", "BM3", 0.0269),
    ("ccdrec_table2", "Clothing", "ranking_full.ndcg@10", "CCDRec(MG)", 0.0361),
    ("ccdrec_table3", "Baby", "ranking_full.ndcg@10", "LATTICE+RealHNS", 0.0313),
    ("ccdrec_table3", "Clothing", "ranking_full.recall@10", "MG+MixGCF", 0.0648),
    ("diffcdr_table2", "task1 β=20%", "rating.mae", "TGT", 4.4546),
    ("diffcdr_table2", "task2 β=50%", "rating.rmse", "LACDR", 1.3051),
    ("diffcdr_table2", "task3 β=80%", "ranking_full.hit@20", "DiffCDR", 0.00179),
    ("mmdcdr_table2", "Movie2Music α=80%", "rating.mae", "CMF", 1.6044),
    ("mmdcdr_table2", "Electronic2Phone α=20%", "rating.mae", "P2M2CDR", 1.1516),
    ("mmdcdr_table3", "Sport2Phone α=50%", "rating.rmse", "w/o mm", 2.0928),
    ("mmdcdr_table3", "Electronic2Phone α=80%", "rating.rmse", "w/o text", 1.2816),
    ("music_table2", "task1 β=20%", "rating.mae", "MuSiC", 0.6636),
    ("music_table2", "task3 β=80%", "ranking_labeled.ndcg@20", "DiffCDR", 0.8366),
    ("music_table3", "task2 β=20%", "rating.rmse", "w/o side", 1.0223),
    ("music_table4", "task3 β=50%", "rating.rmse", "MuSiC", 0.9358),
    ("sieoug_table1", "Clothes with Sports, K_u=10%", "ranking_full.hit@10", "NeuMF", 0.0383),
    ("sieoug_table1", "Sports with Clothes, K_u=50%", "ranking_full.ndcg@10", "SIEOUG-O", 0.0578),
    ("sieoug_table1", "Clothes with Home, K_u=90%", "ranking_full.ndcg@10", "SIEOUG-G", 0.0865),
    ("sieoug_table1", "Home with Clothes, K_u=10%", "ranking_full.hit@10", "DisenCDR", 0.0584),
    ("sieoug_table1", "Food with Kitchen, K_u=50%", "ranking_full.hit@10", "LGM3Rec", 0.1421),
    ("sieoug_table1", "Kitchen with Food, K_u=90%", "ranking_full.ndcg@10", "SIEOUG", 0.0659),
])
def test_published_numbers_are_those_of_the_page(name, setting, metric, model, value):
    assert published_values(name)[setting][metric][model] == value


@pytest.mark.parametrize("paper", IN_BOTH)
def test_ablation_and_main_table_of_a_paper_agree(paper):
    main, ablation = (published_values(f"{paper}_{table}") for table in ("table2", "table3"))
    assert main.keys() == ablation.keys()
    for setting, rows in ablation.items():
        for metric, row in rows.items():
            for model, name in IN_BOTH[paper].items():
                assert row[model] == main[setting][metric][name], (setting, metric)


def test_published_numbers_of_mmdcdr_give_its_improvements():
    """The paper rounds some of them down and has one from numbers of more digits."""
    for rows, improvements in zip(published_values("mmdcdr_table2").values(), IMPROVE, strict=True):
        for metric, improvement in zip(("rating.mae", "rating.rmse"), improvements, strict=True):
            *others, own = rows[metric].values()
            assert 100 * (1 - own / min(others)) == pytest.approx(improvement, abs=0.011)


def test_published_numbers_of_ccdrec_give_its_improvements():
    for rows, setting in zip(published_values("ccdrec_table2").values(), RISE, strict=True):
        for row, rises in zip(rows.values(), zip(*setting, strict=True), strict=True):
            for backbone, rise in zip(("LATTICE", "FREEDOM", "MCDRec", "MG"), rises, strict=True):
                found = 100 * (row[f"CCDRec({backbone})"] / row[backbone] - 1)
                assert found == pytest.approx(rise, abs=0.011)


def test_tables_of_ccdrec_agree_but_in_one_number():
    main, samplers = published_values("ccdrec_table2"), published_values("ccdrec_table3")
    other = {(setting, metric, model): (value, main[setting][metric][model])
             for setting, rows in samplers.items() for metric, row in rows.items()
             for model, value in row.items() if value != main[setting][metric].get(model, value)}
    assert other == {("Baby", "ranking_full.ndcg@10", "CCDRec(LATTICE)"): (0.0356, 0.0325)}


@pytest.mark.parametrize("name", ["mmdcdr_table2", "mmdcdr_table3", "mmdcdr_sensitivity"])
def test_shares_of_mmdcdr_halve_what_does_not_train(name):
    ids = np.arange(1000)
    rows = splits.Rows(ids, ids, ids.astype(str), ids.astype(str), np.ones(1000, dtype=bool))
    for setting, keys in Comparison.read(f"paper/{name}.yaml").settings.items():
        trained = 10 * int(re.search(r"α=(\d+)%", setting)[1])
        held_out = splits.held_out_users(rows, 2020, keys["test_user_ratio"], keys["valid_user_ratio"])
        assert [mask.sum() for mask in held_out] == [(1000 - trained) / 2] * 2, setting


@pytest.mark.parametrize("paper", ABLATIONS)
def test_an_ablation_differs_from_the_model_by_its_keys_alone(paper):
    comparison = Comparison.read(f"paper/{paper}_table3.yaml")
    configs = {cell.model: cell_config(cell.keys, cell.files, {}).run_dict
               for cell in comparison.cells()[:len(comparison.models)]}
    whole = configs.pop(comparison.ours[0])
    assert {label: {key: value for key, value in config.items() if value != whole[key]}
            for label, config in configs.items()} == ABLATIONS[paper]


@pytest.mark.parametrize("backbone", ["LATTICE", "FREEDOM", "MG"])
def test_ablations_of_ccdrec_differ_by_their_schedule(backbone):
    models = Comparison.read("paper/ccdrec_figure3.yaml").models
    whole = models[f"CCDRec({backbone})"]
    assert models[f"{backbone}+DMA"] == {**whole, "pool_schedule": "none", "num_negatives": 2}
    assert models[f"{backbone}+DMA+NDI"] == {**whole, "pool_schedule": "last"}
    assert Comparison.read("paper/ccdrec_table3.yaml").models[f"CCDRec({backbone})"] == whole


@pytest.mark.parametrize("name", ["table1", "figure5", "figure7", "figure8"])
def test_settings_of_sieoug_are_what_they_are_called(name):
    """The domain named first is the target, both are of one pair, and K_u is the share of linked users."""
    for setting, keys in Comparison.read(f"paper/sieoug_{name}.yaml").settings.items():
        own, other, percent = re.fullmatch(r"(\w+) with (\w+), k_u=(\d+)%", setting.lower()).groups()
        pairs = [{f"sieoug-{pair}-{domain}" for domain in (own, other)}
                 for pair in (f"{own}-{other}", f"{other}-{own}")]
        target, source = (keys[f"{role}_domain"]["dataset"] for role in ("target", "source"))
        assert {target, source} in pairs and target.endswith(f"-{own}"), setting
        assert keys["overlap_ratio"] == int(percent) / 100


@pytest.mark.parametrize("name", ["table1", "figure7", "figure8"])
def test_sieoug_has_the_constants_of_its_paper(name):
    comparison = Comparison.read(f"paper/sieoug_{name}.yaml")
    config = next(cell_config(cell.keys, cell.files, {}) for cell in comparison.cells()
                  if cell.model == "SIEOUG")
    assert {key: config[key] for key in SIEOUG} == SIEOUG
    assert (config["overlap_mode"], config["split_protocol"]) == ("split", "ratio")


def test_ablations_of_sieoug_differ_by_their_matching():
    models = Comparison.read("paper/sieoug_table1.yaml").models
    for letter, matching in (("O", "none"), ("M", "links"), ("G", "gromov")):
        assert models[f"SIEOUG-{letter}"] == {"model": "SIEOUG", **models["SIEOUG"], "matching": matching}


@pytest.mark.parametrize("path", sorted((properties_path() / "dataset").glob("*.yaml")),
                         ids=lambda path: path.name)
def test_pairs_name_two_domains(path):
    assert set(read_yaml(path)) >= {"source_domain", "target_domain"}


def test_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("properties/diffcdr.yaml", "diffcdr.yaml"):
        assert Path(find_config_file(name)).samefile(properties_path() / "diffcdr.yaml")
