"""RecBole's pairwise models with our negative samplers."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.utils import InputType, ModelType
from running import assert_same_weights, run_in_pieces, run_keys, saved_metrics
from scipy.stats import chi2_contingency

from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.data.preparation import train_loader
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.negative_sampling import SAMPLERS
from recbole_mmdiff.model.sampled_pairwise import SampledPairwise

MODELS = ["BPR", "LightGCN"]
PAIR = ("user_id", "item_id")
TRIPLE = (*PAIR, "neg_item_id")
SHORT = {"embedding_size": 8, "learning_rate": 0.01, "num_negatives": 2, "epochs": 3, "reg_weight": 0.01}


@pytest.fixture(scope="module")
def short(ranking_config, tmp_path_factory):
    """``short(model, **keys)``: a short run on the domain of taste groups, made once."""
    made = {}

    def make(model, **keys):
        name = (model, *sorted(keys.items()))
        if name not in made:
            made[name] = run_keys(keys_of(ranking_config, model, **keys),
                                  tmp_path_factory.mktemp(model) / "run")
        return made[name]

    return make


def keys_of(ranking_config, model, **keys):
    known = {name: value for name, value in SHORT.items() if model == "LightGCN" or name != "reg_weight"}
    return ranking_config(model, **{**known, **keys})


@pytest.fixture
def built(build_toy):
    """``built(model, **keys)``: the model on the toy domain, its stage's loss, and its training part."""

    def build(model, **keys):
        keys = {"num_negatives": 3, "negative_sampler": "uniform", **keys}
        if model == "LightGCN":
            keys["reg_weight"] = 0.1
        made, train = build_toy(model, **keys)
        made.seed, made.epoch = 11, 1
        return made, SampledPairwise(train.config, made, train), train

    return build


# ---- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", MODELS)
def test_every_sampler_trains_and_resumes(short, ranking_config, model, sampler, tmp_path, monkeypatch):
    made = short(model, negative_sampler=sampler)
    history = made.metrics["history"]
    assert [entry["stage"] for entry in history] == ["training"] * 3
    assert all(np.isfinite(loss) for entry in history for loss in entry["loss"])
    scores = [entry["valid_score"] for entry in history]
    assert len(set(scores)) == 3, "an epoch is validated with the weights of another"
    keys = keys_of(ranking_config, model, negative_sampler=sampler)
    resumed = run_in_pieces(keys, tmp_path / "killed", 3, monkeypatch)
    assert_same_weights(resumed.model, made.model)
    assert saved_metrics(resumed.folder) == saved_metrics(made.folder)


@pytest.mark.parametrize("model", MODELS)
def test_uniform_learns_as_recboles_own_sampling(short, model):
    """Losses and scores after some epochs are alike, though not the same."""
    keys = {"epochs": 12, "num_negatives": 1, "eval_step": 12}
    ours, theirs = short(model, negative_sampler="uniform", **keys), short(model, **keys)
    (mean,), total = (made.metrics["history"][-1]["loss"] for made in (ours, theirs))
    batches = -(-len(ours.parts.train) // ours.config["train_batch_size"])     # RecBole adds up their losses.
    assert mean == pytest.approx(total / batches, rel=0.1)
    assert mean != total / batches
    found = [made.metrics["test"]["ranking_full"]["ndcg@10"] for made in (ours, theirs)]
    assert found[0] == pytest.approx(found[1], rel=0.25)


def columns(rows, *fields):
    """The rows of an Interaction as tuples of these fields."""
    return list(zip(*(rows[field].tolist() for field in fields), strict=True))


# ---- what the model is given -----------------------------------------------------------------------


def triples_of_epochs(sampled, train, epochs):
    """(user, positive, negative) that reach the model's own loss."""
    seen, model = [], sampled.model

    def note(interaction):
        seen.append(columns(interaction, *TRIPLE))
        return torch.zeros(1)

    model.calculate_loss = note
    loader = stage_loader(train.config, train, "target", 7, 5)
    for epoch in range(epochs):
        model.epoch = epoch
        loader.set_epoch(epoch)
        for batch in loader:
            sampled.loss(batch)
    return seen


def test_each_positive_comes_once_with_each_of_its_negatives(built):
    _, sampled, train = built("BPR")
    positives = columns(train.inter_feat, *PAIR)
    batches = triples_of_epochs(sampled, train, 1)
    assert [len(batch) for batch in batches[:-1]] == [21] * (len(batches) - 1)
    triples = [triple for batch in batches for triple in batch]
    assert Counter(triple[:2] for triple in triples) == Counter(positives * 3)
    assert not {(user, negative) for user, _, negative in triples} & set(positives)
    assert all(0 < negative < train.item_num for _, _, negative in triples)


def test_uniform_has_the_law_of_recboles_sampler(built):
    """Negatives of every user: counts of both in one table."""
    _, sampled, train = built("BPR", num_negatives=1)
    epochs = 400
    ours = [triple for batch in triples_of_epochs(sampled, train, epochs) for triple in batch]
    loader = train_loader(train.config, train)
    theirs = []
    for _ in range(epochs):
        for batch in loader:
            theirs += columns(batch, *TRIPLE)
    assert len(ours) == len(theirs)
    for user in {triple[0] for triple in ours}:
        counts = [Counter(negative for who, _, negative in part if who == user) for part in (ours, theirs)]
        items = sorted(counts[0] | counts[1])
        assert chi2_contingency([[count[item] for item in items] for count in counts]).pvalue > 1e-4


# ---- losses by hand --------------------------------------------------------------------------------


def batch_of(train):
    rows = {field: train.inter_feat[field][:9] for field in PAIR}
    return Interaction({**rows, "sample_id": torch.arange(9)})


def penalty_by_hand(model, triples):
    """RecBole's: lengths of the batch's start vectors, each kind as one vector, over the rows."""
    tables = [model.user_embedding.weight, model.item_embedding.weight, model.item_embedding.weight]
    total = 0.0
    for table, ids in zip(tables, zip(*triples, strict=True), strict=True):
        total += np.sqrt(sum(float(table[number].detach().double().square().sum()) for number in ids))
    return model.reg_weight * total / len(triples)


def vectors_by_hand(model, train):
    """Vectors of users and items, and the layers of items, in numpy."""
    users, items = (table.weight.detach().double().numpy()
                    for table in (model.user_embedding, model.item_embedding))
    if type(model).__name__ == "BPR":
        return users, items, [items]
    matrix = np.zeros((len(users) + len(items),) * 2)
    for user, item in columns(train.inter_feat, *PAIR):
        matrix[user, len(users) + item] = matrix[len(users) + item, user] = 1
    degrees = np.maximum(matrix.sum(1), 1e-7)
    matrix = matrix / np.sqrt(degrees[:, None] * degrees[None])
    layers = [np.concatenate([users, items])]
    for _ in range(model.n_layers):
        layers.append(matrix @ layers[-1])
    mean = sum(layers) / len(layers)
    return mean[:len(users)], mean[len(users):], [layer[len(users):] for layer in layers]


@pytest.mark.parametrize("sampler", ["uniform", "popularity", "dns", "realhns", "curricular"])
@pytest.mark.parametrize("model", MODELS)
def test_loss_of_several_negatives(built, model, sampler):
    made, sampled, train = built(model, negative_sampler=sampler)
    batch = batch_of(train)
    users, items, _ = vectors_by_hand(made, train)
    negatives = sampled.sampling.draw(batch, sampled._tables(), made.seed, made.epoch).items
    triples = [(*pair, negative) for pair, row
               in zip(columns(batch, *PAIR), negatives.tolist(), strict=True) for negative in row]
    expected = np.mean([np.log1p(np.exp(-users[user] @ (items[positive] - items[negative])))
                        for user, positive, negative in triples])
    if model == "LightGCN":
        expected += penalty_by_hand(made, triples)
    assert sampled.loss(batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_the_vectors_that_samplers_read(built, model):
    made, sampled, train = built(model, negative_sampler="dns")
    tables = sampled._tables()
    users, items, layers = vectors_by_hand(made, train)
    for found, by_hand in zip((tables.users, tables.items, *tables.layers),
                              (users, items, *(layers if model == "LightGCN" else ())), strict=True):
        np.testing.assert_allclose(found.detach().numpy(), by_hand, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_loss_of_mixed_vectors(built, model):
    made, sampled, train = built(model, negative_sampler="mixgcf")
    batch = batch_of(train)
    users, items, _ = vectors_by_hand(made, train)
    found = sampled.sampling.draw(batch, sampled._tables(), made.seed, made.epoch)
    mixed = found.vectors.detach().double().numpy()
    margins = [users[user] @ (items[positive] - vector)
               for (user, positive), row in zip(columns(batch, *PAIR), mixed, strict=True) for vector in row]
    expected = np.mean(np.log1p(np.exp(-np.array(margins))))
    if model == "LightGCN":
        first = found.items[:, 0].tolist()
        expected += penalty_by_hand(made, [(*pair, negative) for pair, negative
                                           in zip(columns(batch, *PAIR), first, strict=True)])
    loss = sampled.loss(batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    for table in (made.user_embedding, made.item_embedding):
        assert table.weight.grad[1:].any() and torch.isfinite(table.weight.grad).all()


# ---- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "keys", "message"), [
    ("NeuMF", {"negative_sampler": "uniform"}, r"negative_sampler: NeuMF does not learn from pairs"),
    ("NGCF", {"negative_sampler": "dns"}, r"negative_sampler: dns reads the vectors .* BPR, LightGCN and of "
                                          r"our own models; use uniform or popularity with NGCF"),
    ("BPR", {"negative_sampler": "hard"}, r"negative_sampler: 'hard' is not known"),
    ("NCL", {"negative_sampler": "uniform"}, r"negative_sampler: NCL is trained by a loop of its own"),
])
def test_models_and_samplers_that_do_not_fit(ranking_config, model, keys, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_keys(ranking_config(model, embedding_size=8, **keys), tmp_path / "run")


def test_knowledge_models_are_refused():
    """Their loss reads triples, which our loader does not draw."""
    model = SimpleNamespace(input_type=InputType.PAIRWISE)
    config = {"model": "CKE", "MODEL_TYPE": ModelType.KNOWLEDGE, "negative_sampler": "uniform"}
    with pytest.raises(ConfigError, match="negative_sampler: CKE learns from triples of a knowledge graph"):
        SampledPairwise(config, model, None)


def test_a_model_whose_vectors_we_do_not_know_can_have_uniform_ones(short):
    made = short("NGCF", negative_sampler="uniform", epochs=1)
    assert np.isfinite(made.metrics["history"][0]["loss"]).all()
