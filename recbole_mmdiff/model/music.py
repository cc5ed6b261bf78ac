"""MuSiC: multimodal data and side users for diffusion cross-domain recommendation."""

import logging
from functools import partial

import torch
from torch import Tensor, nn

from recbole_mmdiff.diffusion import (
    VectorUNet,
    ddpm,
    diffusion_loss,
    fold_in,
    keyed_antithetic_steps,
    keyed_noise,
    keyed_normal,
    keyed_uniform,
    q_sample,
)
from recbole_mmdiff.distributed import by_parts
from recbole_mmdiff.errors import ConfigError, at_least, in_words_of, one_of, share
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

    def forward(self, features: Tensor, ids: Tensor | None, seed: int | None) -> Tensor:
        """f (b, size) of features (b, inputs) of users or items; with dropout of these ids (b,) by ``seed``,
        None without."""
        hidden = self.activation(self.hidden(features))
        if self.dropout and seed is not None:
            kept = keyed_uniform(ids, self.hidden_size, seed) >= self.dropout
            hidden = hidden * kept / (1 - self.dropout)
        return self.activation(self.output(hidden))


class MuSiC(ProfileRecommender):
    """A diffusion that first learns the target space from side users, then the transfer to it.

    Perceptrons extract the features of items, f_v, and of users in each domain, f_u (section 3.2).
    A vectorised U-Net predicts f_u of the target out of its noisy form (Eqs. 2-6, section 3.3.3),
    without a condition for side users, who are in the target domain alone (Eq. 11), and under the
    condition of f_u of the source for overlapping users (Eq. 10). The reverse chain from pure noise
    gives a cold-start user's f_u of the target, and the inner product with f_v the rating (Eq. 8).
    Stages: the extractors on the target ratings of side and training users, the diffusion on side
    users, then diffusion and rating error jointly on overlapping users (Eqs. 12-14, section 3.5).

    Users are described by features of their own, such as of their reviews (``user_modalities``), or
    else by the mean features of the items that they have rated in a domain; the log says which.

    Deviations:
        - The first stage is ours: without it the diffusion would learn the space of an untrained
          perceptron. x_0 is detached in the diffusion loss, or the perceptron would make all users
          alike.
        - The reverse step has the mean of the true posterior of x_0; Eq. 6 is that of a network that
          predicts noise, and Eq. 10 trains one that predicts x_0.
        - Stages follow one another, as the text of section 3.5 says; ``joint: True`` is the sum of
          Eq. 14 in one stage.
        - The user of the rating loss is the end of the whole reverse chain, with gradient: what is
          scored later; ``rating_vector: one_step`` is the prediction at its first step.
        - Blocks of the U-Net, and how time and condition enter them: see ``VectorUNet``. Dropout is on
          the hidden layer of the extractors; section 4.1.4 also names one of the prediction module,
          of which the rating is an inner product.
        - With ``user_modalities`` a user without a row has no profile: means of items' features would
          be vectors of another space. The log says how many there are.
        - Several modalities are put side by side; an item or user without one has zeros there. One
          fused vector of an MLLM is one modality (Eq. 1: ``prepare encode --encoder=mllm``).
        - w/o MLLM (``modalities: [], use_ids: True``) has vectors of the base factorisations for
          features, which pass the same perceptrons.
        - Squared norms are means over columns, so that lambda does not depend on their number.
        - Not in the paper, and off with ``paper: True``: biases in the rating head; the vectors of the
          base factorisations beside the modalities; two statistics of the ratings behind each
          profile; standardised profiles of principal components; an extractor of its own for the
          users of each domain; a chain without noise, whose end is the mean of its samples where
          they are Gaussian (``sampling_noise``, or ``num_samples``); betas rescaled to the number of
          steps (unscaled, 10 steps leave 90% of the variance of "pure noise" to the signal).
        - Noise and dropout are drawn by (seed, epoch, user or item), so that they do not depend on the
          batch; a batch is one of users with all their ratings. The best epoch is chosen on
          validation users.
        - Under mixed precision the states of the chain stay in float32.
    """

    citation = ("Zhang, Chen, Li, Wang, Cao, Wei, He, Kou and Wang: Leveraging Multimodal Data and Side "
                "Users for Diffusion Cross-Domain Recommendation. arXiv, 2025.")

    def __init__(self, config, dataset):
        size = config["embedding_size"]
        _check_keys(config)
        super().__init__(config, dataset, size)
        self.epochs, self.feature_epochs = config["epochs"], config["feature_epochs"]
        self.side_epochs = config["side_epochs"]
        self.diffusion_weight = config["diffusion_weight"]
        self.use_side_users = config["use_side_users"] and self._has_side_users(dataset)
        self.joint = config["joint"] and self.use_diffusion and self.use_side_users
        self.side_batch_size = config["side_batch_size"]
        self.rating_vector = one_of("rating_vector", config["rating_vector"], ("chain", "one_step"))
        target = self.domains["target"]
        shape = (config["hidden_size"], size, one_of("activation", config["activation"], ACTIVATIONS),
                 config["dropout_prob"])
        self.item_extractor = FeatureExtractor(sum(target.item_sizes.values()), *shape)
        self.user_extractors = nn.ModuleList(
            FeatureExtractor(inputs, *shape)
            for inputs in self._user_inputs(config["shared_user_extractor"]))
        with in_words_of("unet_sizes, time_embedding_size, unet_activation"):
            self.denoiser = VectorUNet(size, tuple(config["unet_sizes"]), config["time_embedding_size"],
                                       config["unet_activation"])
        if config["compile_networks"]:
            self.denoiser.compile(dynamic=True)

    def _has_side_users(self, dataset) -> bool:
        found = len(dataset.side_users()) > 0
        if not found:
            logging.getLogger().info("side users: there are none, so the diffusion learns from overlapping "
                                     "users alone")
        return found

    def _user_inputs(self, shared: bool) -> list[int]:
        """Columns of the profiles: in both domains, or in the target and in the source."""
        sizes = [sum(self.domains[name].profile_sizes.values()) for name in ("target", "source")]
        if not shared:
            return sizes
        if sizes[0] != sizes[1]:
            raise ConfigError(f"shared_user_extractor: True needs profiles of one size in both domains, but "
                              f"they have {sizes[0]} columns in the target and {sizes[1]} in the source; "
                              f"encode both domains alike, or set it to False")
        return sizes[:1]

    # ---- training ------------------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        """Section 3.5: feature extraction, side users, overlapping users."""
        modules = (self.item_extractor, self.user_extractors, self.head)
        extraction = [value for module in modules for value in module.parameters()]
        stages = [*self.factorization_stages(),
                  Stage("features", "target", (self.feature_loss,), extraction, self.feature_epochs,
                        validates=False, by_user=True, prepare=self.fit_profiles)]
        if self.use_diffusion and self.use_side_users and not self.joint:
            stages.append(Stage("side", "side_users", (self.side_loss,), self.denoiser.parameters(),
                                self.side_epochs, validates=False, batch_size=self.side_batch_size,
                                weight_decay=0.0, prepare=self.fit_profiles))
        data = "target" if self.joint else self.rating_data
        return [*stages, Stage("transfer", data, (self.joint_loss,),
                               [*extraction, *self.denoiser.parameters()], self.epochs, by_user=True,
                               prepare=self.fit_profiles)]

    def feature_loss(self, interaction) -> Tensor:
        """L_rating (Eq. 12) with f_u of the users' own target profiles."""
        rated = self.rated(interaction)
        return self.task_loss(rated, self.user_features("target", rated.users, learning=True),
                              self.item_vectors(rated.items, learning=True))

    def side_loss(self, interaction) -> Tensor:
        """L_dm_us (Eq. 11) of a batch of side users."""
        return self.denoising_loss(interaction[self.USER_ID], None)

    def joint_loss(self, interaction) -> Tensor:
        """lambda L_dm_uo + (1 - lambda) L_rating (Eq. 13) of a batch of users with their ratings, and
        with ``joint`` plus L_dm_us (Eq. 14) of the side users among them."""
        users = torch.unique(interaction[self.USER_ID])
        overlapping, side = users[self.in_source[users]], users[~self.in_source[users]]
        if self.joint and self.rating_users == "overlapping":
            interaction = interaction[self.in_source[interaction[self.USER_ID]]]
        loss = self.rating_loss(interaction) if len(interaction) else 0.0
        if not self.use_diffusion:
            return loss
        loss = (1 - self.diffusion_weight) * loss
        if len(overlapping):
            condition = self.user_features("source", overlapping, learning=True)
            loss = loss + self.diffusion_weight * self.denoising_loss(overlapping, condition)
        if self.joint and len(side):
            loss = loss + self.denoising_loss(side, None)
        return loss

    def rating_loss(self, interaction) -> Tensor:
        """L_rating (Eq. 12) with generated f_u."""
        rated = self.rated(interaction)
        return self.task_loss(rated, self.user_vectors(rated.users, learning=True),
                              self.item_vectors(rated.items, learning=True))

    def denoising_loss(self, user: Tensor, condition: Tensor | None) -> Tensor:
        """L_dm (Eq. 10) of users (b,) under conditions (b, d), or None (Eq. 11); users without any
        profile in the target are left out."""
        x0 = self.user_features("target", user).detach().float()
        step = keyed_antithetic_steps(user, self.schedule.num_steps, self._seed(_STEPS))
        noise = keyed_normal(user, x0.shape[1], self._seed(_NOISE))
        x_t = q_sample(x0, noise, *self.schedule.alpha_sigma_at(step))                    # Eq. 4
        inputs = x_t, self.network_time(step), *([] if condition is None else [condition])
        predicted = by_parts(self.denoiser, *inputs)
        losses = diffusion_loss(predicted, x0, noise, "x0", "mse", "none")
        target = self.domains["target"]
        known = torch.stack([target.profiles(name, user)[1] for name in target.profile_sizes]).any(0)
        return (losses * known).sum() / known.sum().clamp(min=1)

    def _seed(self, purpose: int) -> int:
        return fold_in(self.seed, self.epoch, purpose)

    # ---- vectors -------------------------------------------------------------------------------

    def user_features(self, name: str, user: Tensor, learning: bool = False) -> Tensor:
        """(b, d): f_u of users (b,) in a domain (section 3.2)."""
        domain = self.domains[name]
        profiles = torch.cat([domain.profiles(modality, user)[0] for modality in domain.profile_sizes], -1)
        extractor = self.user_extractors[0 if name == "target" else -1]     # Shared: there is one.
        return extractor(profiles, user, self._seed(_USER_DROP) if learning else None)

    def item_vectors(self, item: Tensor, learning: bool = False) -> Tensor:
        """(b, d): f_v of target items (b,) (section 3.2)."""
        features = torch.cat([self.item_features(name, item, learning)[0]
                              for name in self.domains["target"].item_sizes], -1)
        return self.item_extractor(features, item, self._seed(_ITEM_DROP) if learning else None)

    def vectors_from_features(self, features: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """(b, d): f_v of items by their features."""
        values = torch.cat([values for values, _ in features.values()], -1)
        return self.item_extractor(values, None, None)

    def user_vectors(self, user: Tensor, learning: bool = False) -> Tensor:
        """(b, d): f_u of the target of users (b,): generated, and of users without a source row that of
        their own profile."""
        vectors = self.user_features("target", user, learning)
        transferred = self.in_source[user]
        if not transferred.any():
            return vectors
        condition = self.user_features("source", user[transferred], learning)
        generated = partial(self.generated, learning=learning)
        made = by_parts(generated, user[transferred], condition) if self.use_diffusion else condition
        return vectors.index_put((transferred,), made.to(vectors.dtype))

    def vectors_from_profiles(self, user: Tensor, profiles: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """(b, d): f_u of the target generated from source profiles."""
        features = torch.cat([values for values, _ in profiles.values()], -1)
        condition = self.user_extractors[-1](features, user, None)
        return self.generated(user, condition) if self.use_diffusion else condition

    def generated(self, user: Tensor, condition: Tensor, learning: bool = False) -> Tensor:
        """(b, d): the end of the reverse chain under conditions (b, d) (section 3.3.4), with gradient;
        with ``learning`` one sample with the noise of this epoch, else the mean of ``num_samples``."""
        count = 1 if learning or not self.sampling_noise else self.num_samples
        keys = torch.cat([user + sample * self.n_users for sample in range(count)])
        conditions = condition.repeat(count, 1)
        seed = self._seed(_CHAIN) if learning else fold_in(self.run_seed, _CHAIN)

        noise = keyed_noise(keys, seed) if self.sampling_noise else lambda _, x: torch.zeros_like(x)

        def denoise(x: Tensor, t: float) -> Tensor:
            return self.denoiser(x, self.network_time(t * self.schedule.num_steps), conditions).float()

        start = noise(-1, conditions.detach().float())
        if learning and self.rating_vector == "one_step":
            return denoise(start, 1.0)
        drawn = ddpm(denoise, start, self.schedule, noise, parametrisation="x0")
        return drawn.view(count, len(user), -1).mean(0)


def _check_keys(config) -> None:
    at_least("side_batch_size", config["side_batch_size"], 1)
    share("dropout_prob", config["dropout_prob"], below_one=True)
    share("diffusion_weight", config["diffusion_weight"])
