"""CCDRec: curriculum conditioned diffusion, plugged into a multimodal recommender."""

import math
from functools import partial

import torch
from torch import Tensor

from recbole_mmdiff.data.loaders import SAMPLE_ID
from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.diffusion import (
    TokenAttention,
    ddpm,
    diffusion_loss,
    fold_in,
    keyed_noise,
    keyed_normal,
    keyed_uniform,
    linear_schedule,
    q_sample,
)
from recbole_mmdiff.distributed import by_parts
from recbole_mmdiff.errors import ConfigError, at_least, in_words_of, one_of, share
from recbole_mmdiff.model.backbone import Backbone
from recbole_mmdiff.model.base import take
from recbole_mmdiff.model.negative_sampling import Curriculum, Negatives, Rows
from recbole_mmdiff.model.pairwise import PairwiseRecommender, Projected, Triples, bpr_loss
from recbole_mmdiff.model.registry import MODELS, get_model
from recbole_mmdiff.model.representations import Representations

#: how the negatives of the pools are scheduled: the paper's, its ablation DMA+NDI, and DMA alone
SCHEDULES = ("curriculum", "last", "none")
ROWS_AT_ONCE = 2**14


class CCDRec(PairwiseRecommender):
    """A diffusion that aligns item embeddings with their modalities, and negatives out of its steps.

    The backbone (``backbone``) has two parts in its item vectors, h = h hat + h tilde (see
    ``Backbone``). Diffusion-controlled multimodal aligning (DMA): the item embedding e is noised
    (Eq. 1), a token-attention estimator f predicts it from the noised one, the projected modalities
    and the time, L_dm is its squared error (Eq. 5), and the fused representation
    (1 - mu) h hat + mu f takes the place of h hat. After each epoch the reverse process runs for all
    items, from e noised to step T: its end stands for f in scores. Negative-sensitive diffusive
    inferring (NDI): its states after T/4, T/2, 3T/4 and T steps are pools of negatives (Eq. 6), the
    first the easiest. Curricular negative sampler (CNS): of a random tenth of the items, one of the
    tenth most similar to the positive in the epoch's pool (Eq. 7). The loss weighs BPR against random
    and against curricular negatives, and L_dm (Eqs. 8 and 9), beside what the backbone adds to BPR.

    ``pool_schedule``: ``curriculum``; ``last``, always the last pool (the ablation DMA + NDI); ``none``,
    random negatives instead (DMA). ``diffused_weight: 0`` leaves the backbone's items as they are.

    Deviations:
        - The reverse step has the true posterior mean of a network that predicts data. The paper's Eq. 3
          is the one of a network that predicts noise; its code has the true one, too. Eqs. 1 to 3
          write alpha_t for the product alpha-bar_t.
        - Betas (1e-4 .. 0.02) are not rescaled with T, as in the authors' code, and inference starts
          from the noised embedding, not from pure noise.
        - In epoch 0 there is no pool yet: curricular negatives are random there. n of Eq. 7 counts
          epochs from 0, so that the first pool serves one epoch less than the others; with
          ``reference: code`` it serves as many, and the others come an epoch later.
        - After tau_end "final representations" are those of the last epoch's end, as the pools are.
        - ``reference: code`` also feeds the fused representation into the graph of users and items, in
          place of the item embedding; the paper's text adds it to that graph's output only.
        - While training, the fused representation is that of the batch's items (positive and negative
          ones), as only these are noised.
        - Training positives alone are kept out of the negatives. Candidates are drawn without
          replacement.
        - Sums over rows are means, so that weights do not depend on the batch size; L_dm is also a mean over
          the dimensions, as in the authors' code, so that lambda is the code's.
        - What the backbone adds to BPR is of the positive and the random negatives.
    """

    citation = ("Yang, Ma, Meng, Xu, Xie and Meng: Curriculum Conditioned Diffusion for Multimodal "
                "Recommendation. AAAI 2025.")

    draws_negatives = False     # Its backbone's sampler serves both.

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.backbone = self.backbone_class(config["backbone"])(config, dataset)
        self.negatives = self.backbone.negatives
        self.reference = one_of("reference", config["reference"], ("paper", "code"))
        self.pool_schedule = one_of("pool_schedule", config["pool_schedule"], SCHEDULES)
        for key in ("diffused_weight", "curricular_weight"):
            share(key, config[key])
        self.mu, omega, easy = config["diffused_weight"], config["curricular_weight"], config["num_negatives"]
        weights = torch.tensor([(1 - omega) / easy] * easy + [omega])
        self.register_buffer("negative_weights", weights, persistent=False)
        self.diffusion_weight = config["diffusion_weight"]
        at_least("diffusion_weight", self.diffusion_weight, 0)
        with in_words_of("num_steps, beta_start, beta_end, embedding_size"):
            self.schedule = linear_schedule(config["num_steps"], config["beta_start"], config["beta_end"],
                                            rescale=False)
            self.estimator = TokenAttention(self.size)
        self.curriculum = Curriculum(config["curriculum_interval"], config["curriculum_end"],
                                     first=self.reference == "code")
        if self.negatives.needs_vectors:
            raise ConfigError(f"negative_sampler: {self.negatives.name!r}: of CCDRec it draws the easy "
                              f"negatives; use uniform or popularity")
        self.register_buffer("aligned", self.backbone.item_embedding.weight.detach().clone())
        self.pools: Tensor | None = None

    @staticmethod
    def backbone_class(name) -> type[Backbone]:
        """The class of a backbone by its name.

        Raises:
            ConfigError: there is no such model, or it is none.
        """
        if not isinstance(name, str):
            raise ConfigError(f"backbone: {name!r} is no name of a model, write for instance FREEDOM (MG is "
                              f"FREEDOM with mirror_interval: 3)")
        with in_words_of("backbone"):
            found = get_model(name)
        if not issubclass(found, Backbone):
            known = [model for model in MODELS if issubclass(get_model(model), Backbone)]
            raise ConfigError(f"backbone: {name!r} cannot carry CCDRec, use one of {known}, or a class of "
                              f"your own that extends recbole_mmdiff.model.backbone.Backbone")
        return found

    def outdate(self) -> None:
        """Pools go, too; the next epoch infers them."""
        super().outdate()
        self.pools = None

    # ---- the loss ------------------------------------------------------------------------------

    def before_epoch(self, epoch: int) -> None:
        """The backbone's; after a resume also the pools, out of the weights of the epoch before."""
        self.backbone.seed, self.backbone.epoch = self.seed, epoch
        self.backbone.before_epoch(epoch)
        if epoch and self.pools is None:
            self.infer(epoch - 1)

    def after_epoch(self, epoch: int) -> None:
        """The backbone's, and the inference phase."""
        self.backbone.after_epoch(epoch)
        self.infer(epoch)

    def ranking_loss(self, interaction) -> Tensor:
        """L = (1 - omega) L_bpr^r + omega L_bpr^c + lambda L_dm (Eq. 9), and what the backbone adds."""
        rows = Rows(interaction[self.USER_ID], interaction[self.ITEM_ID], interaction[SAMPLE_ID],
                    self.seed, self.epoch)
        easy = self.negatives.draw(interaction, None, self.seed, self.epoch).items
        negatives, weights = easy, None
        if self.pool_schedule != "none":
            negatives = torch.cat([easy, self.curricular_items(rows)], 1)
            weights = self.negative_weights
        items = torch.unique(torch.cat([rows.positives[:, None], negatives], 1))
        projected = Projected(items, by_parts(self.backbone.features.project, items))
        predicted, diffusion = self.denoised(
            projected, fold_in(self.seed, self.epoch, 10, int(rows.samples[0])))
        tables = self.joined(items, predicted)
        vectors = Triples(rows.users, rows.positives, Negatives(negatives)).vectors(tables)
        loss = bpr_loss(*vectors, weights) + self.diffusion_weight * diffusion
        batch = Triples(rows.users, rows.positives, Negatives(easy), projected)
        return loss + self.backbone.auxiliary_loss(
            batch, vectors._replace(negatives=vectors.negatives[:, :easy.shape[1]]))

    def curricular_items(self, rows: Rows) -> Tensor:
        """(b, 1): negatives out of the epoch's pool (CNS); random ones before there are pools."""
        if self.pools is None:
            return self.negatives.unknown.draw(rows.users, rows.uniforms(4, 1))
        number = Curriculum.HARDEST if self.pool_schedule == "last" else self.curriculum.pool(rows.epoch)
        return self.negatives.from_pool(self.pools[number], rows, 1)

    # ---- the diffusion (DMA) -------------------------------------------------------------------

    def denoised(self, projected: Projected, seed: int) -> tuple[Tensor, Tensor]:
        """The estimate f (u, d) of the embeddings of distinct items (u,), each noised to a step of its
        own (Eq. 1), and L_dm (Eq. 5)."""
        items = projected.items
        embedding = take(self.backbone.item_embedding.weight, items)
        uniform = keyed_uniform(items, 1, fold_in(seed, 0), torch.float64)[:, 0]
        step = 1 + (uniform * self.schedule.num_steps).long()
        noise = keyed_normal(items, self.size, fold_in(seed, 1), embedding.dtype)
        noised = q_sample(embedding, noise, *self.schedule.alpha_sigma_at(step, embedding.dtype))
        predicted = by_parts(self.estimator, noised, (step - 1).to(embedding.dtype), projected.features,
                             self.backbone.features.present[items])
        return predicted, diffusion_loss(predicted, embedding, noise, "x0", "mse")

    def joined(self, items: Tensor, predicted: Tensor) -> Representations:
        """The vectors of all users and items, where those of distinct ``items`` (b,) are fused with f
        (b, d)."""
        higher = self.backbone.higher_items()
        fused = torch.lerp(take(higher, items), predicted.to(higher.dtype), self.mu)
        return self._with_items(torch.index_copy(higher, 0, items, fused))

    def _with_items(self, fused: Tensor) -> Representations:
        """The backbone's vectors with ``fused`` (n_items, d) in the place of h hat."""
        start = fused if self.reference == "code" else self.backbone.item_embedding.weight
        return self.backbone.join(self.backbone.collaborative(start), fused)

    # ---- inference: aligned representations and pools (NDI) ------------------------------------

    @torch.no_grad()
    def infer(self, epoch: int) -> None:
        """The reverse process for all items after an epoch: ``aligned`` (n_items, d), its end, and
        ``pools`` (5, n_items, d), its states after T/4, T/2, 3T/4 and T steps, and the final items."""
        training = self.training
        self.eval()
        items = torch.arange(self.n_items, device=self.device)
        seed = fold_in(self.seed, epoch, 11)
        states = torch.cat([by_parts(partial(self._reversed, seed=seed), part)
                            for part in items.split(ROWS_AT_ONCE)]).movedim(1, 0)
        self.aligned.copy_(states[-1])
        self.pools = torch.cat([states, self.representations().items[None]])
        self.train(training)

    def _reversed(self, items: Tensor, seed: int) -> Tensor:
        """(b, 4, d): the states of items (b,) on their way back from step T."""
        features, embedding = self.backbone.features, self.backbone.item_embedding.weight[items]
        static = self.estimator.static(features.project(items), features.present[items])
        return self._states(items, embedding, static, seed)

    def _states(self, keys: Tensor, embedding: Tensor, static, seed: int) -> Tensor:
        """(b, 4, d): the states of items with these start vectors (b, d), noise being drawn by ``keys``."""
        steps = self.schedule.num_steps
        kept = [math.ceil(quarter * steps / 4) for quarter in range(1, 5)]
        states, noise = {}, keyed_noise(keys, seed)

        def keep(done: int, x: Tensor) -> None:
            if done in kept:
                states[done] = x

        start = q_sample(embedding, noise(-1, embedding), self.schedule.alpha(1.0), self.schedule.sigma(1.0))
        ddpm(lambda x, t: self.estimator.attend(x, t * steps - 1, static), start, self.schedule, noise,
             parametrisation="x0", callback=keep)
        return torch.stack([states[done] for done in kept], 1)

    def representations(self) -> Representations:
        """The vectors that score: every item fused with its aligned representation."""
        return self._with_items(self.fused_items())

    @torch.no_grad()
    def vectors_of_new_items(self, items: NewItems) -> tuple[Tensor, Tensor]:
        """Of items outside of the training: e^f of the backbone's h hat (``Backbone.higher_of_new_items``)
        and of the end of the reverse process under their features, from a start vector of 0. All of them
        have one noise, that of an id behind the last, so that none depends on which others there are."""
        higher, features = self.backbone.higher_of_new_items(items), self.backbone.features
        static = self.estimator.static(features.project_new(items), features.present_of(items))
        keys = torch.full((len(items),), self.n_items, device=higher.device)
        aligned = self._states(keys, torch.zeros_like(higher), static, fold_in(self.seed, 11))[:, -1]
        fused = torch.lerp(higher, aligned, self.mu)
        start = fused if self.reference == "code" else torch.zeros_like(fused)
        return self.backbone.joined_alone(start, fused)

    def fused_items(self) -> Tensor:
        """e^f (n_items, d) of all items, out of their aligned representations."""
        higher = self.backbone.higher_items()
        return torch.lerp(higher, self.aligned.to(higher.dtype), self.mu)
