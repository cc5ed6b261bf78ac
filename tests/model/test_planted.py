"""Planted structure: the target profile is a known function of the source profile, plus noise.

Everybody has rated one item in a domain, whose features are the profile. The diffusions of MMDCDR and
MuSiC are trained by their own losses, and what they generate is held against the known conditional mean.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.features import write_features
from recbole_mmdiff.data.preparation import prepare_parts

SIZE, OVERLAP, SIDE = 4, 1300, 800
KEYS = {"paper": True, "modalities": ["text"], "feature_size": 0, "standardize": True,
        "rescale_schedule": True, "test_user_ratio": 0.2, "split_seed": 1, "sampling_noise": True}
MMDCDR = {"hidden_size": 64, "num_layers": 2, "embedding_size": 8, "num_steps": 100, "beta_end": 0.01,
          "num_evaluations": 20, "solver_order": 2, "num_samples": 16}
MUSIC = {"hidden_size": 32, "embedding_size": 8, "shared_user_extractor": False, "dropout_prob": 0.0,
         "num_samples": 16}


@dataclass
class Planted:
    """A data set, and what is known of it.

    Attributes:
        config: ``config(model, **keys)``, a configuration of the data set.
        means: (SIZE,) by user token: the mean of the target profile, given the source profile.
        spread: standard deviation of the noise.
    """

    config: object
    means: dict
    spread: float

    def built(self, model, seed=1, **keys):
        """A model and its training data."""
        config = Config(config_dict=self.config(model, **{**KEYS, **keys, "seed": seed}))
        train = prepare_parts(config).train
        torch.manual_seed(seed)
        return config.model_class(config, train), train


@pytest.fixture(scope="module")
def plant(atomic, tiny_config, tmp_path_factory):
    """``plant(spread)``: target = rotated source + noise of that spread; side users likewise."""

    def make(spread):
        folder, draw = tmp_path_factory.mktemp("planted"), np.random.default_rng(1)
        source = draw.normal(size=(OVERLAP + SIDE, SIZE))
        means = source @ np.linalg.qr(draw.normal(size=(SIZE, SIZE)))[0]
        target = means + spread * draw.normal(size=means.shape)
        users = [f"u{number:04}" for number in range(OVERLAP + SIDE)]
        for name, profiles, count in (("src", source, OVERLAP), ("tgt", target, OVERLAP + SIDE)):
            rows = [(user, f"i{user}", 3 + place % 2, place) for place, user in enumerate(users[:count])]
            atomic.write(folder, name, rows)
            write_features(folder / name, name, "text", [row[1] for row in rows],
                           profiles[:count].astype(np.float32), encoder="planted")
        return Planted(lambda model, **keys: tiny_config(model, data_path=folder, **keys),
                       dict(zip(users, means, strict=True)), spread)

    return make


def train_on(model, parameters, loss_of, users, steps, rate, batch=64, falling=True):
    """Adam, by a rate that falls to zero or stays."""
    optimiser = torch.optim.Adam(list(parameters), lr=rate)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps) if falling else None
    generator, model.epoch = torch.Generator().manual_seed(0), -1
    while steps > 0:
        model.epoch += 1
        for part in users[torch.randperm(len(users), generator=generator)].split(batch)[:steps]:
            optimiser.zero_grad()
            loss_of(part).backward()
            optimiser.step()
            steps -= 1
            if course is not None:
                course.step()
    model.eval()


def cold_users(model, train):
    return torch.tensor([user for user in range(1, train.num_overlap + 1)
                         if user not in set(train.overlap_users().tolist())])


def means_of(planted, train, users):
    """(n, SIZE): conditional means of users."""
    tokens = train.field2id_token["user_id"]
    return torch.tensor(np.stack([planted.means[tokens[user]] for user in users.tolist()])).float()


def relative_error(found, truth):
    """Root mean square of the error, over that of the truth around its mean."""
    return ((found - truth).square().mean() / (truth - truth.mean(0)).square().mean()).sqrt().item()


# ---- more users, smaller error -----------------------------------------------------------------


@torch.no_grad()
def mmdcdr_error(planted, count):
    """Of the mean of the sampled profiles, with so many training users."""
    model, train = planted.built("MMDCDR", **MMDCDR)
    cold, model.overlap_users = cold_users(model, train), train.overlap_users()[:count]
    model.fit_profiles()
    with torch.enable_grad():
        train_on(model, model.denoisers.parameters(),
                 lambda user: model.profile_loss(Interaction({"user_id": user})),
                 model.overlap_users, 600, 0.003)
    domain = model.domains["target"]
    found = model.target_profiles(0, cold, False)[0] * domain.scale_0 + domain.center_0
    return relative_error(found, means_of(planted, train, cold))


def open_extractors(model, gain):
    """Perceptrons whose outputs spread over the range of tanh, as trained ones do."""
    for extractor in model.user_extractors:
        for layer in (extractor.hidden, extractor.output):
            torch.nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))


@torch.no_grad()
def drawn_features(planted, model, means, draws):
    """(draws, n, d): f_u of target profiles drawn around their conditional means (n, SIZE)."""
    domain, generator = model.domains["target"], torch.Generator().manual_seed(9)
    noise = torch.randn(draws, *means.shape, generator=generator)
    profiles = (means + planted.spread * noise - domain.center_0) / domain.scale_0
    return model.user_extractors[0](profiles, None, None)


@torch.no_grad()
def music_error(planted, count):
    """Of the mean of the generated features, with so many training users."""
    model, train = planted.built("MuSiC", **MUSIC)
    open_extractors(model, 1.0)
    cold, model.overlap_users = cold_users(model, train), train.overlap_users()[:count]
    model.fit_profiles()
    with torch.enable_grad():
        train_on(model, model.denoiser.parameters(),
                 lambda user: model.denoising_loss(user, model.user_features("source", user)),
                 model.overlap_users, 600, 0.005)
    truth = drawn_features(planted, model, means_of(planted, train, cold), 300).mean(0)
    return relative_error(model.user_vectors(cold), truth)


@pytest.mark.parametrize(("error_of", "bound"), [(mmdcdr_error, 0.25), (music_error, 0.4)])
def test_samples_approach_the_conditional_mean_with_more_users(error_of, bound, plant):
    planted = plant(0.4)
    few, some, many = (error_of(planted, count) for count in (50, 200, 800))
    assert many < some < few
    assert many < min(bound, 0.8 * few)


# ---- side users --------------------------------------------------------------------------------


def energy_distance(one, other):
    """Between the distributions that two samples (n, d) and (m, d) come from."""
    def distance(a, b):
        return torch.cdist(a, b).mean()

    return (2 * distance(one, other) - distance(one, one) - distance(other, other)).item()


@torch.no_grad()
def after_side_users(planted, seed, side_steps, transfer_steps):
    """Energy distance of single samples, and error of their mean, with 50 overlapping users."""
    model, train = planted.built("MuSiC", seed, **{**MUSIC, "embedding_size": 16})
    torch.manual_seed(5)
    open_extractors(model, 1.5)
    cold, side = cold_users(model, train), train.side_users()
    model.fit_profiles()
    generator = torch.Generator().manual_seed(seed)
    few = model.overlap_users[torch.randperm(len(model.overlap_users), generator=generator)[:50]]
    with torch.enable_grad():
        train_on(model, model.denoiser.parameters(),
                 lambda user: model.side_loss(Interaction({"user_id": user})), side, side_steps, 0.003, 256)
        train_on(model, model.denoiser.parameters(),
                 lambda user: model.denoising_loss(user, model.user_features("source", user)),
                 few, transfer_steps, 0.001, falling=False)
    drawn = drawn_features(planted, model, means_of(planted, train, cold), 60)
    mean = model.user_vectors(cold)
    model.num_samples = 1
    model.eval()
    return energy_distance(model.user_vectors(cold), drawn[0]), relative_error(mean, drawn.mean(0))


def test_side_users_bring_samples_closer_to_the_distribution_of_the_target(plant):
    """With few overlapping users whose source tells half of the target, after the same transfer.

    As many steps in all on overlapping users alone come as close, but make more of their noise. The error
    of the mean is not what gains: without side users it is as small after the same transfer. They teach
    what target vectors look like, not whose they are.
    """
    planted = plant(1.0)
    with_side, same_transfer, as_many_in_all = (
        np.mean([after_side_users(planted, seed, *steps) for seed in (1, 2, 3)], 0)
        for steps in ((300, 160), (0, 160), (0, 460)))
    assert with_side[0] < 0.75 * same_transfer[0]
    assert with_side[1] < 0.9 * as_many_in_all[1]
