"""What MMDCDR and MuSiC share: profiles of both domains, a rating head, and who is scored by what."""

import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.ids import id_mask
from recbole_mmdiff.diffusion import fold_in, keyed_uniform, linear_schedule
from recbole_mmdiff.errors import ConfigError, at_least, in_words_of, one_of, share
from recbole_mmdiff.model.base import (
    FinetunedOffset,
    OffsetRecommender,
    Stage,
    overlap_training_users,
    take,
)
from recbole_mmdiff.model.bias import shrunken_item_biases
from recbole_mmdiff.model.factorization import Factorization, factorization_stages
from recbole_mmdiff.model.feature_space import (
    Features,
    shared_item_features,
    shared_modalities,
    shared_user_features,
)
from recbole_mmdiff.model.forgetful import Forgetful
from recbole_mmdiff.model.profile_newcomers import ScoresNewcomers
from recbole_mmdiff.model.profiles import IDS, DomainProfiles, rating_statistics
from recbole_mmdiff.model.rating_head import RatingHead
from recbole_mmdiff.model.row_cache import RowCache

_COLD_ITEMS = -1    # A stream beside those of the models.
ID_PROFILES = ("vector", "mean", "both")
RATING_USERS = ("overlapping", "all_target")


class Rated(NamedTuple):
    """A batch of n ratings: distinct users (u,) and items (i,) in order of id, the places (n,) of each
    row's among them, and the ratings (n,)."""

    users: Tensor
    user_place: Tensor
    items: Tensor
    item_place: Tensor
    rating: Tensor


class ProfileRecommender(ScoresNewcomers, Forgetful, OffsetRecommender):
    """Base of models that generate the target vector of a user from the source profile.

    A subclass implements ``user_vectors`` and ``item_vectors`` of length ``size``, which meet in the
    rating head, and the same of profiles and features alone (``ScoresNewcomers``), and adds its stages after
    ``factorization_stages``. Whoever has a source profile is scored by the generated vector, also with
    training rows in the target, since that is what the head learns from; who has none, by the vector of the
    own target profile.
    """

    needs_source = True
    domain_views = ("target",)

    def __init__(self, config, dataset, size: int):
        super().__init__(config, dataset)
        _check_values(config)
        self.run_seed, self.reg_weight = config["seed"], config["reg_weight"]
        self.pretrain_epochs = config["pretrain_epochs"]
        self.pretrain_batch_size = config["pretrain_batch_size"]
        self.pretrain_learning_rate = config["pretrain_learning_rate"]
        self.standardize, self.cold_item_rate = config["standardize"], config["cold_item_rate"]
        self.use_diffusion = config["use_diffusion"]
        self.sampling_noise, self.num_samples = config["sampling_noise"], config["num_samples"]
        with in_words_of("num_steps, beta_start, beta_end"):
            self.schedule = linear_schedule(config["num_steps"], config["beta_start"],
                                            config["beta_end"], config["rescale_schedule"])
        self.rating_users = one_of("rating_users", config["rating_users"], RATING_USERS)
        self.domains = nn.ModuleDict(self._domains(config, dataset))
        means = shrunken_item_biases(dataset.source, self.RATING, config["item_damping"])[:2] \
            if config["profile_statistics"] else (None, None)
        for name, value in zip(("source_mean", "source_item_bias"), means, strict=True):
            self.register_buffer(name, value, persistent=False)
        self.user_damping = config["user_damping"]
        self.head = RatingHead(dataset, self.RATING, size, config["biases"], config["item_damping"])
        self.user_offset = FinetunedOffset(dataset, size + config["biases"])
        self.register_buffer("overlap_users", overlap_training_users(dataset, config["model"]))
        source_users = dataset.source.inter_feat[dataset.source.uid_field]
        self.register_buffer("in_source", id_mask(source_users, dataset.user_num))
        chunk = config["sampling_batch_size"]
        # Methods, not lambdas: a copy of the model computes its own rows.
        self.user_rows = RowCache(self._user_rows, dataset.user_num, chunk)
        self.item_rows = RowCache(self._item_rows, dataset.item_num, chunk)

    def _domains(self, config, dataset) -> dict[str, DomainProfiles]:
        for key in ("modalities", "user_modalities"):
            _check_names(key, config[key])
        names = shared_modalities(dataset, config["modalities"])
        if not names and not config["use_ids"]:
            raise ConfigError(f"modalities: {config['model']} needs a modality of items that both domains "
                              f"have (recbole-mmdiff prepare encode makes some), or use_ids: True")
        if IDS in (*names, *(config["user_modalities"] or ())):
            raise ConfigError(f"modalities, user_modalities: {IDS!r} is the name of the vectors of the base "
                              f"factorisations (use_ids); give the feature another name")
        items = shared_item_features(dataset, names, config["modality_policy"], config["feature_size"])
        id_profile = one_of("id_profile", config["id_profile"], ID_PROFILES)
        shape = (self.RATING, config["id_embedding_size"], config["biases"], config["init_std"])
        damping = config["item_damping"], config["user_damping"]
        domains = {}
        own = shared_user_features(dataset, config["user_modalities"] or [], config["feature_size"])
        # The order of the mapping models: the same seed gives the same factorisations.
        for name, domain in (("source", dataset.source), ("target", dataset)):
            # Items are scored in the target alone; the source's are of use for means only.
            needed = items[name] if name == "target" or not own[name] else {}
            domains[name] = DomainProfiles(
                domain, dataset.user_num, needed, own[name],
                Factorization(domain, *shape) if config["use_ids"] else None, id_profile,
                rating_statistics(domain, self.RATING, dataset.user_num, *damping)
                if config["profile_statistics"] else torch.zeros(dataset.user_num, 0))
        self._log_profiles(names, own, config)
        return domains

    def _log_profiles(self, names: list[str], own: dict[str, dict[str, Features]], config) -> None:
        made = f"the means of what they rated, in {names}" if names else "of ids alone"
        if own["target"]:
            lacking = {name: int((~found.known).sum()) for name, found in own["target"].items()}
            made = f"their own features {list(lacking)} (target users without, held-out ones too: {lacking})"
        ids = f", with ids (id_profile: {config['id_profile']})" if config["use_ids"] else ""
        logging.getLogger().info("profiles of users: %s%s", made, ids)

    # ---- stages --------------------------------------------------------------------------------

    def factorization_stages(self) -> list[Stage]:
        """The base factorisation of each domain, where ids are a modality."""
        found = {name: self.domains[name].factorization for name in ("source", "target")}
        if found["target"] is None:
            return []
        return factorization_stages(self, found)

    def fit_profiles(self) -> None:
        """The start of a stage after the factorisations: profiles, which no longer change, centred and
        scaled by those of the overlapping training users."""
        self.forget()
        for domain in self.domains.values():
            domain.forget()
            if self.standardize:
                domain.fit(self.overlap_users)

    @property
    def rating_data(self) -> str:
        """What a stage that learns ratings iterates."""
        return "target" if self.rating_users == "all_target" else "overlap_ratings"

    def rated(self, interaction) -> Rated:
        """The distinct users and items of a batch of ratings."""
        return Rated(*torch.unique(interaction[self.USER_ID], return_inverse=True),
                     *torch.unique(interaction[self.ITEM_ID], return_inverse=True),
                     interaction[self.RATING])

    def task_loss(self, rated: Rated, user_vectors: Tensor, item_vectors: Tensor) -> Tensor:
        """Squared error of a batch of target ratings; z (u, k) and v (i, k) of its distinct users and
        items."""
        users, items = self.head.user_factors(user_vectors), self.head.item_factors(item_vectors)
        offset = self.head.item_offset(rated.items, ~self.as_cold(rated.items))
        scores = (take(users, rated.user_place) * take(items, rated.item_place)).sum(-1)
        scores = scores + take(offset[:, None], rated.item_place).squeeze(-1)
        return functional.mse_loss(scores.float(), rated.rating)

    def network_time(self, step: float | Tensor) -> float | Tensor:
        """What a noise network sees of step t in 1 .. T: from 0, on the scale of 1,000 steps."""
        return (step - 1) * (1000 / self.schedule.num_steps)

    def as_cold(self, item: Tensor) -> Tensor:
        """(b,): which items are rated in this epoch as if nobody had rated them, by (seed, epoch, item)."""
        if not self.cold_item_rate:
            return torch.zeros_like(item, dtype=torch.bool)
        uniform = keyed_uniform(item, 1, fold_in(self.seed, self.epoch, _COLD_ITEMS))
        return uniform.squeeze(-1) < self.cold_item_rate

    def item_features(self, name: str, item: Tensor, learning: bool) -> tuple[Tensor, Tensor]:
        """Features (b, k) of target items in a modality, zero where there are none, and who has some
        (b,); while ``learning`` those that count as cold have no ids."""
        values, known = self.domains["target"].items(name)
        known = known[item]
        if learning and name == IDS:
            known = known & ~self.as_cold(item)
        return values[item] * known[:, None], known

    # ---- scores --------------------------------------------------------------------------------

    def user_vectors(self, user: Tensor, learning: bool = False) -> Tensor:
        """(b, k): z of users (b,); ``learning`` draws dropout and noise of this epoch."""
        raise NotImplementedError

    def item_vectors(self, item: Tensor, learning: bool = False) -> Tensor:
        """(b, k): v of items (b,)."""
        raise NotImplementedError

    def _user_rows(self, user: Tensor) -> Tensor:
        return self.head.user_factors(self.user_vectors(user))

    def _item_rows(self, item: Tensor) -> Tensor:
        return self.head.item_factors(self.item_vectors(item))

    def computed_user_factors(self, user: Tensor) -> Tensor:
        """(b, k) or (b, k + 1): z, or [z, <w, z>]; each user is generated once in an evaluation."""
        return self.user_rows(user)

    def item_factors(self, item: Tensor) -> Tensor:
        """(b, k) or (b, k + 1): v, or [v, 1]."""
        return self.item_rows(item)

    def item_offset(self, item: Tensor) -> Tensor:
        """(b,): 0, or mean rating plus item bias."""
        return self.head.item_offset(item)

    def item_bias_parameters(self):
        """b_i of target items."""
        return self.head.item_bias.parameters() if self.head.biases else ()

    def cautions(self, test_users: Tensor) -> list[str]:
        """That nobody of the test users (n,) has a source profile."""
        if self.in_source[test_users].any():
            return []
        return [f"no test user of this split has a source row: {type(self).__name__} transfers nobody, and "
                f"scores by target profiles"]

    # ---- what was computed from weights is forgotten with them -----------------------------------

    def forget(self) -> None:
        """Users and items are computed anew: weights have changed."""
        self.user_rows.clear()
        self.item_rows.clear()

    def train(self, mode: bool = True):
        self.forget()
        return super().train(mode)


def _check_values(config) -> None:
    for key, least in {"embedding_size": 1, "hidden_size": 1, "id_embedding_size": 1, "feature_size": 0,
                       "num_samples": 1, "sampling_batch_size": 1}.items():
        at_least(key, config[key], least)
    share("cold_item_rate", config["cold_item_rate"])
    if config["num_samples"] > 1 and not config["sampling_noise"]:
        raise ConfigError(f"num_samples: {config['num_samples']} samples without noise are all the same; set "
                          f"sampling_noise: True, or leave it at 1")


def _check_names(key: str, names) -> None:
    if names is not None and (not isinstance(names, (list, tuple))
                              or not all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{key}: {names!r} is no list of names, write for instance [text, image]")
