"""Matrix factorisation, the base of the mapping models, in its plain and its biased form."""

from functools import partial

import torch
from recbole.data.dataset import Dataset
from torch import Tensor, nn

from recbole_mmdiff.model.base import Stage, StagedRecommender
from recbole_mmdiff.model.new_users import SourceRows

ROWS_AT_ONCE = 8192     # outer products held at once
LEAST_RIDGE = 1e-6      # so that a user with fewer rows than columns has one solution

class Factorization(nn.Module):
    """Ratings as an inner product, with biases or without.

    Plain: r = <p_u, q_i>. Biased: r = mu + b_i + <[p_u, b_u], [q_i, 1]>, so that the user vector
    that is carried to another domain also holds the user's bias.

    Args:
        dataset: its training rows give the mean rating mu; its vocabulary the table sizes.
        rating_field: the column of ratings.
        embedding_size: length d of p_u and q_i.
        biases: whether the biased form is used.
        init_std: standard deviation of the normal initialisation of p and q (biases start at 0).
    """

    def __init__(self, dataset: Dataset, rating_field: str, embedding_size: int, biases: bool,
                 init_std: float):
        super().__init__()
        self.biases = biases
        self.user_embedding = nn.Embedding(dataset.user_num, embedding_size)
        self.item_embedding = nn.Embedding(dataset.item_num, embedding_size)
        for table in (self.user_embedding, self.item_embedding):
            nn.init.normal_(table.weight, std=init_std)
        if biases:
            self.user_bias = nn.Embedding(dataset.user_num, 1)
            self.item_bias = nn.Embedding(dataset.item_num, 1)
            nn.init.zeros_(self.user_bias.weight)
            nn.init.zeros_(self.item_bias.weight)
        mean = dataset.inter_feat[rating_field].mean() if biases else torch.zeros(())
        self.register_buffer("mean", mean.clone())

    @property
    def size(self) -> int:
        """Length of the user vector."""
        return self.user_embedding.embedding_dim + self.biases

    def user_factors(self, user: Tensor) -> Tensor:
        """(b, size): p_u, or [p_u, b_u], of users (b,)."""
        factors = self.user_embedding(user)
        return torch.cat([factors, self.user_bias(user)], -1) if self.biases else factors

    def item_factors(self, item: Tensor) -> Tensor:
        """(b, size): q_i, or [q_i, 1], of items (b,)."""
        factors = self.item_embedding(item)
        return nn.functional.pad(factors, (0, 1), value=1.0) if self.biases else factors

    def item_offset(self, item: Tensor) -> Tensor:
        """(b,): 0, or mu + b_i, of items (b,)."""
        if not self.biases:
            return self.mean.expand(len(item))
        return self.mean + self.item_bias(item).squeeze(-1)

    @torch.no_grad()
    def set_user_factors(self, user: Tensor, factors: Tensor) -> None:
        """Make ``factors`` (b, size) the vectors of users (b,)."""
        tables = [self.user_embedding.weight, *([self.user_bias.weight] if self.biases else [])]
        parts = factors.split([table.shape[1] for table in tables], dim=-1)
        for table, part in zip(tables, parts, strict=True):
            table[user] = part.to(table.dtype)

    @torch.no_grad()
    def fitted_user_factors(self, rows: SourceRows, reg_weight: float) -> Tensor:
        """(count, size): the vectors w of new users by ridge regression on the items as they are.

        They minimise the part of ``loss`` that is a user's: the sum over the n rows of
        (r - o_i - <w, q_i>)^2, plus ``reg_weight`` n |w|^2; o_i is the item's offset, and q_i ends in 1
        where there are biases. Solved in float64; without regularisation the shortest w, nearly.
        """
        items = self.item_factors(rows.item).double()
        left = rows.rating.double() - self.item_offset(rows.item).double()
        matrix = items.new_zeros(rows.count, self.size, self.size)
        vector = items.new_zeros(rows.count, self.size)
        vector.index_add_(0, rows.user, items * left[:, None])
        for part in torch.arange(len(left), device=left.device).split(ROWS_AT_ONCE):
            matrix.index_add_(0, rows.user[part], items[part, :, None] * items[part, None])
        counts = torch.bincount(rows.user, minlength=rows.count).clamp(min=1)
        matrix.diagonal(dim1=1, dim2=2).add_(max(reg_weight, LEAST_RIDGE) * counts[:, None])
        return torch.linalg.solve(matrix, vector).to(self.user_embedding.weight)

    def tables(self, items: bool) -> list[nn.Parameter]:
        """The parameters of the users, and with ``items`` those of the items too."""
        return [value for name, value in self.named_parameters()
                if items or name.startswith("user")]

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Predicted ratings (b,) of pairs."""
        products = (self.user_factors(user) * self.item_factors(item)).sum(-1)
        return products + self.item_offset(item)

    def penalty(self, user: Tensor, item: Tensor) -> Tensor:
        """Mean over the batch of |p_u|^2 + |q_i|^2, and b_u^2 + b_i^2 where there are biases."""
        squares = self.user_factors(user).square().sum(-1)
        squares = squares + self.item_embedding(item).square().sum(-1)
        if self.biases:
            squares = squares + self.item_bias(item).squeeze(-1).square()
        return squares.mean()

    def loss(self, user: Tensor, item: Tensor, rating: Tensor, reg_weight: float) -> Tensor:
        """Squared error, plus ``reg_weight`` times the penalty: a scalar."""
        error = nn.functional.mse_loss(self(user, item), rating)
        return error + reg_weight * self.penalty(user, item) if reg_weight else error


def factorization_stages(model: StagedRecommender, domains: dict[str, Factorization]) -> list[Stage]:
    """A stage for each base factorisation, named as the domain whose ratings it iterates.

    The papers train them for a fixed number of epochs. The same seed gives the same ones to every
    model that stands on them, whatever it clips or decays later.

    Args:
        model: says how (``pretrain_epochs``, ``pretrain_batch_size``, ``pretrain_learning_rate``,
            ``reg_weight``).
        domains: ``source``, ``target`` -> factorisation, in the order of the stages.
    """
    return [Stage(name, name, (partial(factorization_loss, model, factorization),),
                  factorization.parameters(), model.pretrain_epochs, validates=False, clips=False,
                  batch_size=model.pretrain_batch_size, learning_rate=model.pretrain_learning_rate,
                  weight_decay=0.0)
            for name, factorization in domains.items()]


def factorization_loss(model: StagedRecommender, factorization: Factorization, interaction) -> Tensor:
    """Regularised squared error of a batch of ratings."""
    return factorization.loss(interaction[model.USER_ID], interaction[model.ITEM_ID],
                              interaction[model.RATING], model.reg_weight)
