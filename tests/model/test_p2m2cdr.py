"""P2M2CDR: the contract with ids and with modalities, every loss by hand, noise, cold users."""

import numpy as np
import pytest
import torch
from contract import ModelContract
from recbole.data.interaction import Interaction
from running import run_keys, slope, write_item_features

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.errors import ConfigError, DataError
from recbole_mmdiff.model.disentanglement import (
    inter_domain_loss,
    intra_domain_loss,
    keyed_laplace,
    standardized,
)
from recbole_mmdiff.model.p2m2cdr import P2M2CDR

NAMES = ("target", "source")
ACCURATE = {"epochs": 60, "learning_rate": 0.01, "stopping_step": 20, "valid_metric": "RMSE"}


@pytest.fixture(scope="module")
def featured(make_tiny_pair, tmp_path_factory):
    """The folder of a pair of its own, with features."""
    pair = make_tiny_pair(tmp_path_factory.mktemp("featured"))
    write_item_features(pair)
    return pair.folder


class TestP2M2CDR(ModelContract):
    """Ids alone."""

    model = "P2M2CDR"
    keys = {"train_batch_size": 128}
    accurate_keys = ACCURATE
    best_rmse_ratio = 0.92


class TestP2M2CDRWithModalities(TestP2M2CDR):
    """Ids, texts and images."""

    @pytest.fixture(scope="class", autouse=True)
    def modalities(self, featured):
        type(self).keys = {**TestP2M2CDR.keys, "data_path": featured,
                           "modalities": ["text", "image"]}


@pytest.fixture(scope="module")
def built(tiny_config, featured):
    """``built(**keys)``: a model in float64 with drawn weights, a batch, and the data."""

    def build(**keys):
        keys = {"embedding_size": 4, "disentangled_size": 3, "modalities": ["text", "image"],
                "data_path": featured, "reg_weight": 0.2, "cold_rate": 0.4, "dropout_prob": 0.3,
                "inter_weight": 0.5, "intra_weight": 0.7, "noise_scale": 0.2, **keys}
        config = Config(config_dict=tiny_config("P2M2CDR", **keys))
        train = prepare_parts(config).train
        torch.manual_seed(3)
        model = P2M2CDR(config, train).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
        model.seed, model.epoch = 11, 2
        return model, next(iter(stage_loader(config, train, "both", 12, seed=5))), train

    return build


# ---- by hand ----------------------------------------------------------------------------------


def relu(values):
    return np.maximum(values, 0)


def cosine(one, other):
    return one @ other / (np.linalg.norm(one) * np.linalg.norm(other))


def linear(weights, name, vector):
    return weights[f"{name}.weight"] @ vector + weights.get(f"{name}.bias", 0)


def features_by_hand(train, featured):
    """domain -> modality -> ({item: row}, {user: row}), standardised, those who have one."""
    from recbole_mmdiff.data.features import FeatureFile

    found = {}
    for name, domain, short in (("target", train, "tgt"), ("source", train.source, "src")):
        found[name] = {}
        tokens = domain.field2id_token["item_id"].tolist()
        for modality in ("text", "image"):
            file = FeatureFile.open(featured / short, short, modality)
            rows = {tokens.index(token): file.matrix[place].astype(np.float64)
                    for place, token in enumerate(file.tokens)}
            rows = columns_standardised(rows)
            of_user = {}
            for user, item in zip(domain.inter_feat["user_id"].tolist(),
                                  domain.inter_feat["item_id"].tolist(), strict=True):
                if item in rows:
                    of_user.setdefault(user, []).append(rows[item])
            means = {user: np.mean(given, 0) for user, given in of_user.items()}
            found[name][modality] = rows, columns_standardised(means)
    return found


def columns_standardised(rows):
    table = np.stack(list(rows.values()))
    return {key: (row - table.mean(0)) / table.std(0) for key, row in rows.items()}


class ByHand:
    """One user or one item at a time."""

    def __init__(self, model, train, featured):
        self.weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
        self.features = features_by_hand(train, featured)
        self.means = {"target": train.ratings.double().mean().item(),
                      "source": train.source.ratings.double().mean().item()}

    def at(self, domain, name):
        return self.weights[f"domains.{domain}.{name}"]

    def whole(self, domain, kind, number):
        vector = self.at(domain, f"{kind}_embedding.weight")[number].copy()
        for place, modality in enumerate(("text", "image")):
            rows = self.features[domain][modality][kind == "user"]
            if number in rows:
                layer = f"domains.{domain}.modalities.{place}.{kind}_layer"
                vector += relu(linear(self.weights, layer, rows[number]))
        return vector

    def parts(self, domain, user):
        whole = self.whole(domain, "user", user)
        return [relu(linear(self.weights, f"domains.{domain}.{part}", whole))
                for part in ("common", "specific")]

    def score_and_penalty(self, domain, vector, item):
        bias = self.at(domain, "user_bias.weight")[0] @ vector
        own = linear(self.weights, f"domains.{domain}.item_layer",
                     self.whole(domain, "item", item))
        item_bias = self.at(domain, "item_bias.weight")[item, 0]
        penalty = vector @ vector + bias**2 + own @ own + item_bias**2
        return self.means[domain] + item_bias + vector @ own + bias, penalty


def softmax_weight(positive, negative, temperature=0.1):
    good, bad = (sum(np.exp(value / temperature) for value in values)
                 for values in (positive, negative))
    return -np.log(good / (good + bad))


def test_predictions_by_hand(built, featured):
    model, _, train = built(noise_scale=0.0)
    model.eval()
    hand = ByHand(model, train, featured)
    trained = set(train.users_with_rows().tolist())
    in_source = set(train.source.inter_feat["user_id"].tolist())
    items = [1, 2, train.field2token_id["item_id"]["ti0"], train.field2token_id["item_id"]["ti1"]]
    for user in range(train.user_num):
        if user in trained:
            vector = sum(hand.parts("target", user))
        else:
            common = hand.parts("source", user)[0] if user in in_source else np.zeros(3)
            vector = linear(hand.weights, "decoder", common)
        for item in items:
            found = model.predict(Interaction({"user_id": torch.tensor([user]),
                                               "item_id": torch.tensor([item])}))
            expected = hand.score_and_penalty("target", vector, item)[0]
            assert found.item() == pytest.approx(expected, abs=1e-5), (user, item)


@pytest.mark.parametrize("keys", [{}, {"inter_weight": 0.0}, {"intra_weight": 0.0},
                                  {"cold_rate": 0.0}, {"train_neg_ratio": 2}, {"modalities": []}])
def test_loss_by_hand(keys, built, featured):
    """Parts with the model's own dropout and noise, everything after them by hand."""
    model, batch, train = built(**keys)
    hand = ByHand(model, train, featured)
    if not keys.get("modalities", True):
        hand.features = {name: {modality: ({}, {}) for modality in ("text", "image")}
                         for name in NAMES}
    weight = {"inter_weight": 0.5, "intra_weight": 0.7, **keys}
    in_source = set(train.source.inter_feat["user_id"].tolist())

    def parts(name, user, view=0):
        clean = hand.parts(name, user)
        one = torch.tensor([user])
        drawn = model.dropout_view(name, one, model.parts(name, one), view)
        for mine, theirs in zip(clean, drawn, strict=True):   # Dropout: zero, or scaled.
            values = theirs[0].detach().numpy()
            kept = values != 0
            np.testing.assert_allclose(values[kept], mine[kept] / 0.7, rtol=1e-4)
        return [part[0].detach().numpy() for part in drawn]

    def noisy(name, user):
        ours = tuple(torch.tensor(part)[None] for part in parts(name, user))
        return [part[0].numpy() for part in model.obfuscated(name, torch.tensor([user]), ours)]

    expected = 0.0
    for name, prefix in (("target", ""), ("source", "source_")):
        rows = list(zip(batch[prefix + "user_id"].tolist(), batch[prefix + "item_id"].tolist(),
                        batch[prefix + "rating"].tolist(), strict=True))
        if "train_neg_ratio" in keys:
            rows += [(user, item, 0.0) for (user, *_), sampled in zip(
                list(rows), batch[prefix + "neg_item_id"].tolist(), strict=True)
                for item in sampled]
        terms = []
        for user, item, rating in rows:
            vector = sum(parts(name, user))
            if name == "target" and user in in_source and model._as_cold(torch.tensor([user])):
                vector = linear(hand.weights, "decoder", noisy("source", user)[0])
            score, penalty = hand.score_and_penalty(name, vector, item)
            terms.append((score - rating)**2 + 0.2 * penalty)
        expected += np.mean(terms)
    target = set(batch["user_id"].tolist())
    linked = sorted(target & in_source)
    inter = []
    for user in linked:
        (c_s, s_s), (c_t, s_t) = noisy("source", user), noisy("target", user)
        inter.append(softmax_weight([cosine(c_s, c_t)], [cosine(c_s, s_t), cosine(s_s, s_t)]))
    expected += weight["inter_weight"] * np.mean(inter)
    if weight["intra_weight"]:
        for name, users in (("target", target),
                            ("source", set(batch["source_user_id"].tolist()) | set(linked))):
            found = []
            for user in users:
                views = tuple(torch.tensor(np.stack(part))[None] for part in zip(
                    parts(name, user), parts(name, user, view=1), strict=True))
                (c, c2), (s, s2) = (view[0].numpy() for view in views)
                pairs = [(c, c2), (s, s2), (c, s), (c, s2), (s, c2), (s2, c2)]
                near = [0.0 if not one.any() or not other.any() else cosine(one, other)
                        for one, other in pairs]
                found.append(softmax_weight(near[:2], near[2:]))
            expected += weight["intra_weight"] * np.mean(found)
    model.train()
    assert model.training_loss(batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cold_rate", [0.0, 0.4])
def test_gradient_against_finite_differences(cold_rate, built):
    model, batch, _ = built(train_neg_ratio=1, cold_rate=cold_rate)
    model.training_loss(batch).backward()
    random, checked = np.random.default_rng(1), 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None or (cold_rate and name.startswith("domains.source")):
            continue    # The decoder's input is taken as given: see the next test.
        place = tuple(random.integers(size) for size in parameter.shape)
        if "embedding" in name or "item_bias" in name:
            place = (int(parameter.grad.abs().sum(1).argmax()), *place[1:])
        with torch.no_grad():
            expected = slope(lambda: model.training_loss(batch).item(), parameter, place, step=1e-6)
        assert parameter.grad[place].item() == pytest.approx(expected, rel=1e-4, abs=1e-7), name
        checked += abs(expected) > 1e-7
    assert checked > 15


def test_target_ratings_do_not_reach_the_source(built):
    model, batch, _ = built(cold_rate=0.9, inter_weight=0.0)

    def gradients():
        model.zero_grad()
        model.training_loss(batch).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    before = gradients()
    batch["rating"] += 2.0
    for name, gradient in gradients().items():
        assert torch.equal(gradient, before[name]) == name.startswith("domains.source"), name


def test_contrastive_losses_by_hand():
    draw = np.random.default_rng(5)
    c, s, c2, s2 = draw.normal(size=(4, 6, 3))
    intra = [softmax_weight([cosine(a, a2), cosine(b, b2)],
                            [cosine(a, b), cosine(a, b2), cosine(b, a2), cosine(b2, a2)], 0.5)
             for a, b, a2, b2 in zip(c, s, c2, s2, strict=True)]
    inter = [softmax_weight([cosine(a, a2)], [cosine(a, b2), cosine(b, b2)], 0.5)
             for a, b, a2, b2 in zip(c, s, c2, s2, strict=True)]
    tensors = [torch.tensor(part) for part in (c, s, c2, s2)]
    assert intra_domain_loss(*tensors, 0.5).item() == pytest.approx(np.mean(intra))
    assert inter_domain_loss(*tensors, 0.5).item() == pytest.approx(np.mean(inter))
    nothing = torch.zeros(2, 3, requires_grad=True)
    intra_domain_loss(nothing, nothing, nothing, nothing, 0.1).backward()
    assert torch.isfinite(nothing.grad).all()


# ---- noise, cold users, features --------------------------------------------------------------


def test_laplace_noise():
    from scipy.stats import kstest

    keys = torch.arange(4000)
    noise = keyed_laplace(keys, 5, seed=8, scale=0.3)
    assert kstest(noise.flatten().numpy(), "laplace", args=(0, 0.3)).pvalue > 0.01
    assert torch.equal(keyed_laplace(keys[7:9], 5, 8, 0.3), noise[7:9])
    assert not torch.equal(keyed_laplace(keys, 5, 9, 0.3), noise)
    assert keyed_laplace(keys, 5, 8, 0.0).abs().sum() == 0


def test_noise_of_an_epoch_and_of_a_prediction(built):
    model = built()[0]
    users = torch.arange(1, 20)

    def seen(in_test, epoch, seed=11):
        model.epoch, model.seed = epoch, seed
        zero = torch.zeros(len(users), 3, dtype=torch.float64)
        return torch.cat(model.obfuscated("source", users, (zero, zero), in_test), 1)

    assert torch.equal(seen(False, 1), seen(False, 1))
    assert not torch.equal(seen(False, 1), seen(False, 2))
    assert torch.equal(seen(True, 1), seen(True, 2, seed=12)), "one draw for all predictions"
    assert seen(False, 1).abs().max() > 0.1


def test_features_of_a_cold_user_come_from_the_source_only(built, featured):
    model, _, train = built()
    cold = torch.arange(1, train.num_overlap + 1)
    cold = cold[~torch.isin(cold, train.users_with_rows())]
    for domain, known in (("target", False), ("source", True)):
        for modality in model.domains[domain].modalities:
            assert (modality.user_present[cold] == known).all()
    model.eval()
    before = model.user_factors(cold).clone()
    with torch.no_grad():
        for parameter in model.domains["target"].user_embedding.parameters():
            parameter.add_(3.0)
        model.domains["target"].common.bias.add_(3.0)
    assert torch.equal(model.user_factors(cold), before)


@pytest.mark.parametrize(("policy", "left_out"), [("drop_item", True), ("mean", False),
                                                  ("zero", False)])
def test_items_without_features(policy, left_out, built):
    model, _, train = built(modality_policy=policy)
    domain, item = model.domains["target"], train.field2token_id["item_id"]["ti1"]
    text, image = domain.modalities
    assert bool(image.item_present[item]) != left_out and bool(text.item_present[item])
    before = domain.item_factors(torch.tensor([item])).clone()
    with torch.no_grad():
        image.item_layer.bias.add_(5.0)
    assert torch.equal(domain.item_factors(torch.tensor([item])), before) == left_out


def test_standardized_leaves_other_rows_at_zero():
    matrix = torch.tensor([[9.0, 9.0], [1.0, 5.0], [3.0, 5.0]])
    found = standardized(matrix, torch.tensor([False, True, True]))
    assert found.tolist() == [[0, 0], [-1, 0], [1, 0]]


def test_without_features_the_error_says_what_to_do(tiny_config, tmp_path):
    with pytest.raises(DataError, match=r"'text' of 'tgt' lacks tgt.text.npy.*make it with"):
        run_keys(tiny_config("P2M2CDR", modalities=["text"]), tmp_path / "run")


@pytest.mark.parametrize("key", ["dropout_prob", "cold_rate"])
def test_shares(key, built):
    with pytest.raises(ConfigError, match=f"{key}: 1.5 is no share"):
        built(**{key: 1.5})


def test_any_text_may_name_a_modality(make_tiny_pair, tiny_config, tmp_path):
    """Names that PyTorch's modules have for something else, too."""
    pair = make_tiny_pair(tmp_path)
    names = ["keys", "embedding", "bias", "text", "has_text"]
    write_item_features(pair, [(name, 4) for name in names])
    keys = tiny_config("P2M2CDR", data_path=pair.folder, epochs=1, modalities=names)
    assert run_keys(keys, tmp_path / "run").metrics["test"]["rating"]["rmse"] < 3
