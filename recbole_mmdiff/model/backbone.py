"""What CCDRec asks of the model that it is plugged into."""

import torch
from torch import Tensor

from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.model.item_features import ItemFeatures
from recbole_mmdiff.model.pairwise import PairwiseRecommender
from recbole_mmdiff.model.representations import Representations


class Backbone(PairwiseRecommender):
    """Base of multimodal models whose items are joined from two parts.

    One is ``higher_items``, the items' higher-order representation (the paper's h hat, of the item
    graph in FREEDOM), the other ``collaborative`` (h tilde, of the graph of users and items). CCDRec
    replaces the first by its fused representation and leaves the rest as it is. A subclass implements
    both, and ``join`` where it does more than add them; with ``higher_of_new_items`` and
    ``collaborative_alone`` it also scores items outside of the training.

    Attributes:
        item_embedding: the table (n_items, d) of the items' start vectors, what CCDRec diffuses.
        features: with a projection to d of each modality, what it is conditioned on.
    """

    features: ItemFeatures

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.user_embedding = self.embedding(self.n_users)
        self.item_embedding = self.embedding(self.n_items)
        self.features = ItemFeatures(dataset, config["modalities"], config["modality_policy"],
                                     self.size, config["train_features"])

    def higher_items(self) -> Tensor:
        """(n_items, d): the part of the items' vectors that comes of items alone."""
        raise NotImplementedError

    def collaborative(self, items: Tensor) -> Representations:
        """Vectors of users and items out of their interactions.

        Args:
            items: (n_items, d), the start vectors of items: ``item_embedding``'s, or what stands for
                them.
        """
        raise NotImplementedError

    def join(self, collaborative: Representations, higher: Tensor) -> Representations:
        """The vectors that score, of both parts."""
        return Representations(collaborative.users, collaborative.items + higher,
                               tuple(layer + higher for layer in collaborative.layers))

    @torch.no_grad()
    def vectors_of_new_items(self, items: NewItems) -> tuple[Tensor, Tensor]:
        """The two parts of items without rows and without a start vector of their own, joined: h hat out of
        ``higher_of_new_items``, and for h tilde 0."""
        higher = self.higher_of_new_items(items)
        return self.joined_alone(torch.zeros_like(higher), higher)

    def joined_alone(self, start: Tensor, higher: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors and offsets of items without rows, of their start vectors and h hat (m, d)."""
        alone = Representations(higher[:0], self.collaborative_alone(start))
        return self.join(alone, higher).items, higher.new_zeros(len(higher))

    def higher_of_new_items(self, items: NewItems) -> Tensor:
        """(m, d): ``higher_items`` of items outside of the training, whose start vectors are 0.

        Raises:
            ConfigError: the model cannot tell them.
        """
        return super().vectors_of_new_items(items)[0]

    def collaborative_alone(self, start: Tensor) -> Tensor:
        """(m, d): ``collaborative`` of items without rows, out of their start vectors (m, d)."""
        raise NotImplementedError

    def representations(self) -> Representations:
        """The vectors of all users and items, with gradient."""
        return self.join(self.collaborative(self.item_embedding.weight), self.higher_items())
