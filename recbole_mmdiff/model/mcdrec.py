"""MCDRec: item embeddings denoised under their modalities, and a graph denoised by them."""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from recbole_mmdiff.diffusion import (
    ConvUNet,
    ddpm,
    diffusion_loss,
    fold_in,
    keyed_antithetic_steps,
    keyed_noise,
    keyed_normal,
    keyed_uniform,
    linear_schedule,
    q_sample,
)
from recbole_mmdiff.distributed import by_parts
from recbole_mmdiff.errors import at_least, in_words_of, share
from recbole_mmdiff.graph import Edges, bipartite_adjacency, similarities
from recbole_mmdiff.model.backbone import Backbone
from recbole_mmdiff.model.base import take
from recbole_mmdiff.model.pairwise import Triples, Vectors, mean_square
from recbole_mmdiff.model.representations import Representations, lightgcn
from recbole_mmdiff.model.user_item_graph import distinct_edges, kept_edges

#: what is drawn, each by a seed of its own
_EDGES, _ITEMS, _STEPS, _NOISE, _MAPS, _UNITS, _REVERSE = range(20, 27)
ROWS_AT_ONCE = 2**12


class MCDRec(Backbone):
    """LightGCN on items that a diffusion has denoised, and on a graph weighted by what it made of them.

    Representation: an item's embedding e is noised to a step of ``num_steps``, and a convolutional U-Net
    predicts it from the noised one, the projected modalities and the time; L_dm is the squared error.
    The item's start vector in LightGCN is a perceptron of [w e^ + (1 - w) e, projected modalities], with
    e^ the prediction while training, and the end of a whole reverse process, which is run after each
    epoch, in evaluation; w = ``denoised_share``. What scores is LightGCN's output, plus e for items.

    Graph: an epoch keeps ``1 - dropout`` of the edges with probability 1 / sqrt(d_u d_i), and weighs
    them by 1 + ``temperature`` * cos(user's start vector, e^ of the last reverse process), before the
    normalisation. The first epoch takes e for e^. The whole graph, without weights, serves for evaluation.

    The loss is BPR + ``denoising_weight`` * L_dm + ``reg_weight`` times half the squared length of the
    batch's vectors.

    Deviations:
        - The loss is BPR's. The authors' code exists on top of BM3, whose loss has no negatives, so
          that hard negatives, CCDRec's too, would have no place there.
        - ``predicted_items`` items, drawn for each batch, are noised and predicted in it; e^ of the
          others is that of the last reverse process. The authors' code predicts all items in every
          batch (0 does), which takes most of the time with many of them.
        - What the U-Net is made of: see ``ConvUNet``. Its dropout drops whole maps.
        - A modality that an item lacks is a channel of zeros, and zeros in the perceptron's input.
        - Betas (1e-4 .. 0.02) are not rescaled with T, as in the authors' code, and the reverse process
          starts from the noised embedding, not from pure noise.
        - Steps come in pairs t and T + 1 - t. Edges, items, steps, noise and dropout are drawn by (seed,
          epoch, batch), so that a resumed run draws them again.
        - Features are frozen (``train_features: False``).
        - A user without a training row gets the mean vector of the others.
    """

    citation = ("Ma, Yang, Meng, Xie and Meng: Multimodal Conditioned Diffusion Model for Recommendation. "
                "Companion Proceedings of the ACM Web Conference 2024.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        _check_keys(config)
        self.num_layers, self.reg_weight = config["num_layers"], config["reg_weight"]
        self.dropout, self.temperature = config["dropout"], config["temperature"]
        self.denoised_share, self.denoising_weight = config["denoised_share"], config["denoising_weight"]
        self.num_predicted = min(config["predicted_items"] or self.n_items, self.n_items - 1)
        modalities = len(self.features.names)
        with in_words_of("num_steps, beta_start, beta_end"):
            self.schedule = linear_schedule(config["num_steps"], config["beta_start"], config["beta_end"],
                                            rescale=False)
        with in_words_of("embedding_size, unet_channels, unet_multipliers, unet_blocks"):
            self.network = ConvUNet(self.size, modalities, config["unet_channels"],
                                    tuple(config["unet_multipliers"]), config["unet_blocks"],
                                    dropout=config["dropout_prob"])
        self.perceptron = Perceptron([(1 + modalities) * self.size, *config["hidden_sizes"], self.size],
                                     config["dropout_prob"])
        self.register_buffer("denoised", self.item_embedding.weight.detach().clone())
        edges = distinct_edges(dataset)
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("adjacency", bipartite_adjacency(*edges, self.n_users, self.n_items),
                             persistent=False)
        self.epoch_adjacency: Tensor | None = None
        self.batch, self._loss = 0, 0.0

    # ---- what comes once an epoch --------------------------------------------------------------

    def outdate(self) -> None:
        """The epoch's graph goes, too; the next epoch makes another."""
        super().outdate()
        self.epoch_adjacency = None

    @torch.no_grad()
    def before_epoch(self, epoch: int) -> None:
        """Draw the edges of the epoch, and weigh them."""
        self.batch = 0
        edges = kept_edges(self.edges, self.n_users, self.n_items, self.dropout,
                           fold_in(self.seed, epoch, _EDGES))
        self.epoch_adjacency = bipartite_adjacency(*edges, self.n_users, self.n_items, self.weights(*edges))

    def weights(self, users: Tensor, items: Tensor) -> Tensor:
        """(e,): 1 + temperature * cos(user, denoised item) of edges (e,)."""
        nodes = torch.cat([self.user_embedding.weight, self.denoised])
        pairs = Edges(users, items + self.n_users, self.denoised.new_empty(0))
        return 1 + self.temperature * similarities(nodes, pairs)

    @torch.no_grad()
    def after_epoch(self, epoch: int) -> None:
        """``denoised`` (n_items, d): the reverse process of all items."""
        reverse = partial(self.reverse, seed=fold_in(self.seed, epoch, _REVERSE))
        for items in torch.arange(1, self.n_items, device=self.device).split(ROWS_AT_ONCE):
            self.denoised[items] = by_parts(reverse, items)

    def reverse(self, items: Tensor, seed: int) -> Tensor:
        """(b, d): the end of the reverse process of distinct items (b,), from e noised to step T."""
        embedding, conditions = self.item_embedding.weight[items], self.features.project(items)
        steps, noise = self.schedule.num_steps, keyed_noise(items, seed)
        start = q_sample(embedding, noise(-1, embedding), self.schedule.alpha(1.0), self.schedule.sigma(1.0))
        return ddpm(lambda x, t: self.network(x, t * steps, conditions), start, self.schedule, noise,
                    parametrisation="x0")

    # ---- representations -----------------------------------------------------------------------

    def higher_items(self) -> Tensor:
        """e: (n_items, d)."""
        return self.item_embedding.weight

    def collaborative(self, items: Tensor) -> Representations:
        """LightGCN's users and items, on the epoch's graph while training."""
        conditions = self.features.project_all()
        denoised, uniforms, adjacency = self.denoised, None, self.adjacency
        if self.training:
            denoised = self.predicted(conditions)
            uniforms = self._uniforms(torch.arange(self.n_items, device=self.device),
                                      self.perceptron.num_hidden, _UNITS)
            adjacency = adjacency if self.epoch_adjacency is None else self.epoch_adjacency
            self.batch += 1
        start = torch.cat([torch.lerp(items, denoised, self.denoised_share),
                           conditions.flatten(1).to(items.dtype)], 1)
        start = self.perceptron(start, uniforms).to(items.dtype)
        return lightgcn(adjacency, self.user_embedding.weight, start, self.num_layers)

    def predicted(self, conditions: Tensor) -> Tensor:
        """(n_items, d): e^ of the batch's items, predicted under ``conditions`` (n_items, m, d); of
        others that of the last reverse process. Leaves L_dm for ``auxiliary_loss``."""
        drawn = self._uniforms(torch.arange(1, self.n_items, device=self.device), 1, _ITEMS)[:, 0]
        items = 1 + drawn.argsort(stable=True)[:self.num_predicted]
        embedding = take(self.item_embedding.weight, items)
        steps = keyed_antithetic_steps(torch.arange(len(items), device=self.device),
                                       self.schedule.num_steps, self._seed(_STEPS))
        noise = keyed_normal(items, self.size, self._seed(_NOISE), embedding.dtype)
        noised = q_sample(embedding, noise, *self.schedule.alpha_sigma_at(steps, embedding.dtype))
        predicted = by_parts(self.network, noised, steps.to(noised.dtype), conditions[items],
                             self._uniforms(items, self.network.num_maps, _MAPS)).to(noised.dtype)
        self._loss = diffusion_loss(predicted, embedding, noise, "x0", "mse")
        return self.denoised.index_copy(0, items, predicted)

    def _seed(self, purpose: int) -> int:
        return fold_in(self.seed, self.epoch, purpose, self.batch)

    def _uniforms(self, items: Tensor, count: int, purpose: int) -> Tensor:
        return keyed_uniform(items, count, self._seed(purpose))

    # ---- the loss ------------------------------------------------------------------------------

    def auxiliary_loss(self, batch: Triples, vectors: Vectors) -> Tensor | float:
        """L_dm and the squared lengths, each with its weight."""
        # Not kept: a graph of gradients could not be copied with the model.
        loss, self._loss = self.denoising_weight * self._loss, 0.0
        if self.reg_weight:
            loss = loss + self.reg_weight * mean_square(*vectors)
        return loss


class Perceptron(nn.Module):
    """Linear layers with ReLU and dropout between them.

    Args:
        sizes: of the input, the hidden layers and the output.
        dropout: share of the hidden units that are dropped.
    """

    def __init__(self, sizes: list[int], dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*size) for size in pairwise(sizes))
        self.hidden_sizes, self.dropout = sizes[1:-1], dropout

    @property
    def num_hidden(self) -> int:
        """How many hidden units of a row dropout decides on."""
        return sum(self.hidden_sizes)

    def forward(self, x: Tensor, uniforms: Tensor | None) -> Tensor:
        """(n, sizes[-1]) of ``x`` (n, sizes[0]). Units whose number in ``uniforms`` (n, num_hidden) is
        below ``dropout`` are dropped; None drops nothing."""
        parts = [None] * len(self.hidden_sizes) if uniforms is None else uniforms.split(self.hidden_sizes, 1)
        for layer, part in zip(self.layers, parts, strict=False):
            x = layer(x).relu()
            if part is not None:
                x = x * (part >= self.dropout) / (1 - self.dropout)
        return self.layers[-1](x)


def _check_keys(config) -> None:
    at_least("num_layers", config["num_layers"], 1)
    for key in ("predicted_items", "denoising_weight"):
        at_least(key, config[key], 0)
    for key in ("denoised_share", "temperature"):
        share(key, config[key])
    for key in ("dropout", "dropout_prob"):
        share(key, config[key], below_one=True)
    for size in config["hidden_sizes"]:
        at_least("hidden_sizes", size, 1)
