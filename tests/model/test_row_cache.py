"""Vectors that are computed once, by themselves and in the models that keep them."""

import copy
import pickle

import pytest
import torch

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.model.row_cache import RowCache


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_every_row_is_computed_once(chunk):
    table, asked = torch.randn(20, 3, requires_grad=True), []

    def compute(ids):
        assert len(ids) <= chunk and torch.equal(ids, torch.unique(ids))
        asked.extend(ids.tolist())
        return table[ids]

    rows = RowCache(compute, 20, chunk)
    assert rows(torch.zeros(0, dtype=torch.int64)).shape == (0, 3)
    for ids in ([5, 2, 5, 19], [2, 5], [0, 19, 7, 8, 1], list(range(20))[::-1], []):
        found = rows(torch.tensor(ids, dtype=torch.int64))
        assert torch.equal(found, table[ids]) and not found.requires_grad
    assert sorted(asked) == list(range(20))
    before = table[[4]].clone()
    with torch.no_grad():
        table.add_(1.0)
    assert torch.equal(rows(torch.tensor([4])), before)
    rows.clear()
    assert torch.equal(rows(torch.tensor([4])), table[[4]])


def test_nothing_is_computed_for_nothing():
    calls = []
    rows = RowCache(lambda ids: calls.append(len(ids)) or ids[:, None].float(), 5, 2)
    for _ in range(3):
        rows(torch.tensor([1, 3]))
    assert calls == [2]


# ---- in a model --------------------------------------------------------------------------------


@pytest.fixture(params=["MMDCDR", "MuSiC"])
def build(request, tiny_config):
    """``build(seed)``: a model of ids with weights drawn by the seed, in evaluation."""

    def made(seed):
        config = Config(config_dict=tiny_config(request.param, modalities=[], use_ids=True, num_steps=5,
                                                hidden_size=8, id_embedding_size=3))
        torch.manual_seed(seed)
        return config.model_class(config, prepare_parts(config).train).eval()

    return made


@pytest.fixture
def model(build):
    return build(1)


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def vectors(model):
    return model.user_factors(torch.arange(model.n_users)), model.item_factors(torch.arange(model.n_items))


@pytest.mark.parametrize("how", ["train", "load", "move"])
def test_new_weights_are_new_vectors(how, model):
    before = vectors(model)
    assert all(torch.equal(*both) for both in zip(before, vectors(changed(model)), strict=True)), \
        "within an evaluation they are computed once"
    if how == "train":
        model.train().eval()
    elif how == "load":
        model.load_state_dict(model.state_dict())
    else:
        model.to("cpu")
    assert not any(torch.equal(*both) for both in zip(before, vectors(model), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=["deepcopy", "pickle"])
def test_a_copy_of_a_model_has_vectors_of_its_own(copied, model):
    before = vectors(model)
    other = copied(model)
    assert all(torch.equal(*both) for both in zip(before, vectors(other), strict=True))
    changed(other).train().eval()
    assert not any(torch.equal(*both) for both in zip(before, vectors(other), strict=True))
    model.train().eval()
    assert all(torch.equal(*both) for both in zip(before, vectors(model), strict=True))


def test_weights_alone_make_the_same_vectors(model, build):
    model.fit_profiles()
    model.train().eval()
    other = build(9)
    assert not torch.equal(vectors(other)[0], vectors(model)[0])
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(*both) for both in zip(vectors(other), vectors(model), strict=True))
