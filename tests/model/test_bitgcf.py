"""BiTGCF: the contract, its propagation, transfer and loss by slow loops, and its cache."""

import numpy as np
import pytest
import torch
from contract import ModelContract
from exploration_by_hand import EXPLORED, joined_by_hand
from recbole.data.interaction import Interaction
from running import positive_pairs, run_keys, slope

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.bitgcf import BiTGCF

KEYS = {"embedding_size": 4, "num_layers": 2, "lambda_target": 0.7, "lambda_source": 0.6,
        "reg_weight": 0.3, "init_std": 0.6}


class TestBiTGCF(ModelContract):
    """Two graphs with transfer."""

    model = "BiTGCF"
    keys = {"embedding_size": 16, "train_batch_size": 512}
    accurate_keys = {"epochs": 30, "learning_rate": 0.02, "reg_weight": 0.1, "eval_step": 0}


class TestBiTGCFWithItemExploration(TestBiTGCF):
    """Items of two modalities, many without an image."""

    featured = True

    @pytest.fixture(scope="class", autouse=True)
    def features(self, content):
        type(self).keys = {**TestBiTGCF.keys, **EXPLORED, "data_path": content("few")}


@pytest.fixture(scope="module")
def built(tiny_config):
    """``built(**keys)``: an untrained model in float64, a batch of both domains, and the data; what explores
    items has drawn weights."""

    def build(**keys):
        config = Config(config_dict=tiny_config("BiTGCF", **{**KEYS, **keys}))
        train = prepare_parts(config).train
        torch.manual_seed(3)
        model = BiTGCF(config, train).double()
        for parameter in model.explorations.parameters():
            torch.nn.init.normal_(parameter, std=0.6)
        return model, next(iter(stage_loader(config, train, "both", 9, seed=5))), train

    return build


def unit(vector):
    return vector / max(np.linalg.norm(vector), 1e-12)


def vectors_by_hand(model, train, transfer_start, layers):
    """domain -> (users, items), node by node and edge by edge."""
    domains = {"target": train, "source": train.source}
    pairs = {name: positive_pairs(domain) for name, domain in domains.items()}
    users, items, degree = {}, {}, {}
    for name, domain in domains.items():
        table = model.tables[name].weight.detach().numpy()
        users[name], items[name] = table[:domain.user_num].copy(), table[domain.user_num:].copy()
        degree[name] = np.zeros(domain.user_num)
        for user, _ in pairs[name]:
            degree[name][user] += 1
        users[name][degree[name] == 0] = 0

    def transfer():
        before = {name: users[name].copy() for name in users}
        for user in range(1, train.num_overlap + 1):
            n_t, n_s = degree["target"][user], degree["source"][user]
            e_t, e_s = before["target"][user], before["source"][user]
            common = (n_s * e_s + n_t * e_t) / max(n_s + n_t, 1)
            users["target"][user] = (common + 0.7 * e_t + 0.3 * e_s) / 2
            users["source"][user] = (common + 0.6 * e_s + 0.4 * e_t) / 2

    if transfer_start:
        transfer()
    kept = {name: [(users[name].copy(), items[name].copy())] for name in users}
    for _ in range(2):
        for name in domains:
            of_items = {item: [u for u, i in pairs[name] if i == item] for _, item in pairs[name]}
            told = np.zeros_like(users[name]), np.zeros_like(items[name])
            for user, item in pairs[name]:
                weight = 1 / np.sqrt(degree[name][user] * len(of_items[item]))
                told[0][user] += weight * items[name][item]
                told[1][item] += weight * users[name][user]
            users[name] = users[name] + told[0] + users[name] * told[0]
            items[name] = items[name] + told[1] + items[name] * told[1]
        transfer()
        for name in domains:
            kept[name].append((np.stack([unit(one) for one in users[name]]),
                               np.stack([unit(one) for one in items[name]])))
    join = (lambda parts: np.concatenate(parts, 1)) if layers == "concat" \
        else (lambda parts: np.mean(parts, 0))
    return {name: tuple(join([layer[side] for layer in kept[name]]) for side in (0, 1))
            for name in kept}


@pytest.mark.parametrize(("transfer_start", "layers"),
                         [(True, "concat"), (False, "concat"), (True, "mean")])
def test_propagation_and_transfer_by_hand(transfer_start, layers, built):
    model, _, train = built(transfer_start=transfer_start, layers=layers)
    expected = vectors_by_hand(model, train, transfer_start, layers)
    for name, found in model.scoring_vectors().items():
        for mine, theirs in zip(found[:2], expected[name], strict=True):
            np.testing.assert_allclose(mine.detach(), theirs, atol=1e-6)


@pytest.mark.parametrize("layers", ["concat", "mean"])
@pytest.mark.parametrize("missing", ["", "few"])
def test_explored_items_by_hand(layers, missing, built, content):
    """At the width of the joined layers; users stay."""
    model, _, train = built(layers=layers, data_path=content(missing), **EXPLORED)
    expected = vectors_by_hand(model, train, True, layers)
    for name, found in model.scoring_vectors().items():
        users, items = expected[name]
        np.testing.assert_allclose(found.users.detach(), users, atol=1e-6)
        np.testing.assert_allclose(found.items.detach(), joined_by_hand(model.explorations[name], items),
                                   atol=1e-6)


@pytest.mark.parametrize("negatives", [1, 2])
@pytest.mark.parametrize("explored", [False, True])
def test_loss_by_hand(negatives, explored, built, content):
    model, batch, _ = built(train_neg_ratio=negatives, data_path=content(""),
                            **(EXPLORED if explored else {}))
    expected = 0.0
    for name, prefix in (("target", ""), ("source", "source_")):
        users, items = (part.detach().numpy() for part in model.scoring_vectors()[name][:2])
        table = model.tables[name].weight.detach().numpy()
        terms, of_users, of_items = [], [], []
        for user, item, sampled in zip(
                batch[prefix + "user_id"].tolist(), batch[prefix + "item_id"].tolist(),
                batch[prefix + "neg_item_id"].tolist(), strict=True):
            terms.append(np.log1p(np.exp(-users[user] @ items[item])))
            terms += [np.log1p(np.exp(users[user] @ items[other])) for other in sampled]
            of_users.append((table[user]**2).sum())
            of_items += [(table[len(users) + one]**2).sum() for one in [item, *sampled]]
        expected += np.mean(terms) + 0.3 * (np.mean(of_users) + np.mean(of_items))
    assert model.ranking_loss(batch).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("layers", ["concat", "mean"])
@pytest.mark.parametrize("explored", [False, True])
def test_gradient_against_finite_differences(layers, explored, built, content):
    model, batch, _ = built(layers=layers, data_path=content(""), **(EXPLORED if explored else {}))
    model.ranking_loss(batch).backward()
    for name, prefix in (("target", ""), ("source", "source_")):
        weight = model.tables[name].weight
        nodes = [int(batch[prefix + "user_id"][0]), int(batch[prefix + "user_id"][4]),
                 model.sizes[name][0] + int(batch[prefix + "neg_item_id"][0, 0])]
        for place in ((node, column) for node in nodes for column in (0, 3)):
            with torch.no_grad():
                expected = slope(lambda: model.ranking_loss(batch).item(), weight, place, step=1e-6)
            assert weight.grad[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)
    for parameter in model.explorations.parameters():
        place = (0, 1)
        with torch.no_grad():
            expected = slope(lambda: model.ranking_loss(batch).item(), parameter, place, step=1e-6)
        assert expected and parameter.grad[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_nothing_untrained_speaks_for_a_cold_user(built):
    model, _, train = built()
    model.eval()
    cold = torch.unique(train.source.inter_feat["user_id"])
    cold = cold[(cold <= train.num_overlap) & ~torch.isin(cold, train.users_with_rows())]
    assert len(cold) > 3
    before = model.user_factors(cold).clone()
    with torch.no_grad():
        model.tables["target"].weight[cold] += 5.0
    model.train().eval()
    assert torch.equal(model.user_factors(cold), before)
    with torch.no_grad():
        model.tables["source"].weight[cold] += 5.0
    model.train().eval()
    assert not torch.equal(model.user_factors(cold), before)


def test_one_propagation_for_a_whole_evaluation(built, monkeypatch):
    model = built()[0]
    count, real = [], model.scoring_vectors
    monkeypatch.setattr(model, "scoring_vectors", lambda: count.append(1) or real())
    model.eval()
    users = Interaction({"user_id": torch.arange(1, 5)})
    first = model.full_sort_predict(users)
    model.full_sort_predict(users)
    model.predict(Interaction({"user_id": torch.tensor([1]), "item_id": torch.tensor([1])}))
    model.vectors_of("source")
    assert len(count) == 1
    state = {name: value.clone() + 0.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert not torch.equal(model.full_sort_predict(users), first)
    assert len(count) == 2
    model.train()
    model.eval()
    model.full_sort_predict(users)
    assert len(count) == 3
    assert model.float().full_sort_predict(users).dtype == torch.float32


def test_the_state_holds_tables_only(built):
    assert set(built()[0].state_dict()) == {"tables.target.weight", "tables.source.weight"}


def test_both_domains_are_evaluated(tiny_config, tmp_path):
    """The source by what the graph and transfer say of its users and items."""
    made = run_keys(tiny_config("BiTGCF", **KEYS, epochs=1, split_protocol="ratio",
                                eval_passes=["ranking_full"]), tmp_path / "run")
    assert set(made.metrics["test"]) == {"ranking_full", "source_ranking_full"}
    model = made.model.eval()
    expected = vectors_by_hand(model, made.parts.train, True, "concat")
    for name in ("target", "source"):
        found = model.vectors_of(name)
        for mine, theirs in zip(found[:2], expected[name], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_it_needs_negatives(built):
    with pytest.raises(ConfigError, match="train_neg_ratio: is 0"):
        built(train_neg_ratio=0)
