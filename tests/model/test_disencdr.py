"""DisenCDR: the contract, its encoders and loss by slow loops, and both domains' scores."""

import numpy as np
import pytest
import torch
from contract import ModelContract
from exploration_by_hand import EXPLORED, joined_by_hand
from recbole.data.interaction import Interaction
from running import positive_pairs, run_keys

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.diffusion import fold_in, keyed_normal
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model import disencdr
from recbole_mmdiff.model.disencdr import DisenCDR, Normal


class TestDisenCDR(ModelContract):
    """Variational graphs of two domains."""

    model = "DisenCDR"
    keys = {"embedding_size": 8, "train_batch_size": 512}
    accurate_keys = {"embedding_size": 16, "epochs": 40, "learning_rate": 0.01, "train_batch_size": 256,
                     "eval_step": 0}


class TestDisenCDRWithItemExploration(TestDisenCDR):
    """Items of two modalities, many without an image."""

    featured = True

    @pytest.fixture(scope="class", autouse=True)
    def features(self, content):
        type(self).keys = {**TestDisenCDR.keys, **EXPLORED, "data_path": content("few")}


@pytest.fixture(scope="module")
def built(tiny_config):
    """``built(**keys)``: a model with drawn weights in float64, a batch of both domains, and the data."""

    def build(**keys):
        config = Config(config_dict=tiny_config("DisenCDR", **{
            "embedding_size": 3, "overlap_ratio": 0.5, "divergence_weight": 0.7, "shared_weight": 0.4,
            "train_neg_ratio": 2, **keys}))
        train = prepare_parts(config).train
        torch.manual_seed(3)
        model = DisenCDR(config, train).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.6)
        model.seed, model.epoch = 5, 1
        return model, next(iter(stage_loader(config, train, "both", 9, seed=5))), train

    return build


@pytest.fixture(scope="module")
def exploring(content):
    """``exploring(missing)``: the keys of item exploration where some features are missing; of None none."""
    return lambda missing: {} if missing is None else {**EXPLORED, "data_path": content(missing)}


def leaky(values):
    return np.where(values > 0, values, 0.01 * values)


def mean_of(rows, vectors, count):
    """For each of ``count`` nodes the mean of the ``vectors`` of those it has a row with."""
    found = np.zeros((count, vectors.shape[1]))
    for node in range(count):
        near = [other for one, other in rows if one == node]
        if near:
            found[node] = sum(vectors[other] for other in near) / len(near)
    return found


def head_by_hand(weights, name, told, start):
    mean, deviation = (
        np.concatenate([leaky(told @ weights[f"{name}.told.{k}.weight"].T), start], 1)
        @ weights[f"{name}.joined.{k}.weight"].T + weights[f"{name}.joined.{k}.bias"] for k in range(2))
    return mean, np.log1p(np.exp(deviation)) + 1e-4


def parts_by_hand(model, train):
    """name -> (users, items) of the domains, and the three shared parts, as (mean, deviation)."""
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    found, told_of, start_of, counts = {}, {}, {}, {}
    for name, domain in (("target", train), ("source", train.source)):
        rows, prefix = set(positive_pairs(domain)), f"domains.{name}"
        turned = {(item, user) for user, item in rows}
        counts[name] = np.bincount([user for user, _ in rows], minlength=domain.user_num)
        start = weights[f"{prefix}.user_embedding.weight"] * (counts[name] > 0)[:, None]
        by_items = leaky(mean_of(turned, start, domain.item_num) @ weights[f"{prefix}.user_layer.weight"].T)
        told = mean_of(rows, by_items, domain.user_num)
        items = weights[f"{prefix}.item_embedding.weight"]
        by_users = leaky(mean_of(rows, items, domain.user_num) @ weights[f"{prefix}.item_layer.weight"].T)
        told_items = mean_of(turned, by_users, domain.item_num)
        mean, deviation = head_by_hand(weights, f"{prefix}.item_head", told_items, items)
        if model.explorations:
            mean = joined_by_hand(model.explorations[name], mean)
        found[name] = head_by_hand(weights, f"{prefix}.user_head", told, start), (mean, deviation)
        told_of[name], start_of[name] = told, start
    linked = train.num_overlap + 1
    total = np.maximum(sum(part[:linked] for part in counts.values()), 1)
    share = {name: (part[:linked] / total)[:, None] for name, part in counts.items()}
    joined = [sum(share[name] * part[name][:linked] for name in share) for part in (told_of, start_of)]
    shared = [head_by_hand(weights, "shared", *joined)] + [
        head_by_hand(weights, "shared", told_of[name][:linked], start_of[name][:linked])
        for name in ("target", "source")]
    return found, shared


def divergence(mean, deviation, other_mean=0.0, other_deviation=1.0):
    return np.sum(np.log(other_deviation / deviation) - 0.5
                  + (deviation**2 + (mean - other_mean)**2) / (2 * other_deviation**2))


def noise(ids, seed):
    return keyed_normal(torch.as_tensor(ids), 3, seed, torch.float64).numpy()


def loss_by_hand(model, batch, train):
    found, shared = parts_by_hand(model, train)
    seed = fold_in(5, 1, int(batch["sample_id"][0]))
    columns = {"target": "", "source": "source_"}
    users = {name: batch[f"{prefix}user_id"].tolist() for name, prefix in columns.items()}
    linked = sorted({user for part in users.values() for user in part if user <= train.num_overlap})
    drawn = dict(zip(linked, shared[0][0][linked] + shared[0][1][linked]
                     * noise(linked, fold_in(seed, disencdr._SHARED)), strict=True))
    total = 0.0
    for number, (name, prefix) in enumerate(columns.items()):
        items = [[positive, *negatives] for positive, negatives in zip(
            batch[f"{prefix}item_id"].tolist(), batch[f"{prefix}neg_item_id"].tolist(), strict=True)]
        samples = []
        drawn_for = users[name], [one for row in items for one in row]
        for (mean, deviation), ids, purpose in zip(found[name], drawn_for,
                                                   (disencdr._USERS, disencdr._ITEMS), strict=True):
            distinct = sorted(set(ids))
            numbers = noise(distinct, fold_in(fold_in(seed, number), purpose))
            samples.append({one: mean[one] + deviation[one] * row
                            for one, row in zip(distinct, numbers, strict=True)})
            total += 0.7 * np.mean([divergence(mean[one], deviation[one]) for one in distinct]) / 3
        losses = []
        for user, row in zip(users[name], items, strict=True):
            vector = samples[0][user] + drawn.get(user, 0)
            for place, item in enumerate(row):
                score = vector @ samples[1][item]
                losses.append(np.log1p(np.exp(-score if place == 0 else score)))
        total += np.mean(losses)
    rows = [(shared[0][0][user], shared[0][1][user]) for user in linked]
    total += 0.7 * np.mean([divergence(*row) for row in rows]) / 3
    for part in shared[1:]:
        total += 0.4 * np.mean([divergence(*row, part[0][user], part[1][user])
                                for row, user in zip(rows, linked, strict=True)]) / 3
    return total


@pytest.mark.parametrize("missing", [None, "", "few"])
def test_loss_by_hand(built, exploring, missing):
    model, batch, train = built(**exploring(missing))
    assert model.ranking_loss(batch).item() == pytest.approx(loss_by_hand(model, batch, train), rel=1e-6)


@pytest.mark.parametrize("missing", [None, ""])
def test_everything_learns(built, exploring, missing):
    model, batch, _ = built(**exploring(missing))
    model.ranking_loss(batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("split", ["cold_start_users", "ratio"])
@pytest.mark.parametrize("missing", [None, "few"])
def test_scores_by_hand(built, exploring, split, missing):
    """By the means; a linked user's shared part counts in both domains."""
    model, _, train = built(split_protocol=split, **exploring(missing))
    found, shared = parts_by_hand(model, train)
    model.eval()
    for name in ("target", "source"):
        (users, _), (items, _) = found[name]
        users = users.copy()
        users[1:train.num_overlap + 1] += shared[0][0][1:]
        tables = model.vectors_of(name)
        np.testing.assert_allclose(tables.users.numpy(), users, atol=1e-6)
        np.testing.assert_allclose(tables.items.numpy(), items, atol=1e-6)
    everybody = Interaction({"user_id": torch.arange(train.user_num)})
    scores = model.full_sort_predict(everybody).view(train.user_num, -1)
    torch.testing.assert_close(scores, model.vectors_of("target").users @ model.vectors_of("target").items.T)


def test_divergence_of_normals():
    draw = torch.Generator().manual_seed(2)
    one, other = (Normal(torch.randn(4, 3, generator=draw), torch.rand(4, 3, generator=draw) + 0.3)
                  for _ in range(2))
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(*one),
                                                 torch.distributions.Normal(*other)).sum(-1)
    torch.testing.assert_close(one.divergence(other), expected)


def test_both_domains_are_evaluated(tiny_config, tmp_path):
    made = run_keys(tiny_config("DisenCDR", embedding_size=8, split_protocol="ratio",
                                eval_passes=["ranking_full"]), tmp_path / "run")
    assert set(made.metrics["test"]) == {"ranking_full", "source_ranking_full"}


@pytest.mark.parametrize(("key", "value", "message"), [
    ("embedding_size", 0, "embedding_size: 0 is too small"),
    ("shared_weight", -1.0, "shared_weight: -1.0 is too small"),
    ("train_neg_ratio", 0, "train_neg_ratio: is 0")])
def test_bad_keys(built, key, value, message):
    with pytest.raises(ConfigError, match=message):
        built(**{key: value})
