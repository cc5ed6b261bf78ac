"""What models share that rank in two domains at once and match the users of both."""

import logging

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.loaders import SAMPLE_ID
from recbole_mmdiff.diffusion import fold_in, keyed_uniform
from recbole_mmdiff.errors import ConfigError, at_least
from recbole_mmdiff.model.base import Stage, StagedRecommender
from recbole_mmdiff.model.dual import DOMAINS, DualVectors
from recbole_mmdiff.model.representations import Representations
from recbole_mmdiff.model.user_guidance import UserGuidance
from recbole_mmdiff.model.user_matching import UserMatching


class MatchedRecommender(DualVectors, StagedRecommender):
    """Base of models of two domains whose loss is L = L of either domain + lambda L_C (SIEOUG, Eq. 24).

    Both domains are evaluated (dual target). A subclass sets ``domains``, and implements ``domain_loss`` and
    ``has_rows``. Attributes:

        domains: "target" and "source", each a module of its own.
        guidance: L_C, of users who are matched.
        cosine: whether scores are cosines, or else inner products.
    """

    citation = ("Liu, Chen, Xu, Liao, Wang, Zheng, Fu, Pei and Wang: Joint Similarity Item Exploration and "
                "Overlapped User Guidance for Multi-Modal Cross-Domain Recommendation. WWW 2025.")
    needs_source = True
    predicts_ratings = False
    domain_views = ("target",)
    cosine = False

    domains: nn.ModuleDict

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.epochs, self.guidance_weight = config["epochs"], config["guidance_weight"]
        at_least("guidance_weight", self.guidance_weight, 0)
        if config["train_neg_ratio"]:
            raise ConfigError(f"train_neg_ratio: {config['model']} reads no such negatives; leave it out")
        self.num_linked = dataset.num_overlap
        matcher = UserMatching(
            dataset.source.user_num, matching=config["matching"], scope=config["matching_scope"],
            guidance=config["guidance"], epsilon=config["epsilon"], cost_scale=config["cost_scale"],
            tolerance=config["matching_tolerance"])
        self.guidance = UserGuidance(matcher, self.num_linked, config["guidance_temperature"],
                                     config["linked_share"], config["guided_users"])
        self.guides = self.guidance_weight > 0 and matcher.matching != "none"

    def stages(self) -> list[Stage]:
        """One stage over the training rows of both domains."""
        return [Stage("both", "both", (self.ranking_loss,), self.parameters(), self.epochs,
                      before_epoch=self.before_epoch, after_epoch=self.after_epoch)]

    def before_epoch(self, epoch: int) -> None:
        """With ``matching_scope: epoch``, all users are matched."""
        self.guidance.linked_counts.clear()
        if self.guides and self.guidance.matcher.scope == "epoch":
            with torch.no_grad():
                both = ("source", "target")
                tables = tuple(self.representations(name).users for name in both)
                users = tuple(self.has_rows(name).nonzero().squeeze(1) for name in both)
                self.guidance.matcher.match_all(users, tables, self.num_linked)

    def after_epoch(self, epoch: int) -> None:
        """Say how many linked users guided."""
        if counts := self.guidance.linked_counts:
            logging.getLogger().info("matching: %.1f linked users in a batch, %d to %d",
                                     sum(counts) / len(counts), min(counts), max(counts))

    # ---- the loss ------------------------------------------------------------------------------

    def domain_loss(self, name: str, rows: dict[str, Tensor]) -> tuple[Tensor, Representations]:
        """The loss of a domain's ``rows`` (each column (b,)), and the vectors of all users and items."""
        raise NotImplementedError

    def has_rows(self, name: str) -> Tensor:
        """(n_users,) bool: the users with training rows in a domain."""
        raise NotImplementedError

    def ranking_loss(self, interaction) -> Tensor:
        """L of a batch of both domains."""
        fields = self.USER_ID, self.ITEM_ID, SAMPLE_ID
        rows = {name: {field: interaction[prefix + field] for field in fields}
                for name, prefix in (("target", ""), ("source", "source_"))}
        found = {name: self.domain_loss(name, rows[name]) for name in DOMAINS}
        loss = sum(part for part, _ in found.values())
        if not self.guides:
            return loss
        users = {name: rows[name][self.USER_ID] for name in DOMAINS}
        tables = {name: tables.users for name, (_, tables) in found.items()}
        return loss + self.guidance_weight * self.guidance_loss(users, tables, interaction[SAMPLE_ID])

    def guidance_loss(self, users: dict[str, Tensor], tables: dict[str, Tensor], samples: Tensor) -> Tensor:
        """L_C of a batch: ids (b,) of each domain's users, and vectors (n_users, d) of all."""
        seed = fold_in(self.seed, self.epoch, 3, int(samples[0]))
        linked = torch.arange(self.num_linked + 1, device=samples.device)
        halves = self.guidance.halves(users["source"], users["target"], keyed_uniform(linked, 1, seed)[:, 0],
                                      (self.has_rows("source"), self.has_rows("target")))
        return self.guidance(halves, (tables["source"], tables["target"]))

    # ---- scores --------------------------------------------------------------------------------

    def representations(self, name: str) -> Representations:
        """The vectors of all users and items of a domain."""
        return self.domains[name].representations()

    def scoring_vectors(self) -> dict[str, Representations]:
        """A user without training rows in a domain has the vector of the other domain, at the usual length,
        if linked and with rows there, and if both domains are drawn together; else the mean of the others."""
        tables = {domain: self.representations(domain) for domain in DOMAINS}
        return {domain: self._completed(tables, domain) for domain in DOMAINS}

    def _completed(self, tables: dict[str, Representations], name: str) -> Representations:
        users, known = tables[name].users, self.has_rows(name)
        other = "source" if name == "target" else "target"
        fallback = users[known].mean(0).repeat(len(users), 1)
        if self.guides:
            linked = torch.arange(1, self.num_linked + 1, device=users.device)
            there = linked[self.has_rows(other)[linked]]
            length = users[known].norm(dim=-1).mean()
            fallback[there] = length * functional.normalize(tables[other].users[there], dim=-1)
        parts = torch.where(known[:, None], users, fallback), tables[name].items
        return Representations(*(functional.normalize(part, dim=-1) for part in parts)
                               if self.cosine else parts)
