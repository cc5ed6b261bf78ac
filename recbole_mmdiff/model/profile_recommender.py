"""What MMDCDR and MuSiC share: profiles of both domains, a rating head, and who is scored by what."""

import logging

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.modalities import user_modalities
from recbole_mmdiff.errors import ConfigError, one_of
from recbole_mmdiff.model.base import (
    FinetunedOffset,
    OffsetRecommender,
    Stage,
    overlap_training_users,
    user_mask,
)
from recbole_mmdiff.model.factorization import Factorization, factorization_stages
from recbole_mmdiff.model.feature_space import Features, shared_item_features, shared_modalities
from recbole_mmdiff.model.profiles import DomainProfiles
from recbole_mmdiff.model.rating_head import RatingHead

ID_PROFILES = ("vector", "mean", "both")
RATING_USERS = ("overlapping", "all_target")


class ProfileRecommender(OffsetRecommender):
    """Base of models that generate the target vector of a user from the source profile.

    A subclass implements ``user_vectors`` and ``item_vectors`` of length ``size``, which meet in the
    rating head, and adds its stages after ``factorization_stages``. Whoever has a source profile is
    scored by the generated vector, also with training rows in the target, since that is what the
    head learns from; who has none, by the vector of the own target profile.
    """

    needs_source = True
    domain_views = ("target",)

    def __init__(self, config, dataset, size: int):
        super().__init__(config, dataset)
        self.run_seed, self.reg_weight = config["seed"], config["reg_weight"]
        self.pretrain_epochs = config["pretrain_epochs"]
        self.pretrain_batch_size = config["pretrain_batch_size"]
        self.pretrain_learning_rate = config["pretrain_learning_rate"]
        self.standardize = config["standardize"]
        self.rating_users = one_of("rating_users", config["rating_users"], RATING_USERS)
        self.domains = nn.ModuleDict(self._domains(config, dataset))
        self.head = RatingHead(dataset, self.RATING, size, config["biases"], config["item_damping"])
        self.user_offset = FinetunedOffset(dataset, size + config["biases"])
        self.register_buffer("overlap_users", overlap_training_users(dataset, config["model"]))
        source_users = dataset.source.inter_feat[dataset.source.uid_field]
        self.register_buffer("in_source", user_mask(source_users, dataset.user_num))
        self._item_table: Tensor | None = None
        self.register_load_state_dict_post_hook(_forget_items)

    def _domains(self, config, dataset) -> dict[str, DomainProfiles]:
        names = shared_modalities(dataset, config["modalities"])
        if not names and not config["use_ids"]:
            raise ConfigError(f"modalities: {config['model']} needs a modality of items that both domains "
                              f"have (recbole-mmdiff prepare encode makes some), or use_ids: True")
        items = shared_item_features(dataset, names, config["modality_policy"], config["feature_size"])
        id_profile = one_of("id_profile", config["id_profile"], ID_PROFILES)
        shape = (self.RATING, config["id_embedding_size"], config["biases"], config["init_std"])
        domains = {}
        for name, domain in (("target", dataset), ("source", dataset.source)):
            own = {modality: Features(values[:dataset.user_num], ~missing[:dataset.user_num])
                   for modality, (values, missing)
                   in user_modalities(domain, config["user_modalities"]).items()}
            domains[name] = DomainProfiles(
                domain, dataset.user_num, items[name], own,
                Factorization(domain, *shape) if config["use_ids"] else None, id_profile,
                config["profile_counts"])
        made = f"their own features {list(own)}" if own else f"the means of what they rated, in {names}"
        logging.getLogger().info("profiles of users: %s%s", made,
                                 f", and ids ({id_profile})" if config["use_ids"] else "")
        return domains

    # ---- stages --------------------------------------------------------------------------------

    def factorization_stages(self) -> list[Stage]:
        """The base factorisation of each domain, where ids are a modality."""
        found = {name: self.domains[name].factorization for name in ("source", "target")}
        if found["target"] is None:
            return []
        return factorization_stages(self, found, weight_decay=0.0)

    def fit_profiles(self) -> None:
        """The start of a stage after the factorisations: profiles, which no longer change, centred and
        scaled by those of the overlapping training users."""
        self._item_table = None
        for domain in self.domains.values():
            domain.tables.clear()
            if self.standardize:
                domain.fit(self.overlap_users)

    @property
    def rating_data(self) -> str:
        """What a stage that learns ratings iterates."""
        return "target" if self.rating_users == "all_target" else "overlap_ratings"

    def task_loss(self, interaction, user_vectors: Tensor, item_vectors: Tensor) -> Tensor:
        """Squared error of a batch of ratings (n rows).

        Args:
            interaction: the batch.
            user_vectors, item_vectors: (u, k), (i, k) of its distinct users and items, in order of id.
        """
        items = torch.unique(interaction[self.ITEM_ID])
        users = self.head.user_factors(user_vectors)[_place(interaction[self.USER_ID])]
        place = _place(interaction[self.ITEM_ID])
        scores = (users * self.head.item_factors(item_vectors)[place]).sum(-1)
        return functional.mse_loss((scores + self.head.item_offset(items)[place]).float(),
                                   interaction[self.RATING])

    # ---- scores --------------------------------------------------------------------------------

    def user_vectors(self, user: Tensor) -> Tensor:
        """(b, k): z of users (b,)."""
        raise NotImplementedError

    def item_vectors(self, item: Tensor) -> Tensor:
        """(b, k): v of items (b,)."""
        raise NotImplementedError

    def computed_user_factors(self, user: Tensor) -> Tensor:
        """(b, k) or (b, k + 1): z, or [z, <w, z>]."""
        return self.head.user_factors(self.user_vectors(user))

    def item_factors(self, item: Tensor) -> Tensor:
        """(b, k) or (b, k + 1): v, or [v, 1]; of all items at once outside of training."""
        if self.training:
            return self.head.item_factors(self.item_vectors(item))
        if self._item_table is None:
            everything = torch.arange(self.n_items, device=self.device)
            self._item_table = self.head.item_factors(self.item_vectors(everything)).detach()
        return self._item_table[item]

    def item_offset(self, item: Tensor) -> Tensor:
        """(b,): 0, or mean rating plus item bias."""
        return self.head.item_offset(item)

    def item_bias_parameters(self):
        """b_i of target items."""
        return self.head.item_bias.parameters() if self.head.biases else ()

    def train(self, mode: bool = True):
        self._item_table = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._item_table = None     # Moved or cast weights: what was computed from them is stale.
        return super()._apply(fn, recurse)


def _place(ids: Tensor) -> Tensor:
    return torch.unique(ids, return_inverse=True)[1]


def _forget_items(model: ProfileRecommender, _keys) -> None:
    """Other weights were loaded: what was computed from the old ones is stale."""
    model._item_table = None
