"""SIEOUG's item exploration in other models of two domains, by a key: on, off, and between the two."""

import shutil

import numpy as np
import pytest
import torch
from exploration_by_hand import EXPLORED
from running import run_keys

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.features import FeatureFile, write_features
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.errors import ConfigError

MODELS = ["BiTGCF", "DisenCDR"]
DOMAINS = ("target", "source")


@pytest.fixture(scope="module")
def made(tiny_config, content):
    """``made(model, folder, **keys)``: an untrained model, a batch of both domains, and the data."""

    def make(model, folder=None, **keys):
        keys = {"embedding_size": 4, "data_path": folder or content(""), **keys}
        config = Config(config_dict=tiny_config(model, **keys))
        train = prepare_parts(config).train
        torch.manual_seed(3)
        made = config.model_class(config, train)
        made.seed, made.epoch = 5, 1
        return made, next(iter(stage_loader(config, train, "both", 40, seed=5))), train

    return make


def rewritten(folder, output, domain, tokens):
    """A copy of a pair with other texts of some items of a domain."""
    shutil.copytree(folder, output)
    file = FeatureFile.open(output / domain, domain, "text")
    matrix = np.array(file.matrix)
    places = [place for place, token in enumerate(file.tokens) if token in tokens]
    matrix[places] = np.random.default_rng(6).normal(size=(len(places), matrix.shape[1]))
    write_features(output / domain, domain, "text", list(file.tokens), matrix, encoder="test")
    return output


def vectors_of(model):
    """Copies of what scores."""
    return {name: tuple(part.clone() for part in model.eval().vectors_of(name)[:2]) for name in DOMAINS}


# ---- the module ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["BiTGCF", "SIEOUG"])
@pytest.mark.parametrize(("modalities", "missing"), [(["text"], ""), (["text", "image"], ""),
                                                     (["text", "image"], "few")])
def test_item_graph_by_hand(made, content, model, modalities, missing):
    """Out of the files: in each modality an item's nearest by cosine, itself among them; of a pair the share
    of the modalities that both have (RISGF of two is their mean); divided by the roots of the degrees."""
    folder = content(missing)
    keys = EXPLORED if model == "BiTGCF" else {"num_clusters": 3, "num_layers": 2}
    built, _, train = made(model, folder, **{**keys, "modalities": modalities, "knn_k": 3})
    explorations = built.explorations if model == "BiTGCF" else {
        name: domain.exploration for name, domain in built.domains.items()}
    for name, domain, part in (("target", "tgt", train), ("source", "src", train.source)):
        count, found = part.item_num, explorations[name]
        near, both = np.zeros((2, count, count))
        for modality in modalities:
            file = FeatureFile.open(folder / domain, domain, modality)
            rows = dict(zip(file.tokens, np.asarray(file.matrix, np.float64), strict=True))
            unit = {item: rows[token] / np.linalg.norm(rows[token])
                    for item, token in enumerate(part.field2id_token["item_id"]) if token in rows}
            for item, vector in unit.items():
                nearest = sorted(unit, key=lambda other: (other != item, -(vector @ unit[other])))[:3]
                near[item, nearest] += 1
                both[item, list(unit)] += 1
        fused = near / np.maximum(both, 1)
        degrees = np.maximum(fused.sum(1), 1e-9)
        np.testing.assert_allclose(found.item_graph.to_dense(), fused / np.sqrt(degrees[:, None] * degrees),
                                   atol=1e-6)
        assert found.gamma.shape == (count, 3)


@pytest.mark.parametrize(("model", "keys", "width"), [
    ("BiTGCF", {"layers": "concat", "num_layers": 1}, 8), ("BiTGCF", {"layers": "mean"}, 4),
    ("DisenCDR", {}, 4)])
def test_size_and_layers(made, model, keys, width):
    """Those of the vectors that score, and a number of layers of its own."""
    built = made(model, **EXPLORED, **keys)[0]
    for name in DOMAINS:
        assert built.explorations[name].attention.shape == (3, width)
        assert len(built.explorations[name].weights) == 2


# ---- on and off ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_without_the_key_features_are_not_read(made, content, tmp_path, model):
    """Whatever is in the folder, and the other keys of the module."""
    shutil.copytree(content(""), tmp_path / "data")
    for domain in ("src", "tgt"):
        (tmp_path / "data" / domain / f"{domain}.text.npy").write_bytes(b"no matrix")
    keys = {**EXPLORED, "item_exploration": False}
    plain, batch, _ = made(model)
    other = made(model, tmp_path / "data", **keys)[0]
    assert list(plain.state_dict()) == list(other.state_dict())
    assert torch.equal(plain.ranking_loss(batch), other.ranking_loss(batch))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("model", MODELS)
def test_attention_to_the_models_own_vectors_is_the_plain_model(made, model):
    """The start is the same. Where all vectors are positive, so are their products with what attends."""
    plain, batch, _ = made(model)
    built = made(model, **EXPLORED)[0]
    shared = dict(plain.named_parameters())
    others = {name: value for name, value in built.named_parameters() if name not in shared}
    assert set(shared) | set(others) == set(dict(built.named_parameters()))
    assert all(torch.equal(value, shared[name]) for name, value in built.named_parameters() if name in shared)
    with torch.no_grad():
        for parameter in (*plain.parameters(), *built.parameters()):
            parameter.abs_()
        for name in DOMAINS:
            built.explorations[name].attention[:] = torch.tensor([1e6, -1e6, -1e6])[:, None]
    for ours, theirs in zip(vectors_of(built).values(), vectors_of(plain).values(), strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert torch.equal(built.train().ranking_loss(batch), plain.train().ranking_loss(batch))
    with torch.no_grad():
        for name in DOMAINS:
            built.explorations[name].attention[1] = 2e6
    assert not torch.equal(vectors_of(built)["target"][1], vectors_of(plain)["target"][1])
    assert not torch.equal(built.train().ranking_loss(batch), plain.train().ranking_loss(batch))


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_reaches_the_module(made, model):
    built, batch, _ = made(model, **EXPLORED)
    with torch.no_grad():
        for name in DOMAINS:
            torch.nn.init.normal_(built.explorations[name].attention)
    built.ranking_loss(batch).backward()
    for name, parameter in built.explorations.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


# ---- what features may change ----------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("domain", "name", "other"), [("tgt", "target", "source"),
                                                       ("src", "source", "target")])
def test_features_change_the_items_of_their_domain_alone(made, content, tmp_path, model, domain, name, other):
    """Not users, nor the other domain, of the same weights."""
    tokens = FeatureFile.open(content("") / domain, domain, "text").tokens[:9]
    folder = rewritten(content(""), tmp_path / "data", domain, set(tokens))
    built, again = made(model, **EXPLORED)[0], made(model, folder, **EXPLORED)[0]
    assert not torch.equal(built.explorations[name].item_graph.to_dense(),
                           again.explorations[name].item_graph.to_dense())
    ours, theirs = vectors_of(built), vectors_of(again)
    assert not torch.equal(ours[name][1], theirs[name][1])
    assert torch.equal(ours[name][0], theirs[name][0])
    assert all(torch.equal(*pair) for pair in zip(ours[other], theirs[other], strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_features_of_unknown_items_change_nothing(made, content, tmp_path, model):
    """A token that the domain does not know stands in no graph and in no cluster."""
    shutil.copytree(content(""), tmp_path / "data")
    for domain in ("src", "tgt"):
        file = FeatureFile.open(content("") / domain, domain, "text")
        matrix = np.concatenate([file.matrix[:1] + 0.01, file.matrix])
        write_features(tmp_path / "data" / domain, domain, "text", ["unknown", *file.tokens], matrix,
                       encoder="test")
    built, again = made(model, **EXPLORED)[0], made(model, tmp_path / "data", **EXPLORED)[0]
    for ours, theirs in zip(vectors_of(built).values(), vectors_of(again).values(), strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


# ---- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_both_domains_are_evaluated(tiny_config, content, tmp_path, model):
    keys = {"embedding_size": 4, "epochs": 1, "split_protocol": "ratio", "data_path": content(""),
            "eval_passes": ["ranking_full"], **EXPLORED}
    found = run_keys(tiny_config(model, **keys), tmp_path / "run")
    assert set(found.metrics["test"]) == {"ranking_full", "source_ranking_full"}


def test_fine_tuning_scores_explored_items(tiny_config, content, tmp_path):
    """BiTGCF's frozen vectors are those that score, and fine-tuning leaves the module as it is."""
    keys = {"embedding_size": 4, "epochs": 1, "split_protocol": "warm_start", "finetune_epochs": 1,
            "data_path": content(""), **EXPLORED}
    found = run_keys(tiny_config("BiTGCF", **keys), tmp_path / "run")
    assert found.metrics["history"][-1]["stage"] == "finetune"
    model = found.model.eval()
    model.freeze_vectors()
    torch.testing.assert_close(model._frozen.items, model.vectors_of("target").items, rtol=0, atol=0)
    assert not {id(value) for value in model.finetuning_stage().parameters} \
        & {id(value) for value in model.explorations.parameters()}
    user, item = torch.arange(1, 9), torch.arange(2, 10)
    torch.testing.assert_close(model.finetuning_scores(user, item)[0],
                               model.forward(user, item), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("keys", "message"), [
    ({"exploration_layers": 0}, "exploration_layers: 0 is too small"),
    ({"knn_k": 0}, "knn_k: 0 is too small"), ({"modalities": []}, r"modalities: \[\] names none"),
    ({"graph_weight": 0.0}, "graph_weight")])
def test_bad_keys(made, model, keys, message):
    with pytest.raises(ConfigError, match=message):
        made(model, **{**EXPLORED, **keys})


@pytest.mark.parametrize("model", MODELS)
def test_a_domain_without_modalities(made, tiny_pair, model):
    with pytest.raises(ConfigError, match="has no features of items"):
        made(model, tiny_pair.folder, **{**EXPLORED, "modalities": None})
