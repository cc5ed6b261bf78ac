"""BiTGCF: bi-directional transfer graph collaborative filtering."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.loaders import rows_of_both_domains
from recbole_mmdiff.errors import ConfigError, one_of
from recbole_mmdiff.graph import bipartite_adjacency, propagate
from recbole_mmdiff.model.base import FinetunedOffset, Stage, take
from recbole_mmdiff.model.dual import DOMAINS, DualRankingRecommender, DualVectors, ranking_cross_entropy
from recbole_mmdiff.model.item_exploration import MayExploreItems
from recbole_mmdiff.model.representations import Representations


class BiTGCF(MayExploreItems, DualVectors, DualRankingRecommender):
    """A graph of users and items in each domain; linked users are mixed after every layer.

    Feature propagation in each domain, without weights and activation: with A the normalised
    adjacency, E' = E + A E + E * A E (* elementwise). Feature transfer for a linked user with
    degrees n_s and n_t: the common features (n_s e_s + n_t e_t) / (n_s + n_t), the domain's own
    features lambda e_t + (1 - lambda) e_s (in the source with the roles changed), and the new
    vector is the mean of the two. The L2-normalised vectors of all layers, after the start vector,
    are concatenated (``layers: concat``) or averaged (``mean``); a score is their inner product.
    Both domains learn together, by binary cross-entropy of training rows against sampled items. Both are
    evaluated (dual target).

    With ``item_exploration`` the joined vectors of items are replaced by what SIEOUG's module makes of them
    (``ItemExploration``), in both domains: after the layers, so that users' vectors are as without it.

    Deviations:
        - The paper ranks users with training rows in both domains. Here the start vector of a user
          without training rows in a domain is zero there instead of untrained, so that transfer
          alone speaks: of a cold-start user, what the source graph says.
        - Transfer also mixes the start vectors (``transfer_start``; False is the paper's form), or
          nothing would stand in a cold-start user's part of the score that they make.
        - No dropout of messages: the L2 penalty regularises.
        - The penalty is the mean squared length of the batch's start vectors in both domains.
        - The best epoch is chosen on validation users; where both domains are split, by the mean of both.
    """

    citation = ("Liu, Li, Li and Pan: Cross Domain Recommendation via Bi-directional Transfer Graph "
                "Collaborative Filtering Networks. CIKM 2020.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.num_layers = config["num_layers"]
        self.lambdas = {"target": config["lambda_target"], "source": config["lambda_source"]}
        self.layers = one_of("layers", config["layers"], ("concat", "mean"))
        self.transfer_start = config["transfer_start"]
        self.num_linked = dataset.num_overlap
        domains = zip(DOMAINS, (dataset, dataset.source), rows_of_both_domains(config, dataset),
                      strict=True)
        self.sizes, self.tables = {}, nn.ModuleDict()
        for name, domain, rows in domains:
            users, items = rows[domain.uid_field], rows[domain.iid_field]
            sizes = self.sizes[name] = [domain.user_num, domain.item_num]
            self.tables[name] = nn.Embedding(sum(sizes), config["embedding_size"])
            nn.init.normal_(self.tables[name].weight, std=config["init_std"])
            self.register_buffer(f"{name}_adjacency", bipartite_adjacency(users, items, *sizes),
                                 persistent=False)
            degree = torch.bincount(users, minlength=sizes[0])[:, None].float()
            self.register_buffer(f"{name}_degree", degree, persistent=False)
        width = config["embedding_size"] * (self.num_layers + 1 if self.layers == "concat" else 1)
        self.user_offset = FinetunedOffset(dataset, width)
        self.explorations = self.explorations_of(config, dataset, width, config["exploration_layers"]) \
            if config["item_exploration"] else nn.ModuleDict()

    def finetuning_stage(self) -> Stage:
        """What is learned is added to the propagated vectors of the held-out users: edges of theirs
        would change the vectors of everybody.

        Raises:
            ConfigError: ``finetune_items``, which would change them, too.
        """
        if self.finetune_items:
            raise ConfigError("finetune_items: True, but BiTGCF's items are propagated from everybody's "
                              "edges; leave it False")
        return self._finetuning(self.finetuning_loss, self.user_offset.parameters(),
                                prepare=self.freeze_vectors)

    def freeze_vectors(self) -> None:
        """The start of fine-tuning: the vectors of the target, which no longer change."""
        with torch.no_grad():
            self._frozen = self.scoring_vectors()["target"]

    def finetuning_scores(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (b,) of target pairs, and the mean squared length of what is added."""
        users, items = self._frozen.users, self._frozen.items
        offset = self.user_offset(user)
        return ((users[user] + offset) * items[item]).sum(-1), offset.square().sum(-1).mean()

    # ---- propagation and transfer --------------------------------------------------------------

    def _start(self, name: str) -> Tensor:
        """Start vectors of all users and items of a domain, users without rows at zero."""
        users, items = self.tables[name].weight.split(self.sizes[name])
        return torch.cat([users * (getattr(self, f"{name}_degree") > 0), items])

    def transfer(self, target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's vectors of both domains with linked users mixed, shapes as they were."""
        linked = slice(1, self.num_linked + 1)
        vectors = {"target": target[linked], "source": source[linked]}
        degrees = {name: getattr(self, f"{name}_degree")[linked] for name in DOMAINS}
        total = sum(degrees.values()).clamp(min=1)
        common = sum(degrees[name] / total * vectors[name] for name in DOMAINS)
        mixed = []
        for name, other, whole in (("target", "source", target), ("source", "target", source)):
            weight = self.lambdas[name]
            own = weight * vectors[name] + (1 - weight) * vectors[other]
            mixed.append(torch.cat([whole[:1], (common + own) / 2, whole[linked.stop:]]))
        return mixed[0], mixed[1]

    def scoring_vectors(self) -> dict[str, Representations]:
        """domain -> vectors of users (n_users, k) and of items (n_items, k), these explored if they are."""
        layer = {name: self._start(name) for name in DOMAINS}
        if self.transfer_start:
            layer = dict(zip(DOMAINS, self.transfer(*layer.values()), strict=True))
        layers = {name: [layer[name]] for name in DOMAINS}
        for _ in range(self.num_layers):
            for name in DOMAINS:
                message = propagate(getattr(self, f"{name}_adjacency"), layer[name])
                layer[name] = layer[name] + message + layer[name] * message
            layer = dict(zip(DOMAINS, self.transfer(*layer.values()), strict=True))
            for name in DOMAINS:
                layers[name].append(functional.normalize(layer[name], dim=-1))
        joined = {name: torch.cat(layers[name], -1) if self.layers == "concat"
                  else torch.stack(layers[name]).mean(0) for name in DOMAINS}
        parts = {name: joined[name].split(self.sizes[name]) for name in DOMAINS}
        return {name: Representations(users, self.explored(name, items))
                for name, (users, items) in parts.items()}

    # ---- the loss ------------------------------------------------------------------------------

    def ranking_loss(self, interaction) -> Tensor:
        """Cross-entropy of the rows of both domains and of the items sampled for them, and the
        penalty."""
        vectors = self.scoring_vectors()
        return sum(self._domain_loss(interaction, name, vectors[name]) for name in DOMAINS)

    def _domain_loss(self, interaction, name: str, vectors: Representations) -> Tensor:
        user, item = self.rows(interaction, name)
        scores = (take(vectors.users, user)[:, None] * take(vectors.items, item)).sum(-1)
        start_users, start_items = self.tables[name].weight.split(self.sizes[name])
        penalty = take(start_users, user).square().sum(-1).mean() \
            + take(start_items, item).square().sum(-1).mean()
        return ranking_cross_entropy(scores) + self.reg_weight * penalty

    # ---- scores --------------------------------------------------------------------------------

    def user_factors(self, user: Tensor) -> Tensor:
        """(b, k): target vectors of users, and what fine-tuning added to them."""
        return super().user_factors(user) + self.user_offset(user)
