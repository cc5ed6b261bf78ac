"""DiffCDR: diffusion cross-domain recommendation."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.diffusion import (
    MLPDenoiser,
    VPSchedule,
    diffusion_loss,
    dpm_solver_plan,
    drop_condition,
    fold_in,
    keyed_antithetic_steps,
    keyed_normal,
    keyed_uniform,
    linear_schedule,
    q_sample,
    sample,
    sinusoidal_embedding,
)
from recbole_mmdiff.distributed import by_parts
from recbole_mmdiff.errors import ConfigError, one_of
from recbole_mmdiff.model.base import Stage, take
from recbole_mmdiff.model.mapping import MappingRecommender

# What the numbers drawn for a sample are for: each purpose has a stream of its own.
_STEPS, _NOISE, _DROP, _START = range(4)


class DiffCDR(MappingRecommender):
    """A conditional diffusion generates the target vector of a user from the source vector.

    Two factorisations are trained apart (Algorithm 1, lines 1-2). The diffusion module DIM
    (section 3.1) predicts the noise of a noisy target vector under the condition of the source
    vector, with classifier-free guidance (Eq. 3); a DPM-Solver draws the transferred vector
    (Eq. 4); the alignment module ALM, one linear layer, corrects it (section 3.2) and is trained
    on the distance to the true vector (Eq. 6) plus the rating error (Eq. 7). Each batch updates
    DIM, draws with the new DIM, and updates ALM (Algorithm 1, lines 7-10).

    As in the authors' code the perceptron of DIM has no activation (``hidden_activation: none``).
    DIM, guidance and solver are then one affine map, which is built once a batch and applied
    instead of 30 evaluations of the network, and the layers are multiplied before they meet the
    batch; ``sampling_path: general`` runs layers and solver as they are. Both are equal.

    Deviations:
        - The best epoch is chosen on validation users; the authors' code chooses it on test users,
          for MAE and RMSE apart. Which users are tested follows sorted tokens and the seed, not
          the order of a Python set.
        - Norms in the losses are smooth L1 (n = 1) or mean squares (n = 2), as in the authors'
          code; the paper writes |.|^n.
        - The loss of DIM is that of the masked prediction without guidance, as in the authors'
          code and in the reference of guidance; the paper writes the guided one.
        - The solver runs without gradient: the task loss trains ALM alone.
        - Training and inference start from the source vector (section 4.1 (5) says inference);
          ``x_T: noise`` starts from Gaussian noise, one fixed draw for each user.
        - A user who stands in several rows of a batch is drawn once.
        - The base has biases and an L2 penalty, [p_u, b_u] is transferred, and vectors are
          standardised in each domain, because the noise has unit scale (``biases``,
          ``reg_weight``, ``standardize``; the paper recipe switches them off).
        - Noise is drawn by (seed, epoch, sample), so that it does not depend on the batch. The
          mirrored steps t and T - t (antithetic pairs of the authors' code) belong to neighbouring
          rows, which the shuffling may put into different batches.
        - Eq. 6 is averaged over the rating rows of a batch, as in the authors' code; the paper
          averages over users.
        - Under mixed precision DIM and the solver stay in float32.
    """

    citation = "Xuan: Diffusion Cross-domain Recommendation. arXiv:2402.02182, 2024."

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.epochs = config["epochs"]
        self.dim_weight, self.task_weight = config["dim_weight"], config["task_weight"]
        self.alignment_weight = config["alignment_weight"]
        self.alignment_norm = one_of("alignment_norm", config["alignment_norm"], (1, 2))
        self.guidance_scale = config["guidance_scale"]
        self.drop_probability = config["condition_drop_probability"]
        self.start = one_of("x_T", config["x_T"], ("source", "noise"))
        self.sampling_path = one_of("sampling_path", config["sampling_path"],
                                    ("auto", "general", "affine"))
        self.use_dim = config["use_dim"]
        if config["alignment_weight"] == 0 and config["task_weight"] == 0:
            raise ConfigError("alignment_weight, task_weight: both are 0, so ALM learns nothing")
        self.schedule = linear_schedule(config["num_steps"], config["beta_start"],
                                        config["beta_end"], rescale=True)
        # The continuous schedule of the same betas: beta(t) = 1000 beta_start .. 1000 beta_end.
        continuous = VPSchedule(1000 * config["beta_start"], 1000 * config["beta_end"])
        self.plan = dpm_solver_plan(continuous, config["num_evaluations"], config["solver_order"])
        self.denoiser = MLPDenoiser(self.size, self.size, tuple(config["hidden_sizes"]),
                                    config["time_embedding_size"], config["hidden_activation"])
        self.alm = nn.Linear(self.size, self.size, bias=False)
        # What the network sees of the steps 1 .. T: from 0, on the scale of 1,000 steps.
        times = torch.arange(config["num_steps"]) * (1000 / config["num_steps"])
        self.register_buffer("step_sinusoids", sinusoidal_embedding(
            times, config["time_embedding_size"]), persistent=False)

    def stages(self) -> list[Stage]:
        """Algorithm 1: the two factorisations, then DIM and ALM in turn over rating rows."""
        losses = (self.dim_loss, self.alm_loss) if self.use_dim else (self.alm_loss,)
        parameters = [*self.denoiser.parameters(), *self.alm.parameters()]
        transfer = Stage("transfer", "overlap_ratings", losses, parameters, self.epochs,
                         prepare=self.freeze_spaces)
        return [*self.pretraining_stages(), transfer]

    def _seed(self, purpose: int) -> int:
        return fold_in(self.seed, self.epoch, purpose)

    def dim_loss(self, interaction) -> Tensor:
        """L_DIM (section 3.3) of a batch of rating rows."""
        with torch.autocast(self.device.type, enabled=False):
            return self._dim_loss(interaction)

    def _dim_loss(self, interaction) -> Tensor:
        user, sample_id = interaction[self.USER_ID], interaction["sample_id"]
        x0, condition = self.target_vectors(user), self.source_vectors(user)
        step = keyed_antithetic_steps(sample_id, self.schedule.num_steps, self._seed(_STEPS))
        noise = keyed_normal(sample_id, self.size, self._seed(_NOISE))
        uniform = keyed_uniform(sample_id, 1, self._seed(_DROP))
        keep = drop_condition(uniform, self.drop_probability)
        x_t = q_sample(x0, noise, *self.schedule.alpha_sigma_at(step))           # Eq. 5
        collapse = self.sampling_path != "general" and self.denoiser.is_affine
        network = self.denoiser.composed if collapse else self.denoiser
        predicted = by_parts(network, x_t, self.step_sinusoids.index_select(0, step - 1), condition, keep)
        return self.dim_weight * diffusion_loss(predicted, x0, noise, "eps", "smooth_l1")

    def alm_loss(self, interaction) -> Tensor:
        """L_ALM + lambda L_task (Eqs. 6 and 7) of a batch of rating rows."""
        users, place = torch.unique(interaction[self.USER_ID], return_inverse=True)
        aligned = take(self.alm(by_parts(self.sampled_vectors, users)), place)
        norm = functional.smooth_l1_loss if self.alignment_norm == 1 else functional.mse_loss
        truth = self.target_vectors(interaction[self.USER_ID])
        loss = self.alignment_weight * norm(aligned, truth)                               # Eq. 6
        if self.task_weight:
            with torch.no_grad():
                item = interaction[self.ITEM_ID]
                factors, offset = self.item_factors(item), self.item_offset(item)
            scores = (self.in_target_space(aligned) * factors).sum(-1) + offset
            task = functional.mse_loss(scores, interaction[self.RATING])
            loss = loss + self.task_weight * task                                         # Eq. 7
        return loss

    @torch.no_grad()
    def sampled_vectors(self, user: Tensor) -> Tensor:
        """(b, size): ``sampled`` of users (b,)."""
        return self.sampled(self.source_vectors(user), user)

    @torch.no_grad()
    def sampled(self, condition: Tensor, user: Tensor) -> Tensor:
        """(b, size): x_0 = Solver(eps, x_T, c) under conditions u_s (b, size) of users (b,) (Eq. 4); u_s
        itself without DIM."""
        if not self.use_dim:
            return condition
        start = condition
        if self.start == "noise":
            start = keyed_normal(user, self.size, fold_in(self.seed, _START)).to(condition)
        with torch.autocast(self.device.type, enabled=False):
            return sample(self.denoiser, start, condition, self.plan, self.guidance_scale,
                          self._sampling_time, self.sampling_path)

    def mapped(self, vectors: Tensor, user: Tensor) -> Tensor:
        """(b, size): ALM(x_0)."""
        return self.alm(self.sampled(vectors, user))

    def transferred_vectors(self, user: Tensor) -> Tensor:
        """(b, size): x_0 before ALM, as Figure 4 of the paper shows it."""
        return self.in_target_space(self.sampled_vectors(user))

    def _sampling_time(self, t: float) -> float:
        """The continuous time t in (0, 1] as the network sees the training step n = t T."""
        return 1000 * max(t - 1 / self.schedule.num_steps, 0.0)
