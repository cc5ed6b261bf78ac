"""MMDCDR: the contract with ids and modalities, every loss and every score by hand."""

import numpy as np
import pytest
import torch
from contract import ModelContract
from mmdcdr_by_hand import DROP, EPOCH, NOISE, SEED, SMALL, STEPS, ByHand
from recbole.data.interaction import Interaction
from running import slope
from test_contrastive import by_loops

from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.diffusion import fold_in, keyed_antithetic_steps, keyed_normal, keyed_uniform


class TestMMDCDR(ModelContract):
    """Ids alone. The bands are wide: from seed to seed the ratios differ by a tenth and more."""

    model = "MMDCDR"
    keys = {**SMALL, "modalities": [], "pretrain_epochs": 2, "pretrain_batch_size": 256,
            "diffusion_epochs": 2, "diffusion_batch_size": 32, "train_batch_size": 16}
    accurate_keys = {"pretrain_epochs": 40, "pretrain_learning_rate": 0.01, "reg_weight": 0.02,
                     "diffusion_epochs": 60, "diffusion_learning_rate": 0.01, "num_evaluations": 10,
                     "epochs": 15, "learning_rate": 0.01, "hidden_size": 32, "stopping_step": 10,
                     "valid_metric": "RMSE"}
    best_rmse_ratio = 0.97


class TestMMDCDRWithOneModality(TestMMDCDR):
    """Texts."""

    more = {"modalities": ["text"], "use_ids": False}
    missing = ""
    best_rmse_ratio = 0.95

    @pytest.fixture(scope="class", autouse=True)
    def features(self, content):
        type(self).keys = {**TestMMDCDR.keys, "data_path": content(self.missing), **self.more}


class TestMMDCDRWithTwoModalities(TestMMDCDRWithOneModality):
    """Texts and images; with samples in place of their mean, and with the contrastive loss."""

    more = {"modalities": ["text", "image"], "use_ids": False, "sampling_noise": True, "num_samples": 4,
            "contrastive_weight": 0.02}


class TestMMDCDRWithThreeModalities(TestMMDCDRWithOneModality):
    """Texts, images and a third: all that both domains have."""

    more = {"modalities": None, "use_ids": False}
    best_rmse_ratio = 0.9


class TestMMDCDRWithModalitiesAndIds(TestMMDCDRWithOneModality):
    """Three modalities and ids."""

    more = {"modalities": ["text", "image", "audio"], "use_ids": True}
    best_rmse_ratio = 0.9


class TestMMDCDRWithoutHalfOfTheTargetImages(TestMMDCDRWithOneModality):
    """Every second item of the target has no image."""

    more = {"modalities": ["text", "image"], "use_ids": False}
    missing = "t"
    best_rmse_ratio = 0.9


class TestMMDCDRWithoutHalfOfTheSourceImages(TestMMDCDRWithOneModality):
    """Every second item of the source has no image."""

    more = {"modalities": ["text", "image"], "use_ids": False}
    missing = "s"
    best_rmse_ratio = 0.9


# ---- losses and scores by hand ----------------------------------------------------------------


def batch_of(model, config, train, data, users=12):
    """The rows of some users."""
    loader = stage_loader(config, train, data, users, seed=5, by_user=data != "overlap_users")
    return next(iter(loader))


def noise_error(hand, number, user, drop):
    """The term of one user in Eq. 7, of a modality."""
    name, one, steps = hand.names[number], torch.tensor([user]), hand.config["num_steps"]
    seeds = [fold_in(SEED, EPOCH, purpose, number) for purpose in (STEPS, NOISE, DROP)]
    x0, condition = (hand.profiles[domain][name][user] for domain in ("target", "source"))
    step = keyed_antithetic_steps(one, steps, seeds[0]).item()
    noise = keyed_normal(one, len(x0), seeds[1])[0].double().numpy()
    keep = keyed_uniform(one, 1, seeds[2]).item() >= drop
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, hand.config["beta_end"], steps) * 1000 / steps)[step - 1]
    x_t = np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * noise
    predicted = hand.noise(number, x_t, (step - 1) * 1000 / steps, keep * condition)
    return np.mean((predicted - noise)**2), keep


@pytest.mark.parametrize("keys", [{}, {"num_steps": 50}, {"use_ids": False, "residual": False},
                                  {"standardize": False, "num_layers": 3}])
def test_diffusion_loss_by_hand(keys, built_mmdcdr):
    model, config, train = built_mmdcdr(condition_drop_probability=0.5, **keys)
    hand, batch = ByHand(model, config, train), batch_of(model, config, train, "overlap_users")
    expected, kept, learned = 0.0, set(), []
    for number, name in enumerate(hand.names):
        users = [user for user in batch["user_id"].tolist()
                 if user in hand.profiles["source"][name] and user in hand.profiles["target"][name]]
        errors, masks = zip(*(noise_error(hand, number, user, 0.5)
                              for user in users), strict=True)
        expected += np.mean(errors)
        kept |= set(masks)
        learned.append(len(users))
    assert kept == {True, False} and 0 < learned[1] < learned[0] == 12
    assert model.profile_loss(batch).item() == pytest.approx(expected, rel=1e-4)


def test_without_diffusion_the_profile_is_mapped_by_a_perceptron(built_mmdcdr):
    model, config, train = built_mmdcdr(use_diffusion=False, num_layers=3)
    hand, batch = ByHand(model, config, train), batch_of(model, config, train, "overlap_users")
    expected = 0.0
    for number, name in enumerate(hand.names):
        source, target = (hand.profiles[domain][name] for domain in ("source", "target"))
        mapped = {user: hand.perceptron(f"denoisers.{number}", row) for user, row in source.items()}
        expected += np.mean([np.mean((mapped[user] - target[user])**2)
                             for user in batch["user_id"].tolist() if user in source and user in target])
        found, has = model.target_profiles(number, torch.arange(train.user_num), learning=True)
        for user, row in mapped.items():
            np.testing.assert_allclose(found[user].numpy(), row, rtol=1e-4, atol=1e-5)
            assert has[user]
    assert model.profile_loss(batch).item() == pytest.approx(expected, rel=1e-4)


def stacked(sides, size):
    """Vectors (n, d) of each modality, zero where there is none, and where there is one (n,)."""
    filled = [[np.zeros(size) if vector is None else vector for vector in side] for side in sides]
    present = [[vector is not None for vector in side] for side in sides]
    return [torch.tensor(np.stack(part)) for part in zip(*filled, strict=True)], \
        [torch.tensor(part) for part in zip(*present, strict=True)]


def alignment_distance(hand, users):
    """Of aligned generated vectors from aligned true profiles, over the modalities."""
    total = 0.0
    for number, name in enumerate(hand.names):
        true = {user: hand.perceptron(f"alignments.{number}", hand.profiles["target"][name][user])
                for user in users if user in hand.profiles["target"][name]}
        total += np.mean([np.mean((side[number] - true[user])**2) for user, side in users.items()
                          if user in true and side[number] is not None])
    return total


@pytest.mark.parametrize("keys", [
    {}, {"contrastive_weight": 0.3}, {"align_weight": 0.5}, {"biases": False}, {"guidance_scale": 2.5},
    {"cold_item_rate": 0.4, "contrastive_weight": 0.3}, {"cold_item_rate": 1.0},
    {"contrastive_weight": 0.3, "align_weight": 0.5, "train_neg_ratio": 1, "sampling_noise": True},
    {"rating_users": "all_target", "sampling_noise": True, "num_samples": 2, "use_ids": False}], ids=str)
def test_rating_loss_by_hand(keys, built_mmdcdr):
    model, config, train = built_mmdcdr(temperature=0.2, **keys)
    hand, batch = ByHand(model, config, train), batch_of(model, config, train, model.rating_data)
    rows = list(zip(*(batch[field].tolist() for field in ("user_id", "item_id", "rating")), strict=True))
    assert ("train_neg_ratio" in keys) == (0.0 in batch["rating"])
    users = {user: hand.user_side(user, learning=True) for user, _, _ in rows}
    uniform = keyed_uniform(torch.arange(train.item_num), 1, fold_in(SEED, EPOCH, -1))[:, 0]
    cold = (uniform < config["cold_item_rate"]).tolist()
    items = {item: hand.item_side(item, cold[item]) for _, item, _ in rows}
    expected = np.mean([(hand.rating(users[user], items[item], item, cold[item]) - rating)**2
                        for user, item, rating in rows])
    sides = [stacked(side.values(), config["embedding_size"]) for side in (users, items)]
    assert not sides[0][1][1].all() and not sides[1][1][1].all(), "somebody lacks images"
    expected += config["contrastive_weight"] * sum(by_loops(*side, 0.2) for side in sides)
    expected += config["align_weight"] * alignment_distance(hand, users)
    assert model.rating_loss(batch).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("keys", [{}, {"sampling_noise": True, "num_samples": 3}, {"guidance_scale": 2.5},
                                  {"guidance_scale": 0.0, "solver_order": 2, "residual": False},
                                  {"biases": False}], ids=str)
def test_scores_by_hand(keys, built_mmdcdr):
    """Of everybody: with and without source rows, cold, with no item that has an image, and [PAD]."""
    model, config, train = built_mmdcdr(**keys)
    hand = ByHand(model.eval(), config, train)
    items = [0, 1, *(train.field2token_id["item_id"][token] for token in ("ti0", "ti1", "ti9"))]
    everybody = torch.arange(train.user_num)
    table = model.full_sort_predict(Interaction({"user_id": everybody})).view(len(everybody), -1)
    kinds = set()
    for user in everybody.tolist():
        side = hand.user_side(user, learning=False)
        kinds.add((bool(model.in_source[user]), *(vector is not None for vector in side)))
        for item in items:
            expected = hand.rating(side, hand.item_side(item), item)
            assert table[user, item].item() == pytest.approx(expected, rel=1e-4, abs=1e-5), (user, item)
    assert len(kinds) >= 5


@pytest.mark.parametrize(("loss_of", "data", "trained"), [
    ("profile_loss", "overlap_users", ("denoisers",)),
    ("rating_loss", "overlap_ratings", ("alignments", "item_layers", "user_fusion", "item_fusion", "head"))])
def test_gradient_against_finite_differences(loss_of, data, trained, built_mmdcdr):
    """Of what a stage trains; nothing else gets one."""
    model, config, train = built_mmdcdr(contrastive_weight=0.3, temperature=0.5, sampling_noise=True)
    batch, random, checked = batch_of(model, config, train, data), np.random.default_rng(1), 0
    getattr(model, loss_of)(batch).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(trained), name
        if parameter.grad is None:
            continue
        place = tuple(random.integers(size) for size in parameter.shape)
        if "item_bias" in name:
            place = (int(batch["item_id"][0]), 0)
        with torch.no_grad():
            expected = slope(lambda: getattr(model, loss_of)(batch).item(), parameter, place, step=1e-2)
        assert parameter.grad[place].item() == pytest.approx(expected, rel=0.01, abs=2e-3), name
        checked += abs(expected) > 0.02
    assert checked > 10


def test_generated_vectors_move_towards_true_ones_and_not_these_towards_them(built_mmdcdr):
    """The last bias would cancel if the aligned true profile had a gradient, too."""
    model, _, train = built_mmdcdr(modalities=["text"], use_ids=False)
    users = train.overlap_users()
    generated, (x0, _) = model.modal_users(users), model.domains["target"].profiles("text", users)
    model._alignment_loss(users, generated).backward()
    expected = 2 * (generated.vectors[0] - model.alignments[0](x0)).detach().mean(0) / 6
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(model.alignments[0][-1].bias.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_batch_that_teaches_nothing(built_mmdcdr):
    """Users without a profile in one of the domains: the loss is 0, and has a gradient."""
    model, _, train = built_mmdcdr()
    cold = torch.arange(1, train.num_overlap + 1)
    cold = cold[~torch.isin(cold, train.users_with_rows())]
    loss = model.profile_loss(Interaction({"user_id": cold}))
    loss.backward()
    assert loss.item() == 0
    assert not any(parameter.grad.any() for parameter in model.denoisers.parameters())
