"""MMDCDR: a multi-modal diffusion model for cross-domain recommendation."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recbole_mmdiff.diffusion import (
    ACTIVATIONS,
    MLPDenoiser,
    diffusion_loss,
    dpm_solver_plan,
    drop_condition,
    fold_in,
    guided_noise,
    keyed_antithetic_steps,
    keyed_normal,
    keyed_uniform,
    q_sample,
    run_plan,
)
from recbole_mmdiff.distributed import by_parts
from recbole_mmdiff.errors import ConfigError, at_least, in_words_of, one_of, share
from recbole_mmdiff.model.base import Stage
from recbole_mmdiff.model.contrastive import modality_contrastive_loss
from recbole_mmdiff.model.mapping import perceptron
from recbole_mmdiff.model.profile_recommender import ProfileRecommender

# What the numbers drawn for a user are for: each purpose has a stream of its own.
_STEPS, _NOISE, _DROP, _START = range(4)


class Modal(NamedTuple):
    """Vectors (b, k) of the same users or items in each modality, and who has them (b,)."""

    vectors: list[Tensor]
    present: list[Tensor]


class MMDCDR(ProfileRecommender):
    """One conditional diffusion for each modality generates a user's target profile from the source's.

    A user's profile in a modality is the mean of the projected features of what the user has rated in
    a domain (Eq. 1). A perceptron predicts the noise of a noisy target profile under the condition of
    the source profile (Eqs. 2-5), with classifier-free guidance (Eq. 6); a DPM-Solver draws the
    target profile, and a perceptron aligns it (Eq. 8). Modalities are fused by a linear layer, for
    users and items (Eq. 11), and meet in an inner product (Eq. 12). Stage 1 trains the diffusions
    (Eq. 7), stage 2 alignment, item projections and fusion on the rating error plus a contrastive loss
    between the modalities of users and of items (Eqs. 9, 10, 13, 14). Text and image are not special:
    there may be any number of modalities.

    Deviations:
        - W_m of Eq. 1, on the users' side, are the principal axes of the item features of both
          domains, and stay as they are: trained by Eq. 7 they would fall to zero, where noise is
          predicted without error. Items have projections of their own, learned in stage 2.
        - The loss of the diffusions is that of the unguided prediction (the paper writes the guided
          one), and a dropped condition is a zero input, before the bias of its layer.
        - Stage 2 runs on generated vectors alone, drawn anew in each epoch and without gradient
          through the solver. A user without source rows has the own target profile in their place.
        - An item without a modality is left out of the profiles and of Eq. 9, and is zero in the
          fusion; so is a user without any such item. More than two modalities: Eq. 9 is averaged
          over the pairs. It is a mean over a batch's distinct users (items), not a sum.
        - Hidden layers have SiLU; the paper names their number, not their activation. The size of what
          is diffused is the number of columns of the profile; alignment maps it to d.
        - The perceptron's output is added to its noisy input (``residual``): where there is little but
          noise, the noise is nearly the input. Without it the samples of our data are 20 times too
          large, since the first steps of the solver magnify an error of the prediction by 150.
        - Betas are those of 1,000 steps rescaled to R, in the paper's form too: it prints none, and
          unscaled ones leave e^-50 of the variance at R = 5,000, which no network comes back from.
        - ``align_weight`` adds the distance of the aligned generated vector to the aligned true
          profile, which the text of section III-D suggests and Eq. 14 lacks; 0 by default.
        - Not in the paper, and off with ``paper: True``: biases in the rating head; the item vectors
          of a base factorisation as one more modality (``use_ids``), in which the profile also holds
          the user's own vector; two statistics of the ratings behind each profile; standardised profiles,
          since the noise has unit scale; the mean of the samples in place of one
          (``sampling_noise: False`` starts the solver at zero, which is the mean of all samples
          where they are Gaussian; or ``num_samples``); fewer principal axes and smaller networks. The
          contrastive loss is off by default: it gained nothing on the data we have.
        - Noise is drawn by (seed, epoch, user), so that it does not depend on the batch; a batch is
          one of users with all their ratings. The best epoch is chosen on validation users.
        - Under mixed precision the solver stays in float32.
    """

    citation = "Multi-Modal Diffusion Model for Cross-Domain Recommendation. Manuscript, 2025."

    def __init__(self, config, dataset):
        size = config["embedding_size"]
        _check_keys(config)
        super().__init__(config, dataset, size)
        self.epochs, self.diffusion_epochs = config["epochs"], config["diffusion_epochs"]
        self.diffusion_learning_rate = config["diffusion_learning_rate"]
        self.diffusion_batch_size = config["diffusion_batch_size"]
        self.guidance_scale = config["guidance_scale"]
        self.drop_probability = config["condition_drop_probability"]
        self.contrastive_weight = config["contrastive_weight"]
        self.align_weight, self.temperature = config["align_weight"], config["temperature"]
        with in_words_of("num_evaluations, solver_order"):
            self.plan = dpm_solver_plan(self.schedule, config["num_evaluations"],
                                        config["solver_order"])
        target, source = self.domains["target"], self.domains["source"]
        self.names = list(target.profile_sizes)
        sizes = [(source.profile_sizes[name], target.profile_sizes[name]) for name in self.names]
        # By position: any text may be the name of a modality.
        self.denoisers = nn.ModuleList(self._network(config, *pair) for pair in sizes)
        self.alignments = nn.ModuleList(perceptron([k, size, size], nn.SiLU, True) for _, k in sizes)
        self.item_layers = nn.ModuleList(nn.Linear(k, size) for k in target.item_sizes.values())
        self.user_fusion = nn.Linear(len(self.alignments) * size, size)
        self.item_fusion = nn.Linear(len(self.item_layers) * size, size)
        if config["compile_networks"]:
            for network in self.denoisers:
                network.compile(dynamic=True)

    def _network(self, config, condition: int, k: int) -> nn.Module:
        """The noise network of a modality, or without diffusion the perceptron in its place."""
        hidden = [config["hidden_size"]] * config["num_layers"]
        activation = one_of("hidden_activation", config["hidden_activation"], ACTIVATIONS)
        if not self.use_diffusion:
            return perceptron([condition, *hidden, k], ACTIVATIONS[activation], True)
        with in_words_of("time_embedding_size"):
            return MLPDenoiser(k, condition, tuple(hidden), config["time_embedding_size"], activation,
                               keep_input=True, residual=config["residual"])

    # ---- training ------------------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        """Section III-F: the diffusions, then alignment, fusion and rating head."""
        heads = (self.alignments, self.item_layers, self.user_fusion, self.item_fusion, self.head)
        parameters = [value for module in heads for value in module.parameters()]
        return [*self.factorization_stages(),
                Stage("diffusion", "overlap_users", (self.profile_loss,), self.denoisers.parameters(),
                      self.diffusion_epochs, validates=False, batch_size=self.diffusion_batch_size,
                      learning_rate=self.diffusion_learning_rate, weight_decay=0.0,
                      prepare=self.fit_profiles),
                Stage("rating", self.rating_data, (self.rating_loss,), parameters, self.epochs,
                      by_user=True, prepare=self.fit_profiles)]

    def profile_loss(self, interaction) -> Tensor:
        """L_DM (Eq. 7) of a batch of overlapping users, summed over modalities; without diffusion the
        squared error of the perceptron that maps source to target profiles."""
        user = interaction[self.USER_ID]
        return sum(self._modality_loss(number, user) for number in range(len(self.names)))

    def _modality_loss(self, number: int, user: Tensor) -> Tensor:
        x0, has_target = self.domains["target"].profiles(self.names[number], user)
        condition, has_source = self.domains["source"].profiles(self.names[number], user)
        losses = by_parts(partial(self._errors, number), user, x0, condition)
        learned = has_target & has_source
        return (losses * learned).sum() / learned.sum().clamp(min=1)

    def _errors(self, number: int, user: Tensor, x0: Tensor, condition: Tensor) -> Tensor:
        """(b,): mean squared error of the predicted noise, or of the predicted profile."""
        if not self.use_diffusion:
            return (self.denoisers[number](condition) - x0).square().mean(-1)
        step = keyed_antithetic_steps(user, self.schedule.num_steps, self._seed(_STEPS, number))
        noise = keyed_normal(user, x0.shape[1], self._seed(_NOISE, number))
        uniform = keyed_uniform(user, 1, self._seed(_DROP, number))
        keep = drop_condition(uniform, self.drop_probability)
        x_t = q_sample(x0, noise, *self.schedule.alpha_sigma_at(step))                    # Eq. 3
        predicted = self.denoisers[number](x_t, self.network_time(step), condition, keep)
        return diffusion_loss(predicted, x0, noise, "eps", "mse", "none")                 # Eq. 7

    def _seed(self, purpose: int, number: int) -> int:
        return fold_in(self.seed, self.epoch, purpose, number)

    def rating_loss(self, interaction) -> Tensor:
        """L_task + lambda L_cl (Eq. 14) of all target ratings of a batch of users."""
        rated = self.rated(interaction)
        user_side, item_side = self.modal_users(rated.users, True), self.modal_items(rated.items, True)
        loss = self.task_loss(rated, self.fused(self.user_fusion, user_side),
                              self.fused(self.item_fusion, item_side))                    # Eq. 13
        if self.contrastive_weight:
            loss = loss + self.contrastive_weight * sum(modality_contrastive_loss(
                *side, self.temperature) for side in (user_side, item_side))              # Eq. 10
        if self.align_weight:
            loss = loss + self.align_weight * self._alignment_loss(rated.users, user_side)
        return loss

    def _alignment_loss(self, user: Tensor, generated: Modal) -> Tensor:
        """Distance of aligned generated vectors to the aligned true profiles, summed over modalities."""
        loss = 0.0
        for number, alignment in enumerate(self.alignments):
            x0, has = self.domains["target"].profiles(self.names[number], user)
            both = has & generated.present[number]
            distance = (generated.vectors[number] - alignment(x0).detach()).square().mean(-1)
            loss = loss + (distance * both).sum() / both.sum().clamp(min=1)
        return loss

    # ---- users ---------------------------------------------------------------------------------

    def modal_users(self, user: Tensor, learning: bool = False) -> Modal:
        """Generated and aligned vectors (b, d) of users (b,) in each modality (Eq. 8)."""
        vectors, present = [], []
        for number, alignment in enumerate(self.alignments):
            profile, has = self.target_profiles(number, user, learning)
            vectors.append(alignment(profile) * has[:, None])
            present.append(has)
        return Modal(vectors, present)

    @torch.no_grad()
    def target_profiles(self, number: int, user: Tensor, learning: bool) -> tuple[Tensor, Tensor]:
        """Target profiles (b, k) of users in a modality, and who has one (b,): generated ones, and of
        users without a source row their own."""
        profile, has = self.domains["target"].profiles(self.names[number], user)
        condition, has_source = self.domains["source"].profiles(self.names[number], user)
        transferred = self.in_source[user]
        if transferred.any():
            generated = partial(self.generated, number, learning=learning)
            made = by_parts(generated, user[transferred], condition[transferred])
            profile[transferred] = made.to(profile.dtype)
        return profile, torch.where(transferred, has_source, has)

    def generated(self, number: int, user: Tensor, condition: Tensor, learning: bool = False) -> Tensor:
        """(b, k): what the diffusion of a modality makes of source profiles (b, c) (section III-D, 5);
        with ``learning`` from the noise of this epoch, else from that of the run."""
        network = self.denoisers[number]
        if not self.use_diffusion:
            return network(condition)
        starts = self._starts(number, user, learning)
        count = len(starts)
        with torch.autocast(self.device.type, enabled=False):
            denoise = guided_noise(network, condition.repeat(count, 1), self.guidance_scale,
                                   self._sampling_time)
            drawn = run_plan(self.plan, denoise, torch.cat(starts))
        return drawn.view(count, len(user), -1).mean(0)

    def _starts(self, number: int, user: Tensor, learning: bool) -> list[Tensor]:
        """States x_R (b, k), one for each sample."""
        size = self.domains["target"].profile_sizes[self.names[number]]
        if not self.sampling_noise:
            return [torch.zeros(len(user), size, device=user.device)]
        seed = self._seed(_START, number) if learning else fold_in(self.run_seed, _START, number)
        return [keyed_normal(user, size, fold_in(seed, sample)) for sample in range(self.num_samples)]

    def _sampling_time(self, t: float) -> float:
        return self.network_time(max(t * self.schedule.num_steps, 1.0))

    def user_vectors(self, user: Tensor, learning: bool = False) -> Tensor:
        """(b, d): u^t of users (Eq. 11)."""
        return self.fused(self.user_fusion, self.modal_users(user, learning))

    def vectors_from_profiles(self, user: Tensor, profiles: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """(b, d): u^t generated from source profiles."""
        vectors, present = [], []
        for number, (name, alignment) in enumerate(zip(self.names, self.alignments, strict=True)):
            condition, has = profiles[name]
            vectors.append(alignment(self.generated(number, user, condition)) * has[:, None])
            present.append(has)
        return self.fused(self.user_fusion, Modal(vectors, present))

    # ---- items ---------------------------------------------------------------------------------

    def modal_items(self, item: Tensor, learning: bool = False) -> Modal:
        """Projected features (b, d) of target items (b,) in each modality (Eq. 1)."""
        return self._projected({name: self.item_features(name, item, learning)
                                for name in self.domains["target"].item_sizes})

    def _projected(self, features: dict[str, tuple[Tensor, Tensor]]) -> Modal:
        vectors = [layer(values) * known[:, None]
                   for layer, (values, known) in zip(self.item_layers, features.values(), strict=True)]
        return Modal(vectors, [known for _, known in features.values()])

    def vectors_from_features(self, features: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """(b, d): v^t of items by their features (Eqs. 1 and 11)."""
        return self.fused(self.item_fusion, self._projected(features))

    def item_vectors(self, item: Tensor, learning: bool = False) -> Tensor:
        """(b, d): v^t of items (Eq. 11)."""
        return self.fused(self.item_fusion, self.modal_items(item, learning))

    @staticmethod
    def fused(layer: nn.Linear, side: Modal) -> Tensor:
        """(b, d): W concat(vectors of the modalities) + b (Eq. 11)."""
        return layer(torch.cat(side.vectors, -1))


def _check_keys(config) -> None:
    for key in ("num_layers", "diffusion_batch_size"):
        at_least(key, config[key], 1)
    share("condition_drop_probability", config["condition_drop_probability"])
    if config["temperature"] <= 0:
        raise ConfigError(f"temperature: {config['temperature']} divides similarities; use a number above 0")
