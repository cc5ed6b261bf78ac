"""CoNet: the contract, its loss by hand, its two limits, and the memory of a full ranking."""

import numpy as np
import pytest
import torch
from contract import ModelContract
from recbole.data.interaction import Interaction
from running import run_keys, slope

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.conet import CoNet

KEYS = {"embedding_size": 6, "hidden_sizes": [5, 4]}


class TestCoNet(ModelContract):
    """Two towers with cross connections."""

    model = "CoNet"
    keys = {"hidden_sizes": [16, 8], "embedding_size": 16}
    accurate_keys = {"epochs": 20, "learning_rate": 0.01, "reg_weight": 0.001, "eval_step": 0}


@pytest.fixture(scope="module")
def built(tiny_config):
    """``built(**keys)``: an untrained model in float64 and a batch of both domains."""

    def build(**keys):
        config = Config(config_dict=tiny_config("CoNet", **{**KEYS, **keys}))
        train = prepare_parts(config).train
        torch.manual_seed(3)
        model = CoNet(config, train).double()
        for parameter in model.parameters():    # Else biases start at or near zero.
            torch.nn.init.normal_(parameter, std=0.5)
        loader = stage_loader(config, train, "both", 7, seed=5)
        return model, next(iter(loader)), train

    return build


def arrays(model):
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def items_of(train, prefix):
    """user -> the positive training items of a domain, from the rows themselves."""
    domain = train.source if prefix else train
    found = {}
    for user, item, rating in zip(domain.inter_feat["user_id"].tolist(),
                                  domain.inter_feat["item_id"].tolist(),
                                  domain.ratings.tolist(), strict=True):
        if rating >= 4:
            found.setdefault(user, []).append(item)
    return found


def score_by_hand(weights, train, user, item, name):
    """Both towers for one pair, one layer after another."""
    other, prefix = ("source", "source_") if name == "target" else ("target", "")
    table = weights[f"item_embedding.{other}.weight"]
    mean = np.zeros(table.shape[1])
    for known in items_of(train, prefix).get(user, []):
        mean += table[known] / len(items_of(train, prefix)[user])
    start = weights["user_embedding.weight"][user]
    own = np.concatenate([start, weights[f"item_embedding.{name}.weight"][item]])
    layer = {name: own, other: np.concatenate([start, mean])}
    for level in range(2):
        cross = weights[f"towers.cross.{level}.weight"]
        layer = {side: np.maximum(weights[f"towers.layers.{side}.{level}.weight"] @ layer[side]
                                  + weights[f"towers.layers.{side}.{level}.bias"]
                                  + cross @ layer[far], 0.0)
                 for side, far in (("target", "source"), ("source", "target"))}
    return weights[f"towers.outputs.{name}.weight"][0] @ layer[name] \
        + weights[f"towers.outputs.{name}.bias"][0]


@pytest.mark.parametrize("negatives", [1, 3])
def test_loss_by_hand(negatives, built):
    model, batch, train = built(train_neg_ratio=negatives, cross_sparsity=0.3, reg_weight=0.2)
    weights, expected = arrays(model), 0.0
    for name, prefix in (("target", ""), ("source", "source_")):
        terms, users, items = [], [], []
        rows = zip(batch[prefix + "user_id"].tolist(), batch[prefix + "item_id"].tolist(),
                   batch[prefix + "neg_item_id"].tolist(), strict=True)
        for user, item, sampled in rows:
            terms.append(np.log1p(np.exp(-score_by_hand(weights, train, user, item, name))))
            for other in sampled:
                terms.append(np.log1p(np.exp(score_by_hand(weights, train, user, other, name))))
            users.append((weights["user_embedding.weight"][user]**2).sum())
            items += [(weights[f"item_embedding.{name}.weight"][one]**2).sum()
                      for one in [item, *sampled]]
        expected += np.mean(terms) + 0.2 * (np.mean(users) + np.mean(items))
    expected += 0.3 * sum(np.abs(weights[f"towers.cross.{level}.weight"]).sum()
                          for level in range(2))
    assert model.ranking_loss(batch).item() == pytest.approx(expected, rel=1e-10)


def test_gradient_against_finite_differences(built):
    model, batch, _ = built(reg_weight=0.2)
    model.ranking_loss(batch).backward()
    random = np.random.default_rng(1)
    for name, parameter in model.named_parameters():
        place = tuple(random.integers(size) for size in parameter.shape)
        if name.endswith("embedding.weight") or name.startswith("item_embedding"):
            place = (int(parameter.grad.abs().sum(1).argmax()), place[1])
        with torch.no_grad():
            expected = slope(lambda: model.ranking_loss(batch).item(), parameter, place, step=1e-6)
        assert parameter.grad[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-9), name


def test_without_cross_connections_it_is_two_perceptrons(built):
    model, batch, _ = built()
    for layer in model.towers.cross:
        torch.nn.init.zeros_(layer.weight)
    user, item = batch["user_id"], batch["item_id"]
    for name in ("target", "source"):
        layers = model.towers.layers[name]
        hidden = torch.cat([model.user_embedding(user), model.item_embedding[name](item % 30)], -1)
        for layer in layers:
            hidden = layer(hidden).relu()
        alone = model.towers.outputs[name](hidden).squeeze(-1)
        torch.testing.assert_close(model.pair_scores(name, user, item % 30), alone)


def test_a_full_ranking_in_chunks_of_any_size(built):
    model, _, train = built()
    model.eval()
    users = Interaction({"user_id": torch.arange(train.user_num)})
    tables, widest = [], []
    watched = model.towers.scores

    def watch(target, source):
        widest.append(target.numel() + source.numel())
        return watched(target, source)

    model.towers.scores = watch
    for elements in (1, 5000, 2**24):
        model.chunk_elements = elements
        tables.append(model.full_sort_predict(users))
        if elements == 5000:
            assert max(widest) <= 5000
    torch.testing.assert_close(tables[0], tables[2])
    torch.testing.assert_close(tables[1], tables[2])


def test_sparsity_shrinks_the_cross_connections(tiny_config, tmp_path):
    sizes = [run_keys(tiny_config("CoNet", epochs=15, cross_sparsity=weight, learning_rate=0.01,
                                  eval_step=0, **KEYS),
                      tmp_path / str(weight)).model.towers.cross[0].weight.abs().sum().item()
             for weight in (0.0, 0.1)]
    assert sizes[1] < 0.2 * sizes[0]


@pytest.mark.parametrize(("keys", "message"), [
    ({"train_neg_ratio": 0}, "train_neg_ratio: is 0"), ({"hidden_sizes": []}, "hidden_sizes")])
def test_what_it_cannot_do_without(keys, message, built):
    with pytest.raises(ConfigError, match=message):
        built(**keys)
