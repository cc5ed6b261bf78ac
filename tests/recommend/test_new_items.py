"""Items outside of the data: like a known item without training rows that has their features; and what alone
is ranked."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from running import run_keys, write_item_features

from recbole_mmdiff.data.features import FeatureFile, write_features
from recbole_mmdiff.errors import ConfigError, DataError
from recbole_mmdiff.model import ccdrec
from recbole_mmdiff.recommend import Recommender

PROFILES = {"modalities": ["text", "image"], "embedding_size": 4, "hidden_size": 8, "pretrain_epochs": 1,
            "feature_size": 2, "num_steps": 4, "num_evaluations": 2}
#: of the pair: an item that the split holds out
APART = "ti11"
ONE_DOMAIN = {"modalities": ["text", "image"], "embedding_size": 4, "knn_k": 3, "num_layers": 1,
              "num_item_layers": 2}
#: case -> model and keys of a short run
PAIRS = {"MMDCDR": ("MMDCDR", {**PROFILES, "diffusion_epochs": 1}),
         "MMDCDR, features as they are": ("MMDCDR", {**PROFILES, "diffusion_epochs": 1, "use_ids": False,
                                                     "biases": False, "feature_size": 0}),
         "MuSiC": ("MuSiC", {**PROFILES, "feature_epochs": 1, "side_epochs": 1, "num_evaluations": None}),
         "P2M2CDR": ("P2M2CDR", {"modalities": ["text", "image"], "embedding_size": 4}),
         "SIEOUG": ("SIEOUG", {"modalities": ["text"], "embedding_size": 4, "knn_k": 3, "num_clusters": 4})}
DOMAINS = {"VBPR": ("VBPR", {"modalities": ["text", "image"], "embedding_size": 4}),
           "FREEDOM": ("FREEDOM", ONE_DOMAIN), "LATTICE": ("LATTICE", ONE_DOMAIN),
           **{f"CCDRec on {backbone}, {reference}": ("CCDRec", {**ONE_DOMAIN, "backbone": backbone,
                                                                "reference": reference, "num_steps": 4})
              for backbone, reference in (("FREEDOM", "paper"), ("FREEDOM", "code"), ("LATTICE", "code"))}}


def put_apart(folder, token):
    """Features of which one item's point away from all others', so that it is nobody's neighbour."""
    for modality in ("text", "image"):
        file = FeatureFile.open(folder, "tgt", modality)
        side = np.array([[-12.0] if other == token else [12.0] for other in file.tokens])
        write_features(folder, "tgt", modality, file.tokens, (file.matrix + side).astype(np.float32),
                       encoder="test")


def copy_features(folder, other, names, without=()):
    """The rows of known items of ``folder`` for new ones: token -> new token, in the folder ``other``."""
    for modality in ("text", "image"):
        file = FeatureFile.open(folder, "tgt", modality)
        rows = [row for row, token in enumerate(file.tokens) if token in names]
        if rows and modality not in without:
            write_features(other, "tgt", modality, [names[file.tokens[row]] for row in rows],
                           np.array(file.matrix[rows]), encoder="test")
    return other


@pytest.fixture(scope="module")
def pair(make_tiny_pair, tmp_path_factory):
    made = make_tiny_pair(tmp_path_factory.mktemp("items"))
    write_item_features(made)
    put_apart(made.folder / "tgt", APART)
    return made


@pytest.fixture(scope="module")
def made(pair, tiny_config, ranking_config, taste_domain, tmp_path_factory):
    """``made(case)``: the recommender of a short run in which the item ``apart`` has no training row, and the
    folder of its features."""
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(taste_domain.folder, alone, dirs_exist_ok=True)
    put_apart(alone / "tgt", taste_domain.new)
    found = {}

    def make(case):
        if case not in found:
            model, keys = (PAIRS | DOMAINS)[case]
            keys = {key: value for key, value in keys.items() if value is not None} | {"epochs": 1}
            if case in DOMAINS:
                keys = ranking_config(model, data_path=alone, **keys)
                folder, apart = alone / "tgt", taste_domain.new
            else:
                keys = tiny_config(model, data_path=pair.folder, split_protocol="cold_start_items",
                                   test_item_ratio=0.4, **keys)
                folder, apart = pair.folder / "tgt", APART
            run = run_keys(keys, tmp_path_factory.mktemp("case") / "run")
            found[case] = Recommender(run), folder, apart
        recommender, folder, apart = found[case]
        assert apart in recommender.cold_items
        recommender.added = None
        return recommender, folder, apart

    return make


@torch.no_grad()
def without_start(model, item, monkeypatch):
    """Make a known item what a new one is: without a start vector, a bias and noise, and in SIEOUG in the
    groups of its two neighbours."""
    model.train().eval()        # Forgets what it has computed.
    part = model.domains["target"] if hasattr(model, "domains") else getattr(model, "backbone", model)
    for table in ("item_embedding", "item_bias"):
        if hasattr(part, table):
            getattr(part, table).weight[item] = 0
    if hasattr(part, "exploration"):
        graph = part.exploration.item_graph.to_dense() != 0
        others = graph[item].nonzero().flatten()
        part.exploration.gamma[item] = part.exploration.gamma[others[others != item]].mean(0)
        assert len(others) == 3 and graph[:, item].sum() == 1
    if hasattr(model, "aligned"):
        monkeypatch.setattr(ccdrec, "keyed_noise", lambda keys, seed: lambda _, x: torch.zeros_like(x))
        model.infer(0)


@pytest.mark.parametrize("case", PAIRS | DOMAINS)
def test_a_new_item_with_the_features_of_a_cold_one(case, made, tmp_path, monkeypatch):
    recommender, folder, apart = made(case)
    model, item = recommender.model, recommender.parts.test.field2token_id["item_id"][apart]
    without_start(model, item, monkeypatch)
    users = recommender.users[:20].tolist()
    known = recommender.recommend(users, items=[apart]).frame().set_index("user")["score"]
    recommender.add_items(copy_features(folder, tmp_path / "new", {apart: "new"}))
    # The item that it copies would be its nearest neighbour.
    for _, missing in recommender.added.known.values():
        missing[item] = True
    features = getattr(getattr(model, "backbone", model), "features", None)
    if features is not None:
        features.present[item] = False
    found = recommender.recommend(users, items=["new"]).frame().set_index("user")["score"]
    if features is not None:
        features.present[item] = True
    assert found.index.tolist() == users and len(known) > 10    # Some have seen the other one.
    np.testing.assert_allclose(found[known.index], known, rtol=1e-4, atol=1e-6)
    assert recommender.recommend(users).score.std() > 1e-4, "everything has the same score"


@pytest.mark.parametrize("case", PAIRS | DOMAINS)
def test_a_new_item_depends_on_no_other_and_changes_none(case, made, tmp_path):
    recommender, folder, _ = made(case)
    users, known = recommender.users[:5], [str(item) for item in recommender.known_items]
    alone = recommender.recommend(users, k=1000).frame().set_index(["user", "item"])["score"]
    names = {item: f"new-{item}" for item in known[:12]}
    recommender.add_items(copy_features(folder, tmp_path / "all", names))
    both = recommender.recommend(users, k=1000).frame().set_index(["user", "item"])["score"]
    np.testing.assert_allclose(both[alone.index], alone, rtol=1e-4, atol=1e-6)
    item = next(item for item in names if names[item] in recommender.new_items)
    recommender.add_items(copy_features(folder, tmp_path / "one", {item: names[item]}))
    one = recommender.recommend(users, items=[names[item]]).frame().set_index(["user", "item"])["score"]
    np.testing.assert_allclose(one, both[one.index], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["MMDCDR", "MuSiC", "SIEOUG"])
def test_new_users_and_new_items_together(case, made, pair, tmp_path):
    """A new user gets for a new item what a new user gets for the cold item that it copies."""
    recommender, folder, apart = made(case)
    path = tmp_path / "new.csv"
    path.write_text("user_id,item_id,rating\n" + "".join(f"{user},{item},{rating}\n" for user, item, rating, _
                                                          in pair.source_rows[:300]), encoding="utf-8")
    before = recommender.recommend_new(path, items=[apart])
    recommender.add_items(copy_features(folder, tmp_path / "new", {apart: "new"}))
    found = recommender.recommend_new(path, items=[apart, "new"])
    assert set(found.item) == {apart, "new"} and found.rank.max() == 2
    frame = found.frame().pivot(index="user", columns="item", values="score")
    np.testing.assert_allclose(frame[apart], before.frame().set_index("user")["score"], rtol=1e-5, atol=1e-6)
    assert frame["new"].std() > 1e-6
    if case != "SIEOUG":
        np.testing.assert_allclose(frame["new"], frame[apart], rtol=1e-5, atol=1e-6)
    whole = recommender.recommend_new(path, 1000)
    assert set(whole.item) == set(recommender.items)


# ---- what is ranked -----------------------------------------------------------------------------------


def test_some_items_alone(made):
    recommender, _, apart = made("MuSiC")
    warm = set(recommender.parts.observed.field2id_token["item_id"][
        recommender.parts.observed.inter_feat["item_id"]])
    assert set(recommender.cold_items) == set(recommender.items) - warm and warm
    whole = recommender.recommend(k=1000).frame()
    for items in (recommender.cold_items, [apart], sorted(warm)[::-1]):
        found = recommender.recommend(k=1000, items=items).frame()
        expected = whole[whole["item"].isin(items)].reset_index(drop=True)
        assert found[["user", "item", "score"]].equals(expected[["user", "item", "score"]])
        assert (found["rank"] == found.groupby("user").cumcount() + 1).all()


def test_unknown_items(made):
    recommender, _, apart = made("MuSiC")
    with pytest.raises(DataError, match=r"items: \['what'\] are not .*1 of 2.*--new-items"):
        recommender.recommend(items=["what", apart])
    assert set(recommender.recommend(items=["what", apart, apart], skip_unknown=True).item) == {apart}
    with pytest.raises(DataError, match="nothing is left"):
        recommender.recommend(items=["what", "[PAD]"], skip_unknown=True)


def test_the_command(made, tmp_path, capsys):
    from recbole_mmdiff import cli

    recommender, folder, apart = made("MuSiC")
    copy_features(folder, tmp_path / "new", {apart: "new"})
    run, user = str(recommender.run.folder), str(recommender.users[0])
    recommender.add_items(tmp_path / "new")
    for words, items in (("cold", recommender.cold_items), ("new", ["new"]),
                         (f"{apart},new", [apart, "new"])):
        assert cli.main(["recommend", run, f"--users={user}", f"--new-items={tmp_path / 'new'}",
                         f"--items={words}"]) == 0
        frame = recommender.recommend([user], items=items).frame()
        assert capsys.readouterr().out == frame.to_csv(index=False)
    assert cli.main(["recommend", run, f"--users={user}", "--items=new"]) == 2
    assert "--items: new names nothing" in capsys.readouterr().err


# ---- the features ---------------------------------------------------------------------------------------


def test_items_that_the_data_have_stay_as_they_are(made, tmp_path):
    recommender, folder, apart = made("MuSiC")
    recommender.add_items(copy_features(folder, tmp_path / "new", {apart: "new", "ti8": "ti8"}))
    assert recommender.new_items.tolist() == ["new"]
    with pytest.raises(DataError, match="all of its 1 items are in the data already"):
        recommender.add_items(copy_features(folder, tmp_path / "known", {"ti8": "ti8"}))


@pytest.mark.parametrize("policy", ["drop_item", "mean", "zero", "error"])
def test_an_item_without_a_modality(policy, pair, tiny_config, tmp_path):
    """As a known one: ``ti0`` has no feature, ``ti1`` no image."""
    keys = {**PAIRS["P2M2CDR"][1], "modality_policy": policy, "split_protocol": "cold_start_items",
            "data_path": pair.folder, "epochs": 1}
    if policy == "error":
        full = tmp_path / "full"
        shutil.copytree(pair.folder, full)
        write_item_features(replace(pair, folder=full), without={})
        keys["data_path"] = full
    recommender = Recommender(run_keys(tiny_config("P2M2CDR", **keys), tmp_path / "run"))
    names = {"ti5": "new-a", "ti1": "new-b"}
    for name, without in (("some", ()), ("text", ("image",))):
        copy_features(pair.folder / "tgt", tmp_path / name, names, without)
    if policy == "error":
        with pytest.raises(DataError, match=r"1 of 2 new items have no row of 'image': \['new-b'\]"):
            recommender.add_items(tmp_path / "some")
        return
    recommender.add_items(tmp_path / "some")
    values, missing = recommender.added.features["image"]
    known, lacking = recommender.added.known["image"]
    row = recommender.parts.test.field2token_id["item_id"]
    assert missing.tolist() == [False, True] and lacking[row["ti1"]]
    torch.testing.assert_close(values, known[[row["ti5"], row["ti1"]]])
    recommender.add_items(tmp_path / "text")
    assert recommender.added.features["image"][1].all()
    torch.testing.assert_close(recommender.added.features["image"][0][1], known[row["ti1"]])


@pytest.mark.parametrize(("change", "message"), [
    ({"dim": 4}, "has 4 dimensions, the features of the training have 5; make"),
    ({"encoder": "other"}, "its manifest says encoder: 'other', that of the training's features 'test'"),
    ({"modality": "sound"}, "feature 'text' of 'tgt' lacks tgt.text.npy"),
])
def test_features_that_do_not_fit(change, message, made, tmp_path):
    recommender, _, _ = made("MuSiC")
    write_features(tmp_path / "new", "tgt", change.get("modality", "text"), ["new"],
                   np.ones((1, change.get("dim", 5)), np.float32), encoder=change.get("encoder", "test"))
    with pytest.raises(DataError, match=message):
        recommender.add_items(tmp_path / "new")
    assert recommender.added is None


def test_the_text_form_is_read(made, tmp_path):
    recommender, _, _ = made("MuSiC")
    (tmp_path / "tgt.text").write_text("item_id:token\temb:float_seq\nnew\t1 2 3 4 5\n", encoding="utf-8")
    recommender.add_items(tmp_path)
    assert recommender.added.features["text"][0].tolist() == [[1, 2, 3, 4, 5]]


@pytest.mark.parametrize("model", ["DiffCDR", "CMF", "MF", "BPR", "BM3", "CCDRec"])
def test_models_that_cannot_say_so(model, pair, tiny_config, ranking_config, tmp_path):
    write_features(tmp_path / "new", "tgt", "text", ["new"], np.ones((1, 5), np.float32), encoder="test")
    keys = {"epochs": 1, "embedding_size": 16}
    if model in ("BM3", "CCDRec"):
        keys |= {"modalities": ["text"], "backbone": "MCDRec", "num_steps": 2, "unet_channels": 8}
        keys = ranking_config(model, **{key: value for key, value in keys.items()
                                        if model == "CCDRec" or key in ("epochs", "modalities")})
    else:
        keys = tiny_config(model, data_path=pair.folder, **keys)
    recommender = Recommender(run_keys(keys, tmp_path / "run"))
    named = "MCDRec" if model == "CCDRec" else model
    with pytest.raises(ConfigError, match=f"^new items: {named} "):
        recommender.add_items(tmp_path / "new")
    assert recommender.added is None
