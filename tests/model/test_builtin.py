"""RecBole's own models through our runner: trained, saved, loaded and tested again."""

import pytest
from running import SINGLE, run_keys

from recbole_mmdiff.evaluator import Evaluator
from recbole_mmdiff.quick_start import load_run, run

SMALL = {"epochs": 1, "embedding_size": 8}
GENERAL = ["ADMMSLIM", "AsymKNN", "BPR", "CDAE", "DGCF", "DiffRec", "DMF", "EASE", "ENMF", "FISM",
           "GCMC", "ItemKNN", "LDiffRec", "LightGCN", "LINE", "MacridVAE", "MultiDAE", "MultiVAE",
           "NAIS", "NCEPLRec", "NeuMF", "NGCF", "NNCF", "Pop", "Random", "RecVAE", "SGL", "SimpleX",
           "SLIMElastic", "SpectralCF"]
MERGED = ["BPR", "EASE", "FISM", "GCMC", "LightGCN", "MultiVAE", "NeuMF", "NGCF", "SimpleX"]
CONTEXT = ["AutoInt", "DCNV2", "DeepFM", "FFM", "FM", "LR", "NFM", "WideDeep"]
SEQUENTIAL = {"FPMC": {}, "TransRec": {}, "NPE": {}, "HGN": {}, "GRU4Rec": {"hidden_size": 8},
              "SASRec": {"hidden_size": 8, "inner_size": 8}, "NARM": {"hidden_size": 8},
              "BERT4Rec": {"hidden_size": 8, "inner_size": 8}, "Caser": {}}
#: keys that models need because the data are tiny
NEEDED = {"DGCF": {"train_batch_size": 16, "embedding_size": 16, "n_factors": 2}}
LAST_ITEMS = {"split": {"LS": "valid_and_test"}, "order": "TO"}


def train_load_and_test(keys, folder):
    finished = run_keys(keys, folder)
    loaded = load_run(finished.folder)
    again = Evaluator(loaded.config, loaded.parts).evaluate(loaded.model, "test", by_group=True)
    assert again.metrics == finished.metrics["test"]
    assert again.groups == finished.metrics["groups"]
    ranking = finished.metrics["test"]["ranking_full"]
    assert all(0 <= value <= 1 for value in ranking.values())
    return finished


@pytest.mark.parametrize("model", GENERAL)
def test_general_models_rank_cold_users(model, tiny_config, tmp_path):
    keys = {**SMALL, **NEEDED.get(model, {})}
    finished = train_load_and_test(tiny_config(model, **keys), tmp_path / "run")
    assert finished.metrics["groups"]["warm_users"]["ranking_full"] is None
    assert finished.metrics["groups"]["cold_users"]["ranking_full"]
    assert finished.metrics["test"]["rating"] is None


@pytest.mark.parametrize("model", MERGED)
def test_general_models_on_the_union_of_both_domains(model, tiny_config, tmp_path):
    keys = tiny_config(model, domain_view="merged", **SMALL)
    train_load_and_test(keys, tmp_path / "run")


@pytest.mark.parametrize("model", CONTEXT)
def test_context_models_on_the_pair(model, tiny_config, tmp_path):
    finished = train_load_and_test(tiny_config(model, **SMALL), tmp_path / "run")
    labels = finished.parts.test.inter_feat["label"]
    assert set(labels.tolist()) == {0.0, 1.0}
    assert 0 < finished.metrics["test"]["rating"]["mae"] < 1, "of clicks, not of ratings"


@pytest.mark.parametrize("model", CONTEXT[:2])
def test_context_models_on_one_domain(model, tiny_config, tmp_path):
    keys = {**SINGLE, **SMALL, "threshold": {"rating": 4}}
    train_load_and_test(tiny_config(model, **keys), tmp_path / "run")


@pytest.mark.parametrize("model", SEQUENTIAL)
def test_sequential_models_on_one_domain(model, tiny_config, tmp_path):
    keys = {**SINGLE, **SMALL, "eval_args": LAST_ITEMS, "MAX_ITEM_LIST_LENGTH": 8,
            **SEQUENTIAL[model]}
    if model not in ("FPMC", "TransRec"):
        keys |= {"train_neg_sample_args": None, "loss_type": "CE"}
    if model == "BERT4Rec":
        keys.pop("loss_type")
    finished = train_load_and_test(tiny_config(model, **keys), tmp_path / "run")
    users = finished.parts.test.inter_feat["user_id"]
    assert len(users) == len(set(users.tolist())) > 50, "the last item of everybody"


@pytest.mark.parametrize("model", ["BPR", "ItemKNN", "MultiVAE"])
def test_general_models_on_one_domain(model, tiny_config, tmp_path):
    train_load_and_test(tiny_config(model, **SINGLE, **SMALL), tmp_path / "run")


def test_a_knowledge_model_on_one_domain(make_tiny_pair, tiny_config, tmp_path):
    pair = make_tiny_pair(tmp_path / "data")
    items = sorted({item for _, item, _, _ in pair.target_rows})
    graph = [f"e{number}\tlooks\te{(number * 7 + 1) % len(items)}" for number in range(len(items))]
    links = [f"{item}\te{number}" for number, item in enumerate(items)]
    for suffix, lines in (("kg", ["head_id:token\trelation_id:token\ttail_id:token", *graph]),
                          ("link", ["item_id:token\tentity_id:token", *links])):
        (pair.folder / "tgt" / f"tgt.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    columns = {**SINGLE["load_col"], "kg": ["head_id", "relation_id", "tail_id"],
               "link": ["item_id", "entity_id"]}
    train_load_and_test(tiny_config("CKE", **{**SINGLE, **SMALL, "load_col": columns},
                                    data_path=pair.folder), tmp_path / "run")


def test_pretraining_of_a_model_with_a_fit_of_its_own(tiny_config, tmp_path):
    """RaCT is trained in stages by hand: one run hands its checkpoint to the next."""
    keys = {"pretrain_epochs": 2, "save_step": 1, "epochs": 1}
    first = run_keys(tiny_config("RaCT", train_stage="actor_pretrain", **keys), tmp_path / "first")
    loaded = load_run(first.folder)
    again = Evaluator(loaded.config, loaded.parts).evaluate(loaded.model, "test")
    assert again.metrics == first.metrics["test"]
    (first.folder / "metrics.json").unlink()        # Killed after the training.
    assert run(resume=first.folder).metrics["test"] == first.metrics["test"]
    second = tiny_config("RaCT", train_stage="finetune",
                         pre_model_path=str(first.folder / "checkpoint.pth"), **keys)
    train_load_and_test(second, tmp_path / "second")


def test_s3rec_pretrains_on_item_attributes_and_is_then_tuned(make_tiny_pair, tiny_config, tmp_path):
    pair = make_tiny_pair(tmp_path / "data")
    items = sorted({item for _, item, _, _ in pair.target_rows})
    lines = [f"{item}\tc{number % 3} c{number % 5}" for number, item in enumerate(items)]
    (pair.folder / "tgt" / "tgt.item").write_text(
        "\n".join(["item_id:token\tclass:token_seq", *lines]) + "\n", encoding="utf-8")
    keys = {**SINGLE, "load_col": {**SINGLE["load_col"], "item": ["item_id", "class"]},
            "data_path": pair.folder, "item_attribute": "class", "train_neg_sample_args": None,
            "hidden_size": 8, "inner_size": 8, "MAX_ITEM_LIST_LENGTH": 8, "epochs": 1,
            "pretrain_epochs": 1, "save_step": 1, "eval_args": LAST_ITEMS}
    first = run_keys(tiny_config("S3Rec", train_stage="pretrain", **keys), tmp_path / "first")
    checkpoint = str(first.folder / "checkpoint.pth")
    second = tiny_config("S3Rec", train_stage="finetune", pre_model_path=checkpoint, **keys)
    train_load_and_test(second, tmp_path / "second")


def test_ncl_if_faiss_is_there(tiny_config, tmp_path):
    pytest.importorskip("faiss")
    train_load_and_test(tiny_config("NCL", num_clusters=5, **SMALL), tmp_path / "run")
