"""SLMRec: self-supervised tasks between the modalities of items."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.loaders import SAMPLE_ID
from recbole_mmdiff.diffusion import fold_in, keyed_uniform
from recbole_mmdiff.errors import ConfigError, at_least, one_of, share
from recbole_mmdiff.graph import light_propagation
from recbole_mmdiff.model.base import take
from recbole_mmdiff.model.contrastive import modality_contrastive_loss
from recbole_mmdiff.model.item_features import ItemFeatures
from recbole_mmdiff.model.representations import Representations
from recbole_mmdiff.model.user_item_graph import training_adjacency
from recbole_mmdiff.model.without_negatives import WithoutNegatives
from recbole_mmdiff.negatives import KnownItems

TASKS = ("FAC", "FD", "FM")


class SLMRec(WithoutNegatives):
    """LightGCN on ids and on each modality, and contrasts between views of the items.

    In each graph users start from the same table, items from their id vectors or from the projection of
    their features of length 1. The outputs of all graphs are joined by a linear layer, one for users and
    one for items. The main loss is InfoNCE in the batch: of each row the log softmax of cos(u, i) /
    ``temperature`` over the items of the batch. Scores are inner products. ``ssl_weight`` times a task
    is added:

        FAC  fine and coarse spaces. Id vectors and those of the first modality are mapped to a common
             space, in which the two of an item are to find each other (InfoNCE, ``ssl_temperature``);
             then the mapped id vectors and those of the next modality are mapped to the next space.
        FD   feature dropout. Two views, in which a part of the start vectors of items is dropped out:
             those of a user, and of an item, are to find each other.
        FM   feature masking. Two views without the items' start vectors of one graph, each of another.

    Deviations:
        - The negatives of a row are the items of the batch that its user has in no training row: others,
          the same item in another row too, are no negatives. An item that stands in several rows counts
          as often.
        - The tasks are between the distinct users and items of a batch, and by cosines, as the main loss;
          FAC's are inner products in the public toolbox.
        - FAC's spaces all have ``embedding_size`` dimensions (the public toolbox halves the last). An item
          without a modality is in no contrast with it.
        - FD drops out what enters the graphs, instead of the output of every layer, since it is features
          that it drops.
        - What is dropped or masked is drawn by (seed, epoch, batch), a batch being named by its first row.
        - A user without a training row gets the mean vector of the others.
    """

    citation = ("Tao, Liu, Xia, Wang, Yang, Huang and Chua: Self-Supervised Learning for Multimedia "
                "Recommendation. IEEE Transactions on Multimedia 2022.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        at_least("num_layers", config["num_layers"], 0)
        share("ssl_dropout", config["ssl_dropout"], below_one=True)
        for key in ("temperature", "ssl_temperature"):
            if config[key] <= 0:
                raise ConfigError(f"{key}: {config[key]} is not positive; use for instance 0.2")
        self.num_layers, self.temperature = config["num_layers"], config["temperature"]
        self.ssl_task = one_of("ssl_task", config["ssl_task"], TASKS)
        self.ssl_weight, self.ssl_temperature = config["ssl_weight"], config["ssl_temperature"]
        self.ssl_dropout = config["ssl_dropout"]
        self.user_embedding, self.item_embedding = self.embedding(self.n_users), self.embedding(self.n_items)
        self.features = ItemFeatures(dataset, config["modalities"], config["modality_policy"], self.size)
        for number in range(len(self.features.names)):
            table = self.features.table(number)
            table.copy_(functional.normalize(table, dim=-1))
        joined = (1 + len(self.features.names)) * self.size
        self.user_fusion, self.item_fusion = (nn.Linear(joined, self.size) for _ in range(2))
        if self.ssl_task == "FAC":
            self.first_maps, self.second_maps = (
                nn.ModuleList(nn.Linear(self.size, self.size) for _ in self.features.names) for _ in range(2))
        self.register_buffer("adjacency", training_adjacency(dataset), persistent=False)
        rows = dataset.inter_feat
        self.known = KnownItems(rows[self.USER_ID], rows[self.ITEM_ID], self.n_users, self.n_items)

    # ---- representations -----------------------------------------------------------------------

    def item_starts(self) -> list[Tensor]:
        """(n_items, d) of each graph: id vectors, and projected features."""
        return [self.item_embedding.weight, *self.features.project_all().unbind(1)]

    def propagated(self, starts: list[Tensor]) -> list[Tensor]:
        """(n_users + n_items, d) of each graph, out of its items' start vectors (n_items, d)."""
        users = self.user_embedding.weight.repeat(1, len(starts))
        # One product for all graphs.
        start = torch.cat([users, torch.cat(starts, 1)])
        return list(light_propagation(self.adjacency, start, self.num_layers).chunk(len(starts), 1))

    def fused_users(self, graphs: list[Tensor], users: Tensor) -> Tensor:
        """(b, d): the joined vectors of users (b,)."""
        return self.user_fusion(torch.cat([take(graph, users) for graph in graphs], 1))

    def fused_items(self, graphs: list[Tensor], items: Tensor) -> Tensor:
        """(b, d): the joined vectors of items (b,)."""
        return self.item_fusion(torch.cat([take(graph, self.n_users + items) for graph in graphs], 1))

    def representations(self) -> Representations:
        """The joined vectors of all users and items."""
        graphs = self.propagated(self.item_starts())
        users, items = (torch.arange(count, device=self.device) for count in (self.n_users, self.n_items))
        return Representations(self.fused_users(graphs, users), self.fused_items(graphs, items))

    # ---- the loss ------------------------------------------------------------------------------

    def ranking_loss(self, interaction) -> Tensor:
        """InfoNCE of a batch of positive rows, and the task."""
        users, row = torch.unique(interaction[self.USER_ID], return_inverse=True)
        items, column, counts = torch.unique(interaction[self.ITEM_ID], return_inverse=True,
                                             return_counts=True)
        starts, views = self.item_starts(), []
        if self.ssl_weight and self.ssl_task != "FAC":
            views = getattr(self, f"_starts_of_{self.ssl_task.lower()}")(starts, interaction[SAMPLE_ID])
        graphs = self.propagated([*starts, *views])
        loss = info_nce(self.fused_users(graphs[:len(starts)], users),
                        self.fused_items(graphs[:len(starts)], items), row, column, counts,
                        self.known.to(users.device).among(users, items), self.temperature)
        if not self.ssl_weight:
            return loss
        task = self._between_views(graphs[len(starts):], users, items) if views \
            else self._fine_and_coarse(graphs, items)
        return loss + self.ssl_weight * task

    def _fine_and_coarse(self, graphs: list[Tensor], items: Tensor) -> Tensor:
        """FAC of distinct items (i,)."""
        rows = [take(graph, self.n_users + items) for graph in graphs]
        mapped, everyone = rows[0], torch.ones_like(items, dtype=torch.bool)
        losses = []
        for number, (first, second) in enumerate(zip(self.first_maps, self.second_maps, strict=True)):
            mapped = first(mapped)
            losses.append(modality_contrastive_loss(
                [mapped, second(rows[1 + number])], [everyone, self.features.present[items, number]],
                self.ssl_temperature))
        return sum(losses)

    def _between_views(self, graphs: list[Tensor], users: Tensor, items: Tensor) -> Tensor:
        """InfoNCE of distinct users (u,), and of items (i,), from the first half of the graphs to the
        second."""
        views, losses = (graphs[:len(graphs) // 2], graphs[len(graphs) // 2:]), []
        for fused, ids in ((self.fused_users, users), (self.fused_items, items)):
            everyone = torch.ones_like(ids, dtype=torch.bool)
            losses.append(modality_contrastive_loss([fused(view, ids) for view in views],
                                                    [everyone, everyone], self.ssl_temperature))
        return sum(losses)

    def _starts_of_fd(self, starts: list[Tensor], samples: Tensor) -> list[Tensor]:
        """Two views of all start vectors, each without a part of its numbers."""
        seed = self._batch_seed(samples)
        width = 2 * len(starts) * self.size
        ids = torch.arange(self.n_items, device=samples.device)
        kept = (keyed_uniform(ids, width, seed) >= self.ssl_dropout) / (1 - self.ssl_dropout)
        return [start * part for start, part in
                zip([*starts, *starts], kept.chunk(2 * len(starts), 1), strict=True)]

    def _starts_of_fm(self, starts: list[Tensor], samples: Tensor) -> list[Tensor]:
        """Two views of all start vectors, each with those of one graph at zero, not of the same."""
        drawn = keyed_uniform(samples[:1], len(starts), self._batch_seed(samples))[0]
        masked = drawn.argsort()[:2].tolist()
        return [torch.zeros_like(start) if number == without else start
                for without in masked for number, start in enumerate(starts)]

    def _batch_seed(self, samples: Tensor) -> int:
        return fold_in(self.seed, self.epoch, int(samples[0]))


def info_nce(users: Tensor, items: Tensor, row: Tensor, column: Tensor, counts: Tensor, known: Tensor,
             temperature: float) -> Tensor:
    """Mean over the rows of a batch of -log(e_ui / (e_ui + sum_j counts_j e_uj)), a scalar, with
    e_uj = exp(cos(u, j) / temperature) and the sum over the items j that the user does not know.

    Args:
        users: (u, d), the distinct ones of the batch.
        items: (i, d), likewise.
        row, column: (b,): the user and the item of each row of the batch.
        counts: (i,): rows of each item.
        known: (u, i) bool.
        temperature: positive.
    """
    dtype = torch.promote_types(users.dtype, torch.float32)
    with torch.autocast(users.device.type, enabled=False):
        users, items = (functional.normalize(part.to(dtype), dim=-1) for part in (users, items))
        logits = users @ items.T / temperature
        # A user's negatives are the same in all of the user's rows.
        others = (logits + counts.log()).masked_fill(known, -torch.inf).logsumexp(1)
        own = logits[row, column]
        return (torch.logaddexp(own, others[row]) - own).mean()
