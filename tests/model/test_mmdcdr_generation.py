"""MMDCDR: how target profiles are generated, from what, and what each stage trains."""

import pytest
import torch
from contract import ModelContract
from mmdcdr_by_hand import SMALL, START
from running import run_keys, write_item_features
from torch import nn

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.diffusion import fold_in, keyed_normal
from recbole_mmdiff.quick_start import load_run

NOISY = {"sampling_noise": True, "num_samples": 2}


class GaussianNoise(nn.Module):
    """The exact noise of target profiles that are Gaussian around a linear map of the source profile."""

    def __init__(self, model, matrix, variance):
        super().__init__()
        self.schedule, self.matrix, self.variance = model.schedule, matrix, variance

    def at(self, t, condition):
        """Mean (b, k) and variance (k,) of the noisy states at a time of the schedule."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return alpha * condition @ self.matrix, alpha**2 * self.variance + sigma**2

    def forward(self, x, time, condition, keep=None):
        steps = self.schedule.num_steps
        t = (time * steps / 1000 + 1) / steps
        mean, variance = self.at(t, condition)
        return self.schedule.sigma(t) * (x - mean) / variance


def transferred_users(model):
    """Users (b,) with a source row, and their source profiles of texts (b, c)."""
    users = model.in_source.nonzero().squeeze(-1)
    return users, model.domains["source"].profiles("text", users)[0]


@pytest.mark.parametrize("steps", [1000, 200])
def test_exact_noise_gives_the_distribution_of_the_profiles(steps, built_mmdcdr):
    """Zero is carried to the mean of all samples, a normal start to a sample."""
    keys = {"num_evaluations": 60, "num_steps": steps, "beta_end": 0.02}
    model, _, _ = built_mmdcdr(**keys)
    users, condition = transferred_users(model)
    draw = torch.Generator().manual_seed(1)
    size = model.domains["target"].profile_sizes["text"]
    exact = GaussianNoise(model, torch.randn(condition.shape[1], size, generator=draw),
                          torch.rand(size, generator=draw) + 0.1)
    model.denoisers[0] = exact
    mean, variance = condition @ exact.matrix, exact.variance
    torch.testing.assert_close(model.generated(0, users, condition), mean, rtol=0.01, atol=0.03)
    model.sampling_noise, model.num_samples = True, 300
    error = (model.generated(0, users, condition) - mean) / (variance / 300).sqrt()
    assert error.square().mean() == pytest.approx(1, abs=0.15)
    model.num_samples = 1
    error = (model.generated(0, users, condition) - mean) / variance.sqrt()
    assert error.square().mean() == pytest.approx(1, abs=0.15)
    start = keyed_normal(users, size, fold_in(fold_in(model.run_seed, START, 0), 0))
    (first, wide), (last, narrow) = (exact.at(t, condition) for t in (1.0, 1 / steps))
    flow = last + (narrow / wide).sqrt() * (start - first)
    torch.testing.assert_close(model.generated(0, users, condition), flow, rtol=0.01, atol=0.03)


@pytest.mark.parametrize("keys", [{}, NOISY, {"use_diffusion": False}], ids=str)
def test_users_do_not_depend_on_their_batch(keys, built_mmdcdr):
    together, alone = (built_mmdcdr(sampling_batch_size=size, guidance_scale=2.0, **keys)[0].eval()
                       for size in (16384, 1))
    users = torch.arange(together.n_users)
    vectors = together.user_factors(users)
    torch.testing.assert_close(alone.user_factors(users), vectors, rtol=1e-4, atol=1e-5)
    order = torch.randperm(len(users), generator=torch.Generator().manual_seed(1))
    together.forget()
    torch.testing.assert_close(together.user_factors(order), vectors[order], rtol=1e-4, atol=1e-5)
    together.forget()
    some = together.user_factors(torch.tensor([7, 7, 3]))
    torch.testing.assert_close(some, vectors[[7, 7, 3]], rtol=1e-4, atol=1e-5)


def test_the_mean_of_samples(built_mmdcdr):
    model, _, _ = built_mmdcdr(**NOISY)
    users, condition = transferred_users(model)
    mean, drawn = model.generated(0, users, condition), []
    for start in model._starts(0, users, learning=False):
        model._starts = lambda *given, start=start: [start]
        drawn.append(model.generated(0, users, condition))
    assert not torch.allclose(*drawn)
    torch.testing.assert_close(mean, (drawn[0] + drawn[1]) / 2)


@pytest.mark.parametrize("keys", [{}, NOISY], ids=str)
def test_noise_of_an_epoch_and_of_the_run(keys, built_mmdcdr):
    """New in each epoch and stage while learning, one for all evaluations, another for another modality."""
    model, _, _ = built_mmdcdr(**keys)
    users = torch.arange(1, 30)

    def profiles(learning, seed=11, epoch=1):
        model.seed, model.epoch = seed, epoch
        return model.target_profiles(0, users, learning)[0]

    assert torch.equal(profiles(True), profiles(True))
    assert torch.equal(profiles(False), profiles(False, seed=12, epoch=2))
    for other in (profiles(True, epoch=2), profiles(True, seed=12), profiles(False)):
        assert torch.equal(other, profiles(True)) == (not keys)
    starts = [model._starts(number, users, learning=False)[0][:, :3] for number in range(2)]
    assert torch.equal(*starts) == (not keys)


def test_the_noise_of_a_run_survives_saving(tiny_config, content, tmp_path):
    keys = {**SMALL, **NOISY, "modalities": ["text"], "pretrain_epochs": 1, "diffusion_epochs": 1,
            "data_path": content()}
    made = run_keys(tiny_config("MMDCDR", **keys, epochs=1), tmp_path / "run")
    assert torch.equal(ModelContract.scores(load_run(made.folder)), ModelContract.scores(made))


# ---- stages -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states(tiny_config, content, tmp_path_factory):
    """Weights and buffers after the factorisations, after the diffusions and after the ratings."""
    found = []
    for diffusion_epochs, epochs in ((0, 0), (2, 0), (2, 2)):
        keys = {**SMALL, "modalities": ["text", "image"], "pretrain_epochs": 2, "weight_decay": 0.1,
                "data_path": content("t"), "diffusion_epochs": diffusion_epochs, "epochs": epochs,
                "contrastive_weight": 0.1, "align_weight": 0.1, "diffusion_batch_size": 16}
        found.append(run_keys(tiny_config("MMDCDR", **keys), tmp_path_factory.mktemp("stages") / "run"))
    return [made.model.state_dict() for made in found]


def changed(before, after):
    """The first parts of the names of what differs."""
    assert list(before) == list(after)
    return {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}


def test_what_each_stage_changes(states):
    start, diffused, rated = states
    assert changed(start, diffused) == {"denoisers"}
    assert changed(diffused, rated) == {"alignments", "item_layers", "user_fusion", "item_fusion", "head"}
    learned = [name for name, value in diffused.items() if not torch.equal(value, rated[name])]
    assert {name for name in learned if name.startswith("head")} == {"head.item_bias.weight",
                                                                     "head.user_bias.weight"}
    for part in ("denoisers", "alignments", "item_layers"):
        moved = {name.split(".")[1] for name, value in start.items()
                 if name.startswith(part) and not torch.equal(value, rated[name])}
        assert moved == {"0", "1", "2"}, "every modality and the ids"


def test_order_and_data_of_the_stages(built_mmdcdr):
    stages = built_mmdcdr(rating_users="all_target")[0].stages()
    assert [(stage.name, stage.data, stage.by_user, stage.validates) for stage in stages] == [
        ("source", "source", False, False), ("target", "target", False, False),
        ("diffusion", "overlap_users", False, False), ("rating", "target", True, True)]
    stages = built_mmdcdr(use_ids=False)[0].stages()
    assert [(stage.name, stage.data) for stage in stages] == [
        ("diffusion", "overlap_users"), ("rating", "overlap_ratings")]


def test_items_without_a_training_row_do_not_turn_the_axes(make_tiny_pair, tiny_config, tmp_path):
    """What W_m makes of all others, and with it all profiles, stays bit for bit."""
    pair = make_tiny_pair(tmp_path, choosy=True)
    keys = {**SMALL, "modalities": ["text"], "use_ids": False, "feature_size": 3, "data_path": tmp_path,
            "split_protocol": "cold_start_items"}

    def features_and_profiles(scaled=()):
        for token in scaled:
            pair.looks[token] = pair.looks[token] * 50
        write_item_features(pair, [("text", 5)], {}, signal=4.0)
        config = Config(config_dict=tiny_config("MMDCDR", **keys))
        parts = prepare_parts(config)
        model = config.model_class(config, parts.train)
        everybody = torch.arange(parts.train.user_num)
        domains = [model.domains[name] for name in ("target", "source")]
        return parts.train, [table for domain in domains for table in
                             (domain.items("text")[0], domain.profiles("text", everybody)[0])]

    train, before = features_and_profiles()
    tokens = train.field2id_token["item_id"]
    trained = torch.zeros(train.item_num, dtype=torch.bool)
    trained[train.inter_feat["item_id"]] = True
    cold = (~trained[1:51]).nonzero().squeeze(-1) + 1
    assert len(cold) > 5
    _, after = features_and_profiles(tokens[cold.numpy()])
    assert torch.equal(after[0][trained], before[0][trained])
    assert not torch.equal(after[0][cold], before[0][cold])
    assert all(torch.equal(one, other) for one, other in zip(after[1:], before[1:], strict=True))
    _, after = features_and_profiles([tokens[int(trained.nonzero()[0])]])
    assert not torch.equal(after[2], before[2]), "the axes are of both domains"


def test_profiles_of_cold_users(built_mmdcdr):
    """None in the target, in any modality; a generated one from the source."""
    model, _, train = built_mmdcdr(missing="")
    cold = torch.arange(1, train.num_overlap + 1)
    cold = cold[~torch.isin(cold, train.users_with_rows())]
    for number, name in enumerate(model.names):
        profile, has = model.domains["target"].profiles(name, cold)
        assert not has.any() and not profile.any()
        made, present = model.target_profiles(number, cold, learning=False)
        assert present.all() and made.any(1).all()
