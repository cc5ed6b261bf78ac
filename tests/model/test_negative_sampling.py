"""The key ``negative_sampler``: every sampler through ``draw``, against loops and laws."""

from collections import Counter, namedtuple
from itertools import combinations
from math import ceil

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from running import run_keys
from scipy.stats import chisquare

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.diffusion import fold_in, keyed_uniform
from recbole_mmdiff.errors import ConfigError, DataError
from recbole_mmdiff.model.negative_sampling import (
    SAMPLERS,
    Curriculum,
    NegativeSampling,
    Rows,
)
from recbole_mmdiff.model.representations import Representations, mean_of_layers

SEED, EPOCH = 31, 2
#: those whose draw of a sample depends on nothing else; ``curricular`` candidates belong to a batch
SAMPLE_BY_SAMPLE = [name for name in SAMPLERS if name != "curricular"]
Toy = namedtuple("Toy", "train known tables")


@pytest.fixture(scope="module")
def toy(ranking_config, toy_domain):
    """The training part of the toy domain, each user's items, and vectors of everybody in three layers."""
    train = prepare_parts(Config(config_dict=ranking_config("BPR", data_path=toy_domain))).train
    known = {user: set() for user in range(train.user_num)}
    for user, item in zip(*rows_of(train), strict=True):
        known[user].add(item)
    draw = torch.Generator().manual_seed(3)
    layers = [torch.randn(train.user_num + train.item_num, 4, generator=draw) for _ in range(3)]
    return Toy(train, known, mean_of_layers(layers, train.user_num))


@pytest.fixture(scope="module")
def make(ranking_config, toy, toy_domain):
    """``make(sampler, **keys)``: the sampler on the toy domain."""

    def build(sampler, **keys):
        keys = {"num_negatives": 3, "negative_candidates": 5, "negative_sampler": sampler, **keys}
        config = Config(config_dict=ranking_config("BPR", data_path=toy_domain, **keys))
        return NegativeSampling(config, toy.train)

    return build


def rows_of(part):
    return part.inter_feat["user_id"].tolist(), part.inter_feat["item_id"].tolist()


def batch_of(part, samples):
    """The rows with these numbers; a number past the end is a row that comes again."""
    rows = torch.as_tensor(samples)
    users, items = (part.inter_feat[field][rows % len(part)] for field in ("user_id", "item_id"))
    return Interaction({"user_id": users, "item_id": items, "sample_id": rows})


def candidates_by_hand(toy, users, samples, count, epoch=EPOCH):
    """(b, count): uniform unknown items, by listing each user's."""
    uniforms = keyed_uniform(samples, count, fold_in(SEED, epoch, 1, 0), torch.float64).numpy()
    drawn = np.zeros((len(users), count), dtype=int)
    for row, user in enumerate(users.tolist()):
        unknown = [item for item in range(1, toy.train.item_num) if item not in toy.known[user]]
        drawn[row] = [unknown[int(uniform * len(unknown))] for uniform in uniforms[row]]
    return drawn


# ---- all of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_never_padding_nor_a_known_item(make, toy, sampler, count):
    sampling = make(sampler, num_negatives=count)
    batch = batch_of(toy.train, range(500))
    for epoch in (0, 12, 40):
        found = sampling.draw(batch, toy.tables, SEED, epoch)
        assert found.items.shape == (500, count) and found.items.dtype == torch.int64
        assert (found.items > 0).all() and (found.items < toy.train.item_num).all()
        for user, row in zip(batch["user_id"].tolist(), found.items.tolist(), strict=True):
            assert not toy.known[user] & set(row)
        if found.vectors is not None:
            assert found.vectors.shape == (500, count, 4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_draw_depends_on_seed_epoch_and_sample(make, toy, sampler):
    batch = batch_of(toy.train, range(100))

    def draw(seed=SEED, epoch=EPOCH, rows=batch):
        torch.rand(5)
        found = make(sampler).draw(rows, toy.tables, seed, epoch)
        return found.items if found.vectors is None else found.vectors

    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), draw(seed=SEED + 1))
    assert not torch.equal(draw(), draw(epoch=EPOCH + 1))
    again = Interaction({**batch.interaction, "sample_id": batch["sample_id"] + 1000})
    assert not torch.equal(draw(), draw(rows=again))


@pytest.mark.parametrize("sampler", SAMPLE_BY_SAMPLE)
def test_a_draw_is_the_same_in_any_batch(make, toy, sampler):
    sampling = make(sampler)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    whole = sampling.draw(batch_of(toy.train, range(60)), toy.tables, SEED, EPOCH)
    for part in order.split(7):
        found = sampling.draw(batch_of(toy.train, part), toy.tables, SEED, EPOCH)
        assert torch.equal(found.items, whole.items[part])
        if found.vectors is not None:
            torch.testing.assert_close(found.vectors, whole.vectors[part])


def test_what_needs_the_models_vectors(make, toy):
    for sampler in SAMPLERS:
        sampling = make(sampler)
        assert sampling.needs_vectors == (sampler not in ("uniform", "popularity"))
        if not sampling.needs_vectors:
            assert sampling.draw(batch_of(toy.train, range(4)), None, SEED, 0).vectors is None


def test_no_sampler_is_uniform(make, toy):
    batch = batch_of(toy.train, range(50))
    drawn = [make(name).draw(batch, toy.tables, SEED, EPOCH).items for name in (None, "uniform")]
    assert torch.equal(*drawn)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_on_cuda(make, toy, sampler):
    batch, tables = batch_of(toy.train, range(200)), toy.tables
    layers = tuple(layer.cuda() for layer in tables.layers)
    here = make(sampler).draw(batch, tables, SEED, EPOCH)
    there = Representations(tables.users.cuda(), tables.items.cuda(), layers)
    found = make(sampler).draw(batch.to("cuda"), there, SEED, EPOCH)
    assert found.items.is_cuda
    assert (here.items == found.items.cpu()).float().mean() > 0.98


# ---- uniform and popularity ------------------------------------------------------------------------


def chi_square(drawn, weights):
    """p-value of draws (n,) of items against the law ``weights``: item -> mass."""
    counts = Counter(drawn.tolist())
    assert set(counts) <= {item for item, mass in weights.items() if mass}
    total = sum(weights.values())
    items = [item for item, mass in weights.items() if mass]
    return chisquare([counts[item] for item in items],
                     [len(drawn) * weights[item] / total for item in items]).pvalue


def draws_of_users(sampling, toy, rounds=3000):
    """user -> their negatives over all columns."""
    batch = batch_of(toy.train, range(rounds))
    found = sampling.draw(batch, toy.tables, SEED, EPOCH).items
    return {user: found[batch["user_id"] == user].flatten() for user in set(batch["user_id"].tolist())}


def test_uniform_by_hand(make, toy):
    batch = batch_of(toy.train, range(200))
    found = make("uniform").draw(batch, None, SEED, EPOCH).items
    np.testing.assert_array_equal(found, candidates_by_hand(toy, batch["user_id"], batch["sample_id"], 3))


def test_law_of_uniform(make, toy):
    for user, drawn in draws_of_users(make("uniform"), toy).items():
        unknown = set(range(1, toy.train.item_num)) - toy.known[user]
        assert chi_square(drawn, dict.fromkeys(unknown, 1)) > 1e-4


@pytest.mark.parametrize("exponent", [0.75, 2.0, 0.0])
def test_law_of_popularity(make, toy, exponent):
    """In proportion to the training rows to a power, among the user's unknown items with a row."""
    counts = Counter(rows_of(toy.train)[1])
    for user, drawn in draws_of_users(make("popularity", popularity_exponent=exponent), toy).items():
        law = {item: count**exponent for item, count in counts.items() if item not in toy.known[user]}
        assert chi_square(drawn, law) > 1e-4


# ---- by the model's vectors ------------------------------------------------------------------------


def dots(left, right):
    return float(np.dot(np.asarray(left, dtype=float), np.asarray(right, dtype=float)))


def test_dns_takes_the_highest_score(make, toy):
    batch = batch_of(toy.train, range(80))
    found = make("dns").draw(batch, toy.tables, SEED, EPOCH).items
    candidates = candidates_by_hand(toy, batch["user_id"], batch["sample_id"], 15).reshape(80, 3, 5)
    for row, user in enumerate(batch["user_id"].tolist()):
        for column in range(3):
            expected = max(candidates[row, column],
                           key=lambda item: dots(toy.tables.users[user], toy.tables.items[item]))
            assert found[row, column] == expected


@pytest.mark.parametrize("in_layers", [True, False])
def test_mixgcf_mixes_vectors(make, toy, in_layers):
    """In each layer the mixture with the largest product with the user, then their mean."""
    tables = toy.tables if in_layers else toy.tables._replace(layers=())
    layers = tables.layers if in_layers else (tables.items,)
    batch = batch_of(toy.train, range(40))
    found = make("mixgcf").draw(batch, tables, SEED, EPOCH)
    candidates = candidates_by_hand(toy, batch["user_id"], batch["sample_id"], 15).reshape(40, 3, 5)
    alphas = keyed_uniform(batch["sample_id"], 3 * len(layers), fold_in(SEED, EPOCH, 1, 1), torch.float64)
    alphas = alphas.view(40, 3, len(layers)).numpy()
    np.testing.assert_array_equal(found.items, candidates[:, :, 0])
    for row, (user, positive) in enumerate(zip(batch["user_id"], batch["item_id"], strict=True)):
        for column in range(3):
            pooled = []
            for number, layer in enumerate(layers):
                alpha = alphas[row, column, number]
                mixed = [alpha * layer[positive].double() + (1 - alpha) * layer[item].double()
                         for item in candidates[row, column]]
                pooled.append(max(mixed, key=lambda vector: dots(tables.users[user], vector)))
            torch.testing.assert_close(found.vectors[row, column].double(), sum(pooled) / len(pooled),
                                       rtol=1e-5, atol=1e-5)


def test_gradients_of_mixed_vectors_flow(make, toy):
    """Into the layers of positives and candidates, and by the loss into users."""
    layers = [layer.clone().requires_grad_() for layer in toy.tables.layers]
    users = toy.tables.users.clone().requires_grad_()
    batch = batch_of(toy.train, range(30))
    with torch.no_grad():
        still = make("mixgcf").draw(batch, toy.tables, SEED, EPOCH).vectors
    found = make("mixgcf").draw(batch, Representations(users, sum(layers) / 3, tuple(layers)), SEED, EPOCH)
    assert torch.equal(found.vectors, still)
    (users[batch["user_id"]][:, None] * found.vectors).sum().backward()
    touched = set(batch["item_id"].tolist())
    for layer in layers:
        moved = set(layer.grad.any(1).nonzero().flatten().tolist())
        assert touched < moved, "positives and some candidates"
        assert 0 not in moved
    assert set(users.grad.any(1).nonzero().flatten().tolist()) == set(batch["user_id"].tolist())


def test_realhns_leaves_out_what_resembles_the_positive(make, toy):
    """Of 8 candidates the 2 most similar go; one of the 3 hardest others is drawn."""
    sampling = make("realhns", negative_candidates=8, filtered_share=0.25, real_hard_share=0.5,
                    num_negatives=2)
    batch = batch_of(toy.train, range(60))
    found = sampling.draw(batch, toy.tables, SEED, EPOCH).items
    candidates = candidates_by_hand(toy, batch["user_id"], batch["sample_id"], 16).reshape(60, 2, 8)
    uniforms = keyed_uniform(batch["sample_id"], 2, fold_in(SEED, EPOCH, 1, 1), torch.float64)
    items = toy.tables.items / toy.tables.items.norm(dim=1, keepdim=True)
    for row, (user, positive) in enumerate(zip(batch["user_id"], batch["item_id"], strict=True)):
        for column in range(2):
            drawn = candidates[row, column]
            unlike = sorted(range(8), key=lambda place: dots(items[positive], items[drawn[place]]))[:6]
            hard = sorted(sorted(unlike), key=lambda place: -dots(toy.tables.users[user],
                                                                  toy.tables.items[drawn[place]]))[:3]
            assert found[row, column] == drawn[hard[int(uniforms[row, column] * 3)]]


# ---- curricular ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "end"), [(5, 30), (1, 2), (3, 75), (10, 9)])
def test_the_pool_of_an_epoch(interval, end):
    """t = (T / 4)(3 - min(3, floor(n / interval))) steps are left of T = 20, the last pool has t = 0."""
    curriculum, steps = Curriculum(interval, end), 20
    for epoch in range(2 * end + 5):
        left = steps / 4 * (3 - min(3, epoch // interval))
        expected = Curriculum.FINAL if epoch > end else {15: 0, 10: 1, 5: 2, 0: 3}[left]
        assert curriculum.pool(epoch) == expected
    assert Curriculum.HARDEST == 3 and Curriculum.FINAL == 4


@pytest.mark.parametrize("count", [2, 3])
def test_the_first_of_several_stays_uniform(make, toy, count):
    batch = batch_of(toy.train, range(90))
    keys = {"num_negatives": count, "candidate_share": 0.9}
    found = make("curricular", **keys).draw(batch, toy.tables, SEED, 40).items
    uniform = candidates_by_hand(toy, batch["user_id"], batch["sample_id"], 1, epoch=40)
    np.testing.assert_array_equal(found[:, :1], uniform)
    assert (found[:, 1] != found[:, 0]).float().mean() > 0.5


def test_curricular_takes_what_is_most_similar(make, toy):
    """All items are candidates, and the pool is the model's own: one of the ceil(share * n) that have the
    largest product with the positive."""
    sampling = make("curricular", num_negatives=1, candidate_share=1.0, hard_share=0.3)
    items, batch = toy.tables.items, batch_of(toy.train, range(400))
    found = sampling.draw(batch, toy.tables, SEED, 40).items[:, 0]
    taken = {}
    for user, positive, drawn in zip(batch["user_id"].tolist(), batch["item_id"].tolist(), found.tolist(),
                                     strict=True):
        left = sorted(set(range(1, toy.train.item_num)) - toy.known[user],
                      key=lambda item: -dots(items[positive], items[item]))
        hardest = left[:ceil(0.3 * len(left) - 1e-9)]
        assert drawn in hardest
        taken.setdefault((user, positive), (hardest, set()))[1].add(drawn)
    assert sum(set(hardest) == seen for hardest, seen in taken.values()) > len(taken) / 2


def test_early_pools_are_noisier(make, toy):
    """Three, two, one and no standard deviations: the resemblance to the positive grows."""
    sampling = make("curricular", num_negatives=1, candidate_share=1.0, hard_share=0.01,
                    curriculum_interval=5, curriculum_end=30)
    batch, items = batch_of(toy.train, range(600)), toy.tables.items

    def resemblance(epoch):
        found = sampling.draw(batch, toy.tables, SEED, epoch).items[:, 0]
        return float((items[batch["item_id"]] * items[found]).sum(-1).mean())

    stages = [np.mean([resemblance(epoch) for epoch in range(start, start + 5)]) for start in (0, 5, 10, 15)]
    assert stages == sorted(stages)
    assert resemblance(15) == resemblance(31) == stages[-1] > stages[0]


def test_candidates_belong_to_the_batch(make, toy):
    """A tenth of twelve items are two, the same for all rows of a batch and others in the next. A user
    who knows both gets any unknown item."""
    sampling = make("curricular", num_negatives=1, hard_share=1.0)
    chosen = []
    for start in range(0, 400, 50):
        batch = batch_of(toy.train, range(start, start + 50))
        drawn = sampling.draw(batch, toy.tables, SEED, 40).items[:, 0].tolist()
        rows = list(zip(batch["user_id"].tolist(), drawn, strict=True))
        fits = [pair for pair in combinations(range(1, toy.train.item_num), 2)
                if all(item in pair or set(pair) <= toy.known[user] for user, item in rows)]
        assert len(fits) == 1
        chosen += fits
    assert len(set(chosen)) > 3


# ---- data and keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_held_out_items_are_no_negatives_under_cold_start_items(tiny_config, sampler):
    keys = {"split_protocol": "cold_start_items", "test_item_ratio": 0.5, "negative_sampler": sampler,
            "num_negatives": 2, "candidate_share": 0.5}
    config = Config(config_dict=tiny_config("BPR", **keys))
    train = prepare_parts(config).train
    sampling, batch = NegativeSampling(config, train), batch_of(train, range(len(train)))
    draw = torch.Generator().manual_seed(3)
    tables = Representations(torch.randn(train.user_num, 4, generator=draw),
                             torch.randn(train.item_num, 4, generator=draw))
    known = set(zip(*rows_of(train), strict=True))
    drawn = sampling.draw(batch, tables, SEED, 40).items
    assert set(drawn.unique().tolist()) <= set(rows_of(train)[1])
    assert drawn.unique().numel() < train.item_num - 10
    assert not {(user, item) for user, row in zip(batch["user_id"].tolist(), drawn.tolist(), strict=True)
                for item in row} & known


@pytest.mark.parametrize(("keys", "message"), [
    ({"negative_sampler": "mixgf"}, r"negative_sampler: 'mixgf' is not known.*did you mean 'mixgcf'"),
    ({"num_negatives": 0}, "num_negatives: 0 is too small, use 1 or more"),
    ({"negative_candidates": 0}, "negative_candidates: 0 is too small"),
    ({"candidate_share": 0.0}, "candidate_share: 0.0 is too small"),
    ({"candidate_share": 1.1}, "candidate_share: 1.1 is no share"),
    ({"hard_share": 0.0}, "hard_share: 0.0 is too small"),
    ({"hard_share": 2.0}, "hard_share: 2.0 is no share"),
    ({"filtered_share": 1.0}, "filtered_share: 1.0 is no share; use .* not including, 1"),
    ({"filtered_share": -0.1}, "filtered_share: -0.1 is no share"),
    ({"curriculum_interval": 0}, "curriculum_interval: 0 is too small"),
], ids=str)
def test_values_that_are_refused(make, keys, message):
    with pytest.raises(ConfigError, match=message):
        make(keys.pop("negative_sampler", "curricular"), **keys)


def test_a_user_who_has_everything(ranking_config, atomic, tmp_path):
    rows = [("all", f"i{item}", "5", "1", "0") for item in range(4)]
    rows += [("one", f"i{item}", "5", "1", label) for item, label in enumerate("012")]
    atomic.write(tmp_path, "tgt", rows, [*atomic.header, "x_label:float"])
    config = Config(config_dict=ranking_config("BPR", data_path=tmp_path, negative_sampler="dns"))
    with pytest.raises(DataError, match=r"tgt: user 'all' has rated every item.*filter such users") as error:
        NegativeSampling(config, prepare_parts(config).train)
    assert "train_neg_ratio" not in str(error.value)


def test_samples_of_a_stage_tell_rows_apart(ranking_config, toy, toy_domain):
    """What a loader gives is what ``draw`` reads."""
    config = Config(config_dict=ranking_config("BPR", data_path=toy_domain))
    batch = next(iter(stage_loader(config, toy.train, "target", 5, 1)))
    assert Rows(batch["user_id"], batch["item_id"], batch["sample_id"], SEED, EPOCH).uniforms(0, 2).shape \
        == (5, 2)


# ---- a model with each -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_trains_a_model(ranking_config, sampler, count, tmp_path):
    keys = {"embedding_size": 8, "knn_k": 5, "epochs": 2, "learning_rate": 0.01, "negative_sampler": sampler,
            "num_negatives": count, "curriculum_interval": 1, "curriculum_end": 0}
    made = run_keys(ranking_config("FREEDOM", **keys), tmp_path / "run")
    # The negatives become harder: the loss need not fall.
    assert all(0 < loss < 0.8 for entry in made.metrics["history"] for loss in entry["loss"])
    assert all(torch.isfinite(value).all() for value in made.model.state_dict().values())
