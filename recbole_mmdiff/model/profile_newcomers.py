"""Users and items outside of the training, for the models that generate profiles."""

import torch
from torch import Tensor

from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.new_users import SourceRows
from recbole_mmdiff.model.profiles import residual_statistics


class ScoresNewcomers:
    """Mixin of ``ProfileRecommender``: a profile is a function of rows, and an item one of its features."""

    @torch.no_grad()
    def vectors_of_new_users(self, rows: SourceRows) -> Tensor:
        """(count, k) or (count, k + 1): generated from the source profiles of new users, as those of cold
        users are.

        A profile is the same function of rows for both; but for the user's own vector of the base
        factorisation, which is fitted to the fixed source items (``Factorization.fitted_user_factors``).
        With ``sampling_noise`` all of them have one noise, that of an id behind the last, so that nobody
        depends on which others there are.

        Raises:
            ConfigError: users are described by features of their own, which rows do not tell.
        """
        source = self.domains["source"]
        if source.own:
            raise ConfigError(f"new users: profiles of this run are the users' own features {source.own} "
                              f"(user_modalities), which their ratings do not tell")
        vectors = None
        if source.factorization is not None and source.id_profile != "mean":
            vectors = source.factorization.fitted_user_factors(rows, self.reg_weight)
        profiles = source.profiles_of_rows(rows.user, rows.item, self._statistics(rows), vectors)
        keys = torch.full((rows.count,), self.n_users, device=rows.user.device)
        made = [self.vectors_from_profiles(keys[part], {name: (values[part], has[part])
                                                        for name, (values, has) in profiles.items()})
                for part in torch.arange(rows.count, device=keys.device).split(self.user_rows.chunk)]
        return self.head.user_factors(torch.cat(made))

    @torch.no_grad()
    def vectors_of_new_items(self, items: NewItems) -> tuple[Tensor, Tensor]:
        """v of items outside of the training, which is a function of features alone, and the mean rating.

        Exactly those of an item of the data set with the same features and no training row: it has no id and
        no bias either (unless ``train_neg_ratio`` drew it).
        """
        vectors = self.vectors_from_features(self.domains["target"].of_new_items(items))
        return self.head.item_factors(vectors), self.head.mean.expand(len(items))

    def vectors_from_features(self, features: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """(b, k): v of items: modality -> features (b, c), zero where there are none, and who has some
        (b,)."""
        raise NotImplementedError

    def vectors_from_profiles(self, user: Tensor, profiles: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """(b, k): z generated from source profiles: modality -> (b, k) and who has one (b,); noise is drawn
        by ``user`` (b,)."""
        raise NotImplementedError

    def _statistics(self, rows: SourceRows) -> Tensor:
        """(count, s): statistics of new users' ratings, as behind the source profiles."""
        if self.source_item_bias is None:
            return torch.zeros(rows.count, 0, device=rows.user.device)
        residual = rows.rating.double() - self.source_mean - self.source_item_bias[rows.item]
        found = residual_statistics(rows.user.cpu(), residual.cpu(), rows.count, self.user_damping)
        return found.to(rows.user.device)
