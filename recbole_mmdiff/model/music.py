"""MuSiC: multimodal data and side users for diffusion cross-domain recommendation."""

from functools import partial

import torch
from torch import Tensor, nn

from recbole_mmdiff.diffusion import (
    VectorUNet,
    ddpm,
    diffusion_loss,
    fold_in,
    keyed_antithetic_steps,
    keyed_normal,
    keyed_uniform,
    linear_schedule,
    q_sample,
)
from recbole_mmdiff.errors import ConfigError, one_of
from recbole_mmdiff.model.base import Stage
from recbole_mmdiff.model.profile_recommender import ProfileRecommender

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "softmax": partial(nn.Softmax, dim=-1)}
# What the numbers drawn for a user or an item are for: each purpose has a stream of its own.
_STEPS, _NOISE, _CHAIN, _USER_DROP, _ITEM_DROP = range(5)


class FeatureExtractor(nn.Module):
    """The perceptron of section 3.2: hidden layer and output with the same activation.

    Args:
        inputs, hidden_size, size: of its layers.
        activation: a key of ``ACTIVATIONS``.
        dropout: share of the hidden units that are dropped, drawn by (seed, id).
    """

    def __init__(self, inputs: int, hidden_size: int, size: int, activation: str, dropout: float):
        super().__init__()
        self.dropout, self.hidden_size = dropout, hidden_size
        self.hidden, self.output = nn.Linear(inputs, hidden_size), nn.Linear(hidden_size, size)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, features: Tensor, ids: Tensor, seed: int) -> Tensor:
        """f (b, size) of features (b, inputs) of users or items with these ids (b,)."""
        hidden = self.activation(self.hidden(features))
        if self.training and self.dropout:
            kept = keyed_uniform(ids, self.hidden_size, seed) >= self.dropout
            hidden = hidden * kept / (1 - self.dropout)
        return self.activation(self.output(hidden))


class MuSiC(ProfileRecommender):
    """..."""

    citation = ("Zhang, Chen, Li, Wang, Cao, Wei, He, Kou and Wang: Leveraging Multimodal Data and Side "
                "Users for Diffusion Cross-Domain Recommendation. arXiv, 2025.")

    def __init__(self, config, dataset):
        size = config["embedding_size"]
        super().__init__(config, dataset, size)
        self.epochs, self.feature_epochs = config["epochs"], config["feature_epochs"]
        self.side_epochs = config["side_epochs"]
        self.joint = config["joint"]
        self.diffusion_weight = config["diffusion_weight"]
        self.use_diffusion, self.use_side_users = config["use_diffusion"], config["use_side_users"]
        self.side_batch_size = config["side_batch_size"]
        self.rating_vector = one_of("rating_vector", config["rating_vector"], ("chain", "one_step"))
        self.sampling_noise, self.num_samples = config["sampling_noise"], config["num_samples"]
        self.schedule = linear_schedule(config["num_steps"], config["beta_start"], config["beta_end"],
                                        rescale=config["rescale_schedule"])
        target, source = self.domains["target"], self.domains["source"]
        sizes = {name: sum(domain.profile_sizes.values()) for name, domain in self.domains.items()}
        shape = (config["hidden_size"], size, one_of("activation", config["activation"], ACTIVATIONS),
                 config["dropout_prob"])
        self.item_extractor = FeatureExtractor(sum(target.item_sizes.values()), *shape)
        users = [FeatureExtractor(sizes["target"], *shape)]
        if config["shared_user_extractor"]:
            if sizes["target"] != sizes["source"]:
                raise ConfigError("shared_user_extractor: profiles have other sizes")
        else:
            users.append(FeatureExtractor(sizes["source"], *shape))
        self.user_extractors = nn.ModuleList(users)
        self.denoiser = VectorUNet(size, tuple(config["unet_sizes"]), config["time_embedding_size"],
                                   config["unet_activation"])

    # ---- training ------------------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        """Section 3.5"""
        extractors = [self.item_extractor, self.user_extractors, self.head]
        features = [value for module in extractors for value in module.parameters()]
        prepare = {"prepare": self.fit_profiles}
        stages = [*self.factorization_stages(),
                  Stage("features", "target", (self.feature_loss,), features, self.feature_epochs,
                        validates=False, by_user=True, **prepare)]
        if self.use_diffusion and self.use_side_users and not self.joint:
            stages.append(Stage("side", "side_users", (self.side_loss,), self.denoiser.parameters(),
                                self.side_epochs, validates=False, batch_size=self.side_batch_size,
                                weight_decay=0.0, **prepare))
        return [*stages, Stage("transfer", "target" if self.joint else self.rating_data,
                               (self.joint_loss,), [*features, *self.denoiser.parameters()], self.epochs,
                               by_user=True, **prepare)]

    def feature_loss(self, interaction) -> Tensor:
        users, items = (torch.unique(interaction[f]) for f in (self.USER_ID, self.ITEM_ID))
        return self.task_loss(interaction, self.user_features("target", users), self.item_vectors(items))

    def side_loss(self, interaction) -> Tensor:
        """Eq. 11"""
        return self._diffusion_loss(interaction[self.USER_ID], None)

    def joint_loss(self, interaction) -> Tensor:
        users, items = (torch.unique(interaction[f]) for f in (self.USER_ID, self.ITEM_ID))
        rating = self.task_loss(interaction, self.user_vectors(users), self.item_vectors(items))
        if not self.use_diffusion:
            return rating
        overlapping = users[self.in_source[users]]
        loss = self._diffusion_loss(overlapping, self.user_features("source", overlapping))
        loss = self.diffusion_weight * loss + (1 - self.diffusion_weight) * rating
        side = users[~self.in_source[users]]
        if self.joint and self.use_side_users and len(side):
            loss = loss + self._diffusion_loss(side, None)
        return loss

    def _diffusion_loss(self, user: Tensor, condition: Tensor | None) -> Tensor:
        x0 = self.user_features("target", user).detach().float()
        step = keyed_antithetic_steps(user, self.schedule.num_steps, self._seed(_STEPS))
        noise = keyed_normal(user, x0.shape[1], self._seed(_NOISE))
        x_t = q_sample(x0, noise, *self.schedule.alpha_sigma_at(step))                    # Eq. 4
        predicted = self.denoiser(x_t, self._time(step), condition)
        return diffusion_loss(predicted, x0, noise, "x0", "mse")                          # Eq. 10

    def _seed(self, purpose: int) -> int:
        return fold_in(self.seed, self.epoch, purpose)

    def _time(self, step):
        return (step - 1) * (1000 / self.schedule.num_steps)

    # ---- vectors -------------------------------------------------------------------------------

    def user_features(self, name: str, user: Tensor) -> Tensor:
        """(b, d): f_u of users (b,) in a domain (section 3.2)."""
        domain = self.domains[name]
        profiles = torch.cat([domain.profiles(modality, user)[0] for modality in domain.profile_sizes], -1)
        extractor = self.user_extractors[0 if name == "target" else -1]
        return extractor(profiles, user, self._seed(_USER_DROP))

    def item_vectors(self, item: Tensor) -> Tensor:
        """(b, d): f_v of items (b,) of the target."""
        target = self.domains["target"]
        features = torch.cat([target.items(name)[0][item] for name in target.item_sizes], -1)
        return self.item_extractor(features, item, self._seed(_ITEM_DROP))

    def user_vectors(self, user: Tensor) -> Tensor:
        """(b, d)"""
        vectors = self.user_features("target", user)
        generated = self.in_source[user]
        if not generated.any():
            return vectors
        condition = self.user_features("source", user[generated])
        made = self.generate(user[generated], condition) if self.use_diffusion else condition
        return vectors.to(made.dtype).index_put((generated,), made)

    def generate(self, user: Tensor, condition: Tensor) -> Tensor:
        """(b, d): x_0"""
        seed = self._seed(_CHAIN) if self.training else fold_in(self.run_seed, _CHAIN)
        count = self.num_samples if self.sampling_noise and not self.training else 1
        keys = torch.cat([user + sample * self.n_users for sample in range(count)])
        conditions = condition.repeat(count, 1)

        def noise(step: int, x: Tensor) -> Tensor:
            if not self.sampling_noise:
                return torch.zeros_like(x)
            return keyed_normal(keys, x.shape[1], fold_in(seed, step))

        def denoise(x: Tensor, t: float) -> Tensor:
            return self.denoiser(x, self._time(t * self.schedule.num_steps), conditions).float()

        start = noise(-1, torch.empty(len(keys), condition.shape[1], device=condition.device))
        if self.training and self.rating_vector == "one_step":
            return denoise(start, 1.0)
        drawn = ddpm(denoise, start, self.schedule, noise, parametrisation="x0")
        return drawn.view(count, len(user), -1).mean(0)
