"""CCDRec on its backbones: the contract, and its equations against loops."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from contract import RankingContract
from recbole.data.interaction import Interaction
from running import assert_same_weights, run_in_pieces, run_keys

from recbole_mmdiff.config import Config
from recbole_mmdiff.diffusion import fold_in, keyed_normal, keyed_uniform
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.freedom import FREEDOM
from recbole_mmdiff.model.negative_sampling import Rows
from recbole_mmdiff.model.pairwise import Projected, Triples
from recbole_mmdiff.model.registry import register_model
from recbole_mmdiff.negatives import candidate_items, curricular_negatives
from recbole_mmdiff.quick_start import build_model, prepare_data

SMALL = {"embedding_size": 8, "knn_k": 5, "num_steps": 6, "curriculum_interval": 1}
LONG = {"epochs": 40, "learning_rate": 0.02, "embedding_size": 16, "curriculum_interval": 5}


class TestCCDRec(RankingContract):
    model = "CCDRec"
    keys = SMALL
    accurate_keys = LONG
    least_ndcg_ratio = 3.0


class TestCCDRecAsTheirCode(RankingContract):
    model = "CCDRec"
    keys = {**SMALL, "reference": "code", "modalities": ["text"], "train_features": True}
    accurate_keys = LONG
    least_ndcg_ratio = 2.5


@pytest.mark.parametrize(("backbone", "keys"), [
    ("LATTICE", {}), ("LATTICE", {"reference": "code"}), ("MCDRec", {}),
    ("FREEDOM", {"mirror_interval": 2})], ids=str)
def test_on_other_backbones(ranking_config, tmp_path, monkeypatch, backbone, keys):
    """A run that is resumed after each epoch is the run, and it learns."""
    keys = {**SMALL, **LONG, "epochs": 4, "backbone": backbone, **keys}
    if backbone == "MCDRec":
        keys.pop("knn_k")       # It has no item graph.
    keys = ranking_config("CCDRec", **keys)
    whole = run_keys(keys, tmp_path / "whole")
    resumed = run_in_pieces(keys, tmp_path / "pieces", 4, monkeypatch)
    assert_same_weights(whole.model, resumed.model)
    losses = [entry["loss"][0] for entry in whole.metrics["history"]]
    assert losses[-1] < losses[0]


@pytest.fixture
def built(ranking_config):
    """``built(**keys)``: a model ready for the batches of epoch 0, and the training part."""

    def build(**keys):
        config = Config(config_dict=ranking_config("CCDRec", **{**SMALL, **keys}))
        parts = prepare_data(config)
        model = build_model(config, parts).double()
        model.seed, model.epoch = 77, 0
        model.train()
        model.before_epoch(0)
        return model, parts.train

    return build


def batch_of(train, count=24):
    """The first rows, in another order."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(2))[:count]
    rows = {name: train.inter_feat[name][order] for name in (train.uid_field, train.iid_field)}
    return Interaction({**rows, "sample_id": order})


def projected(model, items):
    return Projected(items, model.backbone.features.project(items))


def estimate(model, items, noised, time):
    """f, one item at a time."""
    features = model.backbone.features
    with torch.no_grad():
        return torch.cat([model.estimator(noised[place, None], torch.tensor([float(time[place])]).double(),
                                          features.project(item[None]), features.present[item[None]])
                          for place, item in enumerate(items)])


# ---- learning ------------------------------------------------------------------------------------


def test_diffusion_loss_by_hand(built):
    """Eqs. 1 and 5: every item at its own step, betas not rescaled."""
    model, _ = built()
    items, seed = torch.tensor([3, 9, 20, 41]), 5
    predicted, loss = model.denoised(projected(model, items), seed)
    betas = np.linspace(1e-4, 0.02, 6)
    bars = np.cumprod(1 - betas)
    uniform = keyed_uniform(items, 1, fold_in(seed, 0), torch.float64)[:, 0].numpy()
    steps = 1 + np.floor(6 * uniform).astype(int)
    noise = keyed_normal(items, 8, fold_in(seed, 1), torch.float64).numpy()
    table = model.backbone.item_embedding.weight.detach().numpy()
    noised = np.stack([math.sqrt(bars[step - 1]) * table[item] + math.sqrt(1 - bars[step - 1]) * noise[row]
                       for row, (item, step) in enumerate(zip(items, steps, strict=True))])
    by_hand = estimate(model, items, torch.tensor(noised), steps - 1).numpy()
    np.testing.assert_allclose(predicted.detach().numpy(), by_hand, rtol=1e-8)
    assert loss.item() == pytest.approx(np.mean((by_hand - table[items])**2))


@pytest.mark.parametrize("reference", ["paper", "code"])
def test_fusion_by_hand(built, reference):
    """e^f = (1 - mu) h hat + mu f takes the place of h hat; in the code's form also in the graph."""
    model, _ = built(reference=reference, diffused_weight=0.3)
    model.eval()
    items = torch.tensor([2, 7, 30])
    predicted = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).double()
    found = model.joined(items, predicted)
    backbone = model.backbone
    fused = backbone.higher_items().detach().clone()
    for item, vector in zip(items, predicted, strict=True):
        fused[item] = 0.7 * fused[item] + 0.3 * vector
    layer = torch.cat([backbone.user_embedding.weight,
                       fused if reference == "code" else backbone.item_embedding.weight]).detach()
    adjacency, mean = backbone.adjacency.to_dense(), layer / 3
    for _ in range(2):
        layer = adjacency @ layer
        mean = mean + layer / 3
    torch.testing.assert_close(found.users, mean[:model.n_users])
    torch.testing.assert_close(found.items, mean[model.n_users:] + fused)


def softplus_margins(tables, users, positives, negatives):
    margins = (tables.users[users] * (tables.items[positives] - tables.items[negatives])).sum(1)
    return torch.log1p(torch.exp(-margins)).mean()


@pytest.mark.parametrize("schedule", ["curriculum", "none"])
def test_loss_is_the_weighted_sum(built, schedule):
    """Eqs. 8 and 9, with FREEDOM's loss of the features of the random negatives."""
    model, train = built(pool_schedule=schedule, diffusion_weight=2.0, curricular_weight=0.7, reg_weight=0.1,
                         dropout=0.0)
    batch = batch_of(train)
    users, positives = batch["user_id"], batch["item_id"]
    loss = model.ranking_loss(batch)
    easy = model.negatives.draw(batch, None, 77, 0).items[:, 0]
    uniforms = keyed_uniform(batch["sample_id"], 1, fold_in(77, 0, 1, 4), torch.float64)
    hard = model.negatives.unknown.draw(users, uniforms)[:, 0]    # Nothing is inferred in epoch 0.
    drawn = [positives, easy] + ([hard] if schedule == "curriculum" else [])
    items = torch.unique(torch.cat(drawn))
    predicted, diffusion = model.denoised(projected(model, items),
                                          fold_in(77, 0, 10, int(batch["sample_id"][0])))
    tables = model.joined(items, predicted)
    ranking = softplus_margins(tables, users, positives, easy)
    if schedule == "curriculum":
        ranking = 0.3 * ranking + 0.7 * softplus_margins(tables, users, positives, hard)
    features = sum(
        softplus_margins(tables._replace(items=model.backbone.features.project_all()[:, number]),
                         users, positives, easy) for number in range(2))
    torch.testing.assert_close(loss, ranking + 2.0 * diffusion + 0.1 * features)


def test_gradients_reach_every_part(built):
    model, train = built()
    model.ranking_loss(batch_of(train)).backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not without


# ---- inference and pools ---------------------------------------------------------------------------


def test_pools_by_hand(built):
    """Every reverse step by Ho et al.'s Eqs. 6 and 7, for some items alone."""
    model, _ = built(num_steps=6)
    model.infer(4)
    items, table = torch.tensor([1, 17, 40]), model.backbone.item_embedding.weight.detach()
    betas = np.linspace(1e-4, 0.02, 6)
    bars = np.concatenate([[1.0], np.cumprod(1 - betas)])
    seed = fold_in(77, 4, 11)

    def noise(number):
        return keyed_normal(items, 8, fold_in(seed, number), torch.float64)

    x, states = math.sqrt(bars[6]) * table[items] + math.sqrt(1 - bars[6]) * noise(-1), []
    for done, step in enumerate(range(6, 0, -1)):
        x0 = estimate(model, items, x, [step - 1] * 3)
        scale = 1 - bars[step]
        mean = math.sqrt(bars[step - 1]) * betas[step - 1] / scale * x0 \
            + math.sqrt(1 - betas[step - 1]) * (1 - bars[step - 1]) / scale * x
        x = mean + math.sqrt(betas[step - 1] * (1 - bars[step - 1]) / scale) * noise(done)
        states.append(x)
    for number, done in enumerate((2, 3, 5, 6)):    # ceil(j T / 4)
        torch.testing.assert_close(model.pools[number][items], states[done - 1])
    assert torch.equal(model.aligned, model.pools[3])
    model.eval()
    torch.testing.assert_close(model.pools[4], model.representations().items)


@pytest.mark.parametrize(("reference", "numbers"), [("paper", [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4]),
                                                    ("code", [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 4, 4])])
def test_curriculum_of_pools(built, reference, numbers):
    """Eq. 7 with three epochs a pool and tau_end = 10."""
    model, _ = built(reference=reference, curriculum_interval=3, curriculum_end=10)
    assert [model.curriculum.pool(epoch) for epoch in range(13)] == numbers


def test_curriculum_of_a_trained_model(ranking_config, tmp_path):
    """Pool by pool, what is drawn resembles the positive more, and no known positive is drawn. Among the
    final representations two pools that follow each other may be as near."""
    made = run_keys(ranking_config("CCDRec", **{**SMALL, **LONG, "num_steps": 20}), tmp_path / "run")
    model, rows = made.model, made.parts.train.inter_feat
    model.infer(made.metrics["best_epoch"])
    users, positives = rows["user_id"], rows["item_id"]
    known = set(zip(users.tolist(), positives.tolist(), strict=True))
    in_pool, in_final = [], []
    for pool in model.pools:
        drawn = torch.cat([model.negatives.from_pool(pool, Rows(*part, 5, 1), 1)[:, 0] for part in zip(
            *(column.split(64) for column in (users, positives, torch.arange(len(users)))), strict=True)])
        for space, found in ((pool, in_pool), (model.pools[4], in_final)):
            found.append(torch.cosine_similarity(space[positives], space[drawn]).mean().item())
        assert not known & set(zip(users.tolist(), drawn.tolist(), strict=True))
        assert (drawn > 0).all()
    assert in_pool[:4] == sorted(in_pool[:4])
    assert in_final[0] == min(in_final)
    assert all(later > earlier - 0.05 for earlier, later in pairwise(in_final))


def test_scores_are_of_aligned_items(built):
    """Nothing is sampled anew in evaluation: the buffer is what counts, and is saved."""
    model, _ = built()
    model.infer(0)
    model.eval()
    before = model.item_factors(torch.arange(5))
    state = model.state_dict()
    assert torch.equal(state["aligned"], model.aligned)
    model.aligned += 1
    model.forget()
    torch.testing.assert_close(model.item_factors(torch.arange(5)), before + 0.5)


# ---- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "pool_of"), [
    ("curriculum", {1: 0, 3: 1, 5: 2, 6: 3, 8: 3, 9: 4}), ("last", dict.fromkeys((1, 3, 5, 9), 3))])
def test_the_loss_draws_from_the_epochs_pool(built, schedule, pool_of, monkeypatch):
    """Two epochs a pool and tau_end = 8; the pools are unlike each other, so that draws tell them apart."""
    model, train = built(pool_schedule=schedule, curriculum_interval=2, curriculum_end=8, candidate_share=1.0)
    draw = torch.Generator().manual_seed(3)
    model.pools = torch.randn(5, model.n_items, 8, generator=draw).double()
    batch, seen = batch_of(train, 60), []
    of_tables = Triples.vectors
    monkeypatch.setattr(Triples, "vectors", lambda self, tables: seen.append(self) or of_tables(self, tables))
    for epoch, number in pool_of.items():
        model.epoch = epoch
        model.ranking_loss(batch)
        candidates = candidate_items(model.n_items, 1.0, 0, torch.device("cpu"))
        expected = [curricular_negatives(
            pool, model.negatives.unknown.known, batch["user_id"], batch["item_id"], candidates, 0.1,
            keyed_uniform(batch["sample_id"], 1, fold_in(77, epoch, 1, 3), torch.float64))
            for pool in model.pools]
        drawn = seen.pop().negatives.items[:, 1:]
        assert [torch.equal(drawn, wanted) for wanted in expected] == [place == number for place in range(5)]


def test_no_pools(built):
    model, train = built(pool_schedule="none", num_negatives=2)
    model.infer(0)
    assert torch.isfinite(model.ranking_loss(batch_of(train)))


def test_a_backbone_of_ones_own(ranking_config, tmp_path):
    """Its keys are known, its defaults are those of the class that it extends, and it is registered."""

    @register_model
    class OwnBackbone(FREEDOM):
        def __init__(self, config, dataset):
            super().__init__(config, dataset)
            self.factor = config["own_factor"] or 1

        def higher_items(self):
            return self.factor * super().higher_items()

    made = run_keys(ranking_config("CCDRec", backbone="OwnBackbone", own_factor=3, num_layers=1, epochs=1),
                    tmp_path / "run")
    assert made.model.backbone.factor == 3
    assert (made.config["num_layers"], made.config["knn_k"]) == (1, 10)


def test_keys_of_the_backbone_hold(built):
    model, _ = built(backbone="FREEDOM", dropout=0.4, num_layers=1)
    assert (model.backbone.dropout, model.backbone.num_layers) == (0.4, 1)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("backbone", "BPR", r"backbone: 'BPR' cannot carry CCDRec, use one of \['FREEDOM'"),
    ("backbone", "FREEDON", "backbone: .*did you mean 'FREEDOM'"),
    ("backbone", None, "backbone: None is no name of a model.*FREEDOM"),
    ("reference", "authors", "reference: 'authors'.*paper"),
    ("pool_schedule", "first", "pool_schedule: 'first'"),
    ("diffused_weight", 1.5, "diffused_weight: 1.5 is no share"),
    ("curricular_weight", -0.1, "curricular_weight"),
    ("diffusion_weight", -1.0, "diffusion_weight: -1.0 is too small"),
    ("num_steps", 0, "num_steps"),
    ("beta_end", 1.5, "beta_end"),
    ("embedding_size", 7, "embedding_size.*even"),
    ("negative_sampler", "dns", "negative_sampler: 'dns'.*uniform or popularity"),
    ("curriculum_interval", 0, "curriculum_interval: 0 is too small"),
    ("hard_share", 2.0, "hard_share: 2.0 is no share"),
])
def test_bad_keys(built, key, value, message):
    with pytest.raises(ConfigError, match=message):
        built(**{key: value})
