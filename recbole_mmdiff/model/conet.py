"""CoNet: collaborative cross networks."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.loaders import rows_of_both_domains
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.base import Stage, take
from recbole_mmdiff.model.dual import DOMAINS, DualRankingRecommender, ranking_cross_entropy
from recbole_mmdiff.negatives import KnownItems

Pair = tuple[Tensor, Tensor]


class CoNet(DualRankingRecommender):
    """Two perceptrons over [user, item], one for each domain, with cross connections between them.

    A user has one vector for both domains, items have one in theirs. With h_t and h_s the layers of
    the two towers, h_t' = relu(W_t h_t + b_t + H h_s) and h_s' = relu(W_s h_s + b_s + H h_t); H is
    the same in both directions and another in each layer. A tower's score is linear in its last
    layer. Both towers learn together, by binary cross-entropy of training rows against sampled
    items; ``cross_sparsity`` adds the L1 penalty on H (the paper's SCoNet).

    Deviations:
        - The paper feeds a target pair (u, i) together with a source item of u, which a ranking of
          all items does not have. Here the other tower is given the mean vector of u's training
          items in its domain (zero if there are none): the same for every candidate, without
          chance, and personal, also for a cold-start user, of whom only the source is known.
        - A source pair is fed together with the user's mean target item likewise, so that each
          domain has its own pairs and negatives; the paper draws them jointly.
        - The penalty ``reg_weight`` is the mean squared length of the vectors of a batch.
        - The best epoch is chosen on validation users.
    """

    citation = ("Hu, Zhang and Yang: CoNet: Collaborative Cross Networks for Cross-Domain "
                "Recommendation. CIKM 2018.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.cross_sparsity = config["cross_sparsity"]
        self.chunk_elements = config["eval_chunk_elements"]
        if not config["hidden_sizes"]:
            raise ConfigError("hidden_sizes: is empty, but cross connections need a hidden layer")
        size = config["embedding_size"]
        num_users = max(dataset.user_num, dataset.source.user_num)
        self.user_embedding = nn.Embedding(num_users, size)
        domains = zip(DOMAINS, (dataset, dataset.source), rows_of_both_domains(config, dataset),
                      strict=True)
        self.item_embedding, self.known = nn.ModuleDict(), {}
        for name, domain, rows in domains:
            self.item_embedding[name] = nn.Embedding(domain.item_num, size)
            self.known[name] = KnownItems(rows[domain.uid_field], rows[domain.iid_field], num_users,
                                          domain.item_num)
        for table in (self.user_embedding, *self.item_embedding.values()):
            nn.init.normal_(table.weight, std=config["init_std"])
        self.towers = CrossTowers([2 * size, *config["hidden_sizes"]])

    def finetuning_stage(self) -> Stage:
        """The vectors of the held-out users go on learning, in the target tower."""
        tables = [self.user_embedding, *([self.item_embedding["target"]] * self.finetune_items)]
        return self._finetuning(self.finetuning_loss, [table.weight for table in tables])

    def finetuning_scores(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (b,) of target pairs, and the mean squared length of the users' vectors."""
        return (self.pair_scores("target", user, item),
                self.user_embedding(user).square().sum(-1).mean())

    # ---- inputs --------------------------------------------------------------------------------

    def mean_items(self, name: str, user: Tensor) -> Tensor:
        """(b, d): the mean vectors of users' training items in a domain, zero without items."""
        users, place = torch.unique(user, return_inverse=True)
        known = self.known[name].to(user.device)
        _, items = known.rows(users)
        starts = known.counts[users].cumsum(0) - known.counts[users]
        means = functional.embedding_bag(items, self.item_embedding[name].weight, starts, mode="mean")
        return take(means, place)

    def pair_scores(self, name: str, user: Tensor, item: Tensor) -> Tensor:
        """(b,): scores of pairs by the tower of the domain ``name``."""
        other = "source" if name == "target" else "target"
        users = self.user_embedding(user)
        own = torch.cat([users, self.item_embedding[name](item)], -1)
        mean = torch.cat([users, self.mean_items(other, user)], -1)
        if name == "target":
            return self.towers(own, mean)[0]
        return self.towers(mean, own)[1]

    # ---- the loss ------------------------------------------------------------------------------

    def ranking_loss(self, interaction) -> Tensor:
        """Cross-entropy in both domains, the L1 penalty on H, and the L2 penalty."""
        loss = sum(self._domain_loss(interaction, name) for name in DOMAINS)
        if self.cross_sparsity:
            crossing = sum(layer.weight.abs().sum() for layer in self.towers.cross)
            loss = loss + self.cross_sparsity * crossing
        return loss

    def _domain_loss(self, interaction, name: str) -> Tensor:
        user, item = self.rows(interaction, name)
        users = user.repeat_interleave(item.shape[1])
        scores = self.pair_scores(name, users, item.reshape(-1)).view(item.shape)
        penalty = self.user_embedding(user).square().sum(-1).mean() \
            + self.item_embedding[name](item).square().sum(-1).mean()
        return ranking_cross_entropy(scores) + self.reg_weight * penalty

    # ---- scores --------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, interaction) -> Tensor:
        """Scores (b,) of the rows of an Interaction."""
        return self.pair_scores("target", interaction[self.USER_ID], interaction[self.ITEM_ID])

    @torch.no_grad()
    def full_sort_predict(self, interaction) -> Tensor:
        """Scores of all items for the users of an Interaction, (b * n_items,)."""
        user = interaction[self.USER_ID]
        users, means = self.user_embedding(user), self.mean_items("source", user)
        items = self.item_embedding["target"].weight
        # The first layer is linear: its part of the users, and its part of the items.
        of_users = self.towers.mix(0, functional.pad(users, (0, items.shape[1])),
                                   torch.cat([users, means], -1))
        of_items = self.towers.mix(0, functional.pad(items, (items.shape[1], 0)),
                                   items.new_zeros(1, 2 * items.shape[1]))
        biases = [layers[0].bias for layers in self.towers.layers.values()]
        of_items = [part - bias for part, bias in zip(of_items, biases, strict=True)]
        at_once = max(1, self.chunk_elements // (2 * self.towers.width * len(items)))
        chunks = zip(*(part.split(at_once) for part in of_users), strict=True)
        scores = [self.towers.scores(*(part[:, None] + item_part for part, item_part
                                       in zip(chunk, of_items, strict=True)))[0]
                  for chunk in chunks]
        return torch.cat(scores).view(-1)


class CrossTowers(nn.Module):
    """Two perceptrons of the same sizes, whose layers also see the other's.

    Args:
        sizes: of the input and of the hidden layers.
    """

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.width = max(sizes[1:])
        pairs = list(itertools.pairwise(sizes))
        self.layers = nn.ModuleDict({name: nn.ModuleList(nn.Linear(*pair) for pair in pairs)
                                     for name in DOMAINS})
        self.cross = nn.ModuleList(nn.Linear(*pair, bias=False) for pair in pairs)
        self.outputs = nn.ModuleDict({name: nn.Linear(sizes[-1], 1)
                                      for name in DOMAINS})

    def mix(self, level: int, target: Tensor, source: Tensor) -> Pair:
        """The next layers before their activation: W_t h_t + b_t + H h_s, W_s h_s + b_s + H h_t."""
        own, cross = self.layers, self.cross[level]
        return (own["target"][level](target) + cross(source),
                own["source"][level](source) + cross(target))

    def scores(self, target: Tensor, source: Tensor) -> Pair:
        """Scores (...,) of both towers, from the first hidden layers (..., h) before activation."""
        for level in range(1, len(self.cross)):
            target, source = self.mix(level, target.relu(), source.relu())
        return tuple(self.outputs[name](layer.relu()).squeeze(-1)
                     for name, layer in zip(DOMAINS, (target, source), strict=True))

    def forward(self, target: Tensor, source: Tensor) -> Pair:
        """Scores (b,) of both towers, from their inputs (b, 2d)."""
        return self.scores(*self.mix(0, target, source))
