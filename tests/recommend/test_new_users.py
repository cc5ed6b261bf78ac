"""Users outside of the training: like a known cold user with the same source rows, and their file."""

import logging

import numpy as np
import pytest
import torch
from running import PRETRAINING, SINGLE, run_keys, write_item_features

from recbole_mmdiff.errors import ConfigError, DataError
from recbole_mmdiff.recommend import Recommender
from recbole_mmdiff.recommend.new_users import read_new_users

MAPPING = {**PRETRAINING, "epochs": 1}
PROFILES = {"modalities": ["text", "image"], "embedding_size": 4, "hidden_size": 8, "sampling_noise": False,
            "pretrain_epochs": 1, "epochs": 1}
#: model -> keys of a short run
CASES = {"EMCDR": MAPPING, "LACDR": MAPPING, "DiffCDR": MAPPING,
         "MMDCDR": {**PROFILES, "diffusion_epochs": 1}, "MuSiC": {**PROFILES, "feature_epochs": 1,
                                                                  "side_epochs": 1},
         "SIEOUG": {"modalities": ["text"], "embedding_size": 4, "knn_k": 4, "num_clusters": 3, "epochs": 1}}
HEADER = "user_id:token\titem_id:token\trating:float"


@pytest.fixture(scope="module")
def pair(make_tiny_pair, tmp_path_factory):
    """A pair whose items have features."""
    made = make_tiny_pair(tmp_path_factory.mktemp("new"))
    write_item_features(made)
    return made


@pytest.fixture(scope="module")
def made(pair, tiny_config, tmp_path_factory):
    """``made(model)``: the recommender of a short run."""
    found = {}

    def make(model, **keys):
        if model not in found:
            keys = {"data_path": pair.folder, **CASES.get(model, {}), **keys}
            found[model] = Recommender(run_keys(tiny_config(model, **keys),
                                                tmp_path_factory.mktemp(model) / "run"))
        return found[model]

    return make


def write(path, lines, header=HEADER):
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def as_fitted(recommender):
    """What descent only comes near to: source users at the minimum of their own rows, or for SIEOUG
    without start vectors. Then new users are known ones exactly."""
    model, source = recommender.model.eval(), recommender.parts.observed.source
    if hasattr(model, "guidance"):
        cold = [source.field2token_id["user_id"][user] for user in recommender.cold_users]
        with torch.no_grad():
            model.domains["source"].user_embedding.weight[cold] = 0
    else:
        fit(getattr(model, "source", None) or model.domains["source"].factorization, source, model.reg_weight)
    model.forget()
    for domain in getattr(model, "domains", {}).values():
        if hasattr(domain, "forget"):
            domain.forget()


@torch.no_grad()
def fit(base, source, reg_weight):
    """Every user's row by least squares with numpy, on the rows of the penalty beside those of the data."""
    user, item, rating = (source.inter_feat[name].numpy() for name in ("user_id", "item_id", "rating"))
    items = base.item_factors(torch.arange(source.item_num)).double().numpy()
    offsets = base.item_offset(torch.arange(source.item_num)).double().numpy()
    for number in np.unique(user):
        rows = item[user == number]
        ridge = np.sqrt(max(reg_weight, 1e-6) * len(rows)) * np.eye(items.shape[1])
        wanted = np.concatenate([rating[user == number] - offsets[rows], np.zeros(items.shape[1])])
        vector = np.linalg.lstsq(np.concatenate([items[rows], ridge]), wanted, rcond=None)[0]
        base.set_user_factors(torch.tensor([number]), torch.tensor(vector[None]).float())


@pytest.mark.parametrize("model", CASES)
def test_a_new_user_with_the_rows_of_a_cold_one(model, made, pair, tmp_path):
    """Each row of the file is one of a known cold user, under another name."""
    recommender = made(model)
    as_fitted(recommender)
    cold = set(recommender.cold_users)
    path = write(tmp_path / "new.inter", [f"new-{user}\t{item}\t{rating}"
                                          for user, item, rating, _ in pair.source_rows if user in cold])
    known = recommender.recommend(recommender.cold_users, 1000)
    found = recommender.recommend_new(path, 1000)
    assert {user.removeprefix("new-") for user in found.user} == cold
    theirs = known.frame().set_index(["user", "item"])["score"]
    ours = found.frame().assign(user=[user.removeprefix("new-") for user in found.user])
    ours = ours.set_index(["user", "item"])["score"]
    np.testing.assert_allclose(ours, theirs[ours.index], rtol=1e-3, atol=1e-4)
    assert ours.groupby("item").std().max() > 1e-6, "everybody has the same scores"


@pytest.mark.parametrize(("model", "words"), [
    *((model, "makes no vectors of users out of source ratings alone; train it with them, or use MMDCDR")
      for model in ("PTUPCDR", "SSCDR", "CMF", "CoNet", "P2M2CDR", "DisenCDR", "GOUM", "MF")),
    ("BPR", "is RecBole's, and knows the users of its training alone")])
def test_models_that_cannot_say_so(model, words, made, tmp_path):
    keys = {**PRETRAINING, "epochs": 1} if model in ("PTUPCDR", "SSCDR") else {"epochs": 1}
    keys |= {"train_neg_ratio": 1} if model == "DisenCDR" else {}
    keys |= {"modalities": ["text"]} if model == "P2M2CDR" else {}
    with pytest.raises(ConfigError, match=rf"new users: {model} {words}"):
        made(model, **keys).recommend_new(write(tmp_path / "new.inter", ["a\tsi1\t4"]))


@pytest.mark.parametrize("model", ["CCDRec", "FREEDOM", "VBPR"])
def test_models_of_one_domain_say_so(model, pair, tiny_config, tmp_path):
    keys = {**SINGLE, "data_path": pair.folder, "modalities": ["text"], "embedding_size": 4, "epochs": 1,
            "load_col": {"inter": ["user_id", "item_id"]}, "valid_metric": "NDCG@10"}
    run = run_keys(tiny_config(model, **keys), tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"new users: {model} was trained on one domain"):
        Recommender(run).recommend_new(tmp_path / "new.inter")


# ---- the file ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(made):
    return made("EMCDR").parts.observed.source


def test_both_forms_are_read_alike(source, tmp_path):
    rows = [("b", "si3", "2.5"), ("a", "si1", "4"), ("b", "si1", "1")]
    atomic = write(tmp_path / "new.inter", ["\t".join(row) for row in rows])
    csv = write(tmp_path / "new.csv", [f"{item},{rating},x,{user}" for user, item, rating in rows],
                "item_id,rating,note,user_id")
    for path in (atomic, csv):
        tokens, found = read_new_users(path, source, False)
        items = source.field2id_token["item_id"][found.item]
        assert tokens.tolist() == ["a", "b"] and found.count == 2
        assert list(zip(found.user.tolist(), items.tolist(), found.rating.tolist(), strict=True)) \
            == [(0, "si1", 4.0), (1, "si3", 2.5), (1, "si1", 1.0)]


@pytest.mark.parametrize("model", ["MMDCDR", "MuSiC"])
def test_noise_does_not_depend_on_who_else_there_is(model, pair, tiny_config, tmp_path):
    keys = {**CASES[model], "sampling_noise": True, "num_samples": 2}
    run = run_keys(tiny_config(model, data_path=pair.folder, **keys), tmp_path / "run")
    lines = [f"{user}\t{item}\t{rating}" for user, item, rating, _ in pair.source_rows]
    both = Recommender(run).recommend_new(write(tmp_path / "all.inter", lines), 1000).frame()
    last = sorted({line.split("\t")[0] for line in lines})[-1]
    alone = write(tmp_path / "one.inter", [line for line in lines if line.startswith(last)])
    found = Recommender(run).recommend_new(alone, 1000).frame()
    both = both[both["user"] == last].set_index("item")["score"]
    np.testing.assert_allclose(found.set_index("item")["score"][both.index], both, rtol=1e-4, atol=1e-5)


def test_unknown_items_and_users(source, tmp_path, caplog):
    path = write(tmp_path / "new.inter", ["a\tsi1\t4", "a\twhat\t4", "b\t[PAD]\t4"])
    with pytest.raises(DataError, match=r"\['b'\] rated no item .*1 of 2 users.*--skip-unknown"):
        read_new_users(path, source, False)
    with caplog.at_level(logging.WARNING):
        tokens, found = read_new_users(path, source, True)
    assert tokens.tolist() == ["a"] and len(found.item) == 1
    assert "2 rows name 2 items" in caplog.text and "line 3 ('what')" in caplog.text
    with pytest.raises(DataError, match="nobody is left"):
        read_new_users(write(tmp_path / "none.inter", ["a\twhat\t4"]), source, True)


@pytest.mark.parametrize(("name", "lines", "header", "message"), [
    ("a.inter", ["a\tsi1\t4", "a\tsi1\t5"], HEADER, r"line 3: .*second time"),
    ("b.inter", ["a\tsi1\tx"], HEADER, "line 2: rating is 'x'"),
    ("c.inter", ["a\tsi1"], "user_id:token\titem_id:token", "no column 'rating'"),
    ("d.csv", ["a,si1,inf"], "user_id,item_id,rating", "line 2: rating is 'inf'"),
    ("e.csv", [",si1,4"], "user_id,item_id,rating", "line 2: user_id is ''"),
    ("f.csv", ["a,si1"], "user_id,item_id", "no column 'rating'"),
    ("g.csv", [], "user_id,item_id,rating", "no rows"),
    ("h.csv", ["a,si1,4", "a,si1,4"], "user_id,item_id,rating", "line 3: .*second time"),
    ("i.csv", ["a,si1,nan"], "user_id,item_id,rating", "line 2: rating is 'nan'"),
    ("j.inter", ["a\tsi1\tnan"], HEADER, "line 2: rating is"),
    ("k.csv", ["a,si1"], "user_id,item_id,rating", "line 2: rating is ''"),
    ("l.csv", ["a"], "user_id,item_id,rating", "line 2: item_id is ''"),
    ("m.csv", ["a,si1,4", "a,si2,4,x"], "user_id,item_id,rating", "cannot be read as CSV"),
    ("p.csv", ["a,si1,4,", "b,si3,2,"], "user_id,item_id,rating", "cannot be read as CSV"),
    ("n.inter", ["a\tsi1\t4", "a\tsi2\t50"], HEADER, "line 3: rating is 50, but .* are from 1 to 5"),
    ("o.csv", ["a,si1,0"], "user_id,item_id,rating", "line 2: rating is 0, but .* are from 1 to 5"),
])
def test_faults_are_told_by_line(name, lines, header, message, source, tmp_path):
    with pytest.raises(DataError, match=message):
        read_new_users(write(tmp_path / name, lines, header), source, True)


def test_a_file_that_is_not_there(source, tmp_path):
    for name in ("none.inter", "none.csv"):
        with pytest.raises(DataError, match=name):
            read_new_users(tmp_path / name, source, True)
