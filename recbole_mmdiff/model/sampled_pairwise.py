"""RecBole's pairwise models, trained with one of our negative samplers."""

import torch
from recbole.data.interaction import Interaction
from recbole.utils import InputType, ModelType
from torch import Tensor

from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.graph import sparse_matrix
from recbole_mmdiff.model.base import Stage, take
from recbole_mmdiff.model.negative_sampling import NegativeSampling
from recbole_mmdiff.model.pairwise import bpr_loss
from recbole_mmdiff.model.representations import Representations, lightgcn

#: RecBole's models whose vectors we know: what samplers read that look at them
KNOWN = ("BPR", "LightGCN")


class SampledPairwise:
    """A stage of training for a RecBole model: positive rows, and negatives by ``negative_sampler``.

    The loss stays the model's own (``calculate_loss`` of every pair of a positive and a negative),
    except with ``mixgcf``, whose negatives are no items: there BPR of the mixed vectors, and LightGCN's
    penalty.

    Args:
        config: the run's configuration.
        model: a pairwise model of RecBole's.
        dataset: the training part.

    Raises:
        ConfigError: the model is not pairwise, or learns from a knowledge graph too, or the sampler reads
            vectors that we do not know.
    """

    def __init__(self, config, model, dataset):
        self.model, self.name = model, config["model"]
        if getattr(model, "input_type", None) != InputType.PAIRWISE:
            raise ConfigError(f"negative_sampler: {self.name} does not learn from pairs of a positive and "
                              f"a negative item; leave it out")
        if config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
            raise ConfigError(f"negative_sampler: {self.name} learns from triples of a knowledge graph too, "
                              f"which only RecBole's own loader draws; leave it out")
        self.sampling = NegativeSampling(config, dataset)
        if self.sampling.needs_vectors and self.name not in KNOWN:
            raise ConfigError(f"negative_sampler: {self.sampling.name} reads the vectors of users and items, "
                              f"which we know of {', '.join(KNOWN)} and of our own models; use uniform or "
                              f"popularity with {self.name}")
        if self.name == "LightGCN":
            # Its own products, with a matrix of entries in no order, take three times as long.
            entries = model.norm_adj_matrix.coalesce()
            self.adjacency = sparse_matrix(*entries.indices(), entries.values(), entries.shape)
            model.forward = lambda: self._tables()[:2]

    def stage(self, epochs: int) -> Stage:
        """The one stage of training."""
        return Stage("training", "target", (self.loss,), self.model.parameters(), epochs)

    def loss(self, interaction) -> Tensor:
        """The model's loss of a batch of positive rows."""
        model = self.model
        tables = self._vectors() if self.sampling.needs_vectors else None
        found = self.sampling.draw(interaction, tables, model.seed, model.epoch)
        users, positives = interaction[model.USER_ID], interaction[model.ITEM_ID]
        if found.vectors is not None:
            loss = bpr_loss(take(tables.users, users), take(tables.items, positives), found.vectors)
            return (loss + self._penalty(users, positives, found.items[:, 0])).reshape(())
        count = found.items.shape[1]
        pairs = {field: interaction[field].repeat_interleave(count, 0) for field in interaction}
        pairs[model.NEG_ITEM_ID] = found.items.reshape(-1)
        # RecBole's penalties are vectors of one number.
        return model.calculate_loss(Interaction(pairs)).reshape(())

    def _vectors(self) -> Representations:
        """What the sampler reads; mixed vectors take a gradient."""
        with torch.set_grad_enabled(self.sampling.name == "mixgcf"):
            # As its own loss does: what it keeps for predictions follows from weights that will change.
            self.model.restore_user_e = self.model.restore_item_e = None
            return self._tables()

    def _tables(self) -> Representations:
        users, items = self.model.user_embedding.weight, self.model.item_embedding.weight
        if self.name == "BPR":
            return Representations(users, items)
        return lightgcn(self.adjacency, users, items, self.model.n_layers)

    def _penalty(self, users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor | float:
        model = self.model
        if self.name == "BPR":
            return 0.0
        start = [model.user_embedding(users), model.item_embedding(positives),
                 model.item_embedding(negatives)]
        return model.reg_weight * model.reg_loss(*start, require_pow=model.require_pow)
