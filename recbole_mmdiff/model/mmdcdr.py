"""MMDCDR: a multi-modal diffusion model for cross-domain recommendation."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.diffusion import (
    MLPDenoiser,
    diffusion_loss,
    dpm_solver_plan,
    drop_condition,
    fold_in,
    guided_noise,
    keyed_antithetic_steps,
    keyed_normal,
    keyed_uniform,
    linear_schedule,
    q_sample,
    run_plan,
)
from recbole_mmdiff.model.base import Stage
from recbole_mmdiff.model.contrastive import modality_contrastive_loss
from recbole_mmdiff.model.mapping import perceptron
from recbole_mmdiff.model.profile_recommender import ProfileRecommender

# What the numbers drawn for a user are for: each purpose has a stream of its own.
_STEPS, _NOISE, _DROP, _START = range(4)


class Modal(NamedTuple):
    """Vectors of the same users or items in each modality (b, k), and who has them (b,)."""

    vectors: list[Tensor]
    present: list[Tensor]


class MMDCDR(ProfileRecommender):
    """..."""

    citation = ("Multi-Modal Diffusion Model for Cross-Domain Recommendation. Anonymous manuscript, "
                "2025.")

    def __init__(self, config, dataset):
        size = config["embedding_size"]
        super().__init__(config, dataset, size)
        self.epochs, self.diffusion_epochs = config["epochs"], config["diffusion_epochs"]
        self.diffusion_learning_rate = config["diffusion_learning_rate"]
        self.diffusion_batch_size = config["diffusion_batch_size"]
        self.use_diffusion = config["use_diffusion"]
        self.guidance_scale = config["guidance_scale"]
        self.drop_probability = config["condition_drop_probability"]
        self.sampling_noise, self.num_samples = config["sampling_noise"], config["num_samples"]
        self.contrastive_weight = config["contrastive_weight"]
        self.align_weight = config["align_weight"]
        self.temperature = config["temperature"]
        self.schedule = linear_schedule(config["num_steps"], config["beta_start"], config["beta_end"],
                                        rescale=config["rescale_schedule"])
        self.plan = dpm_solver_plan(self.schedule, config["num_evaluations"], config["solver_order"])
        target, source = self.domains["target"], self.domains["source"]
        self.names = list(target.profile_sizes)
        sizes = [(source.profile_sizes[name], target.profile_sizes[name]) for name in self.names]
        hidden = [config["hidden_size"]] * config["num_layers"]
        # By position: any text may be the name of a modality.
        self.denoisers = nn.ModuleList(
            MLPDenoiser(k, condition, tuple(hidden), config["time_embedding_size"],
                        config["hidden_activation"], keep_input=True)
            if self.use_diffusion else perceptron([condition, *hidden, k], nn.SiLU, True)
            for condition, k in sizes)
        self.alignments = nn.ModuleList(perceptron([k, size, size], nn.SiLU, True) for _, k in sizes)
        self.item_layers = nn.ModuleList(nn.Linear(k, size) for k in target.item_sizes.values())
        self.user_fusion = nn.Linear(len(self.alignments) * size, size)
        self.item_fusion = nn.Linear(len(self.item_layers) * size, size)

    # ---- training ------------------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        """Section III-F: the diffusions, then alignment, fusion and rating head."""
        heads = [self.alignments, self.item_layers, self.user_fusion, self.item_fusion, self.head]
        parameters = [value for module in heads for value in module.parameters()]
        return [*self.factorization_stages(),
                Stage("diffusion", "overlap_users", (self.diffusion_loss,), self.denoisers.parameters(),
                      self.diffusion_epochs, validates=False, batch_size=self.diffusion_batch_size,
                      learning_rate=self.diffusion_learning_rate, weight_decay=0.0,
                      prepare=self.fit_profiles),
                Stage("rating", self.rating_data, (self.rating_loss,), parameters, self.epochs,
                      by_user=True, prepare=self.fit_profiles)]

    def diffusion_loss(self, interaction) -> Tensor:
        """Eq. 7 of a batch of overlapping users, summed over modalities."""
        user = interaction[self.USER_ID]
        return sum(self._modality_loss(number, user) for number in range(len(self.names)))

    def _modality_loss(self, number: int, user: Tensor) -> Tensor:
        x0, has_target = self.domains["target"].profiles(self.names[number], user)
        condition, has_source = self.domains["source"].profiles(self.names[number], user)
        learned = has_target & has_source
        network = self.denoisers[number]
        if not self.use_diffusion:
            losses = (network(condition) - x0).square().mean(-1)
        else:
            step, noise = self._step_and_noise(number, user, x0)
            uniform = keyed_uniform(user, 1, self._seed(_DROP, number))
            x_t = q_sample(x0, noise, *self.schedule.alpha_sigma_at(step))                # Eq. 3
            keep = drop_condition(uniform, self.drop_probability)
            predicted = network(x_t, self._time(step), condition, keep)
            losses = diffusion_loss(predicted, x0, noise, "eps", "mse", "none")           # Eq. 7
        return (losses * learned).sum() / learned.sum().clamp(min=1)

    def _step_and_noise(self, number: int, user: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        step = keyed_antithetic_steps(user, self.schedule.num_steps, self._seed(_STEPS, number))
        return step, keyed_normal(user, x0.shape[1], self._seed(_NOISE, number))

    def _seed(self, purpose: int, number: int) -> int:
        return fold_in(self.seed, self.epoch, purpose, number)

    def _time(self, step):
        """What the network sees of step n of R: from 0, on the scale of 1,000 steps."""
        return (step - 1) * (1000 / self.schedule.num_steps)

    def rating_loss(self, interaction) -> Tensor:
        """L_task + lambda L_cl (Eq. 14) of all target ratings of a batch of users."""
        users, items = (torch.unique(interaction[f]) for f in (self.USER_ID, self.ITEM_ID))
        user_side, item_side = self.modal_users(users), self.modal_items(items)
        loss = self.task_loss(interaction, self.fuse(self.user_fusion, user_side),
                              self.fuse(self.item_fusion, item_side))                     # Eq. 13
        if self.contrastive_weight:
            loss = loss + self.contrastive_weight * sum(modality_contrastive_loss(
                *side, self.temperature) for side in (user_side, item_side))              # Eq. 10
        return loss

    # ---- vectors -------------------------------------------------------------------------------

    def modal_users(self, user: Tensor) -> Modal:
        """Generated and aligned vectors of users (b,) in each modality (Eq. 8)."""
        vectors, present = [], []
        for number, alignment in enumerate(self.alignments):
            profile, has = self.target_profile(number, user)
            vectors.append(alignment(profile) * has[:, None])
            present.append(has)
        return Modal(vectors, present)

    @torch.no_grad()
    def target_profile(self, number: int, user: Tensor) -> tuple[Tensor, Tensor]:
        """(b, k) and (b,): target profiles in a modality, generated or, of users without any source
        row, their own; and who has one."""
        name = self.names[number]
        profile, has = self.domains["target"].profiles(name, user)
        generated = self.in_source[user]
        condition, has_source = self.domains["source"].profiles(name, user)
        if generated.any():
            made = self.generate(number, user[generated], condition[generated])
            profile = profile.index_put((generated,), made)
        return profile, torch.where(generated, has_source, has)

    def generate(self, number: int, user: Tensor, condition: Tensor) -> Tensor:
        """(b, k): x_0 of the diffusion of a modality under conditions (b, c), the mean of samples."""
        network = self.denoisers[number]
        if not self.use_diffusion:
            return network(condition)
        size = self.domains["target"].profile_sizes[self.names[number]]
        # In training fresh noise in each epoch; outside of it the run's, whatever the stage.
        seed = self._seed(_START, number) if self.training else fold_in(self.run_seed, _START, number)
        starts = [keyed_normal(user, size, fold_in(seed, sample)) for sample in range(self.num_samples)] \
            if self.sampling_noise else [condition.new_zeros(len(user), size)]
        count = len(starts)
        with torch.autocast(self.device.type, enabled=False):
            denoise = guided_noise(network, condition.repeat(count, 1), self.guidance_scale,
                                   lambda t: self._time(max(t * self.schedule.num_steps, 1.0)))
            drawn = run_plan(self.plan, denoise, torch.cat(starts))
        return drawn.view(count, len(user), size).mean(0)

    def modal_items(self, item: Tensor) -> Modal:
        """Projected features of items (b,) in each modality (Eq. 1)."""
        vectors, present = [], []
        for name, layer in zip(self.domains["target"].item_sizes, self.item_layers, strict=True):
            values, known = self.domains["target"].items(name)
            vectors.append(layer(values[item]) * known[item, None])
            present.append(known[item])
        return Modal(vectors, present)

    @staticmethod
    def fuse(layer: nn.Linear, side: Modal) -> Tensor:
        """(b, d): Eq. 11."""
        return layer(torch.cat(side.vectors, -1))

    def user_vectors(self, user: Tensor) -> Tensor:
        """(b, d): u^t of users (Eq. 11)."""
        return self.fuse(self.user_fusion, self.modal_users(user))

    def item_vectors(self, item: Tensor) -> Tensor:
        """(b, d): v^t of items."""
        return self.fuse(self.item_fusion, self.modal_items(item))
