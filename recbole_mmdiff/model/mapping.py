"""What the embedding-and-mapping models share: two base factorisations, and cold users' vectors."""

import itertools
from functools import partial

import torch
from torch import Tensor, nn

from recbole_mmdiff.data.ids import id_mask
from recbole_mmdiff.model.base import (
    Stage,
    StagedRecommender,
    finetuned_users,
    overlap_training_users,
)
from recbole_mmdiff.model.factorization import (
    Factorization,
    factorization_loss,
    factorization_stages,
)
from recbole_mmdiff.model.forgetful import Forgetful
from recbole_mmdiff.model.new_users import SourceRows


class MappingRecommender(Forgetful, StagedRecommender):
    """Base of models that carry a user's source vector into the target space.

    Stage ``source`` and stage ``target`` factorise the two domains apart. A subclass adds the stage
    that learns ``transfer`` from the overlapping training users, on vectors that are standardised
    in each domain (``standardize``). A user without target training rows is then scored by the
    transferred vector, a user with some by the vector trained on them.
    """

    needs_source = True
    domain_views = ("target",)

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.reg_weight = config["reg_weight"]
        self.pretrain_epochs = config["pretrain_epochs"]
        self.pretrain_batch_size = config["pretrain_batch_size"]
        self.pretrain_learning_rate = config["pretrain_learning_rate"]
        self.standardize = config["standardize"]
        shape = (self.RATING, config["embedding_size"], config["biases"], config["init_std"])
        self.source = Factorization(dataset.source, *shape)
        self.target = Factorization(dataset, *shape)
        self.size = self.target.size
        for domain in ("source", "target"):
            self.register_buffer(f"{domain}_center", torch.zeros(self.size))
            self.register_buffer(f"{domain}_scale", torch.ones(self.size))
        self.register_buffer("mean_user", torch.zeros(self.size))
        self.frozen: dict[str, Tensor] = {}
        trained = id_mask(dataset.users_with_rows(), dataset.user_num)
        known = id_mask(dataset.source.inter_feat[dataset.source.uid_field], dataset.user_num)
        self.register_buffer("is_transferred", known & ~trained)
        self.register_buffer("is_unknown", ~known & ~trained)
        self.register_buffer("is_finetuned", finetuned_users(dataset))
        self.register_buffer("overlap_users", overlap_training_users(dataset, config["model"]))

    def forget(self) -> None:
        """The standardised vectors are computed anew."""
        self.frozen.clear()

    def cautions(self, test_users: Tensor) -> list[str]:
        """That nobody of the test users (n,) is transferred."""
        if self.is_transferred[test_users].any():
            return []
        return [f"no test user of this split is cold: {type(self).__name__} transfers cold users only, and "
                f"scores all others by its target factorisation"]

    def transfer(self, user: Tensor) -> Tensor:
        """(b, size): standardised target vectors of users (b,), from their source vectors."""
        return self.mapped(self.source_vectors(user), user)

    def mapped(self, vectors: Tensor, user: Tensor) -> Tensor:
        """(b, size): standardised target vectors out of standardised source vectors (b, size); ``user`` (b,)
        are ids, of which noise is drawn."""
        raise NotImplementedError

    @torch.no_grad()
    def vectors_of_new_users(self, rows: SourceRows) -> Tensor:
        """(count, size): the source vectors of new users, by ridge regression on the source items
        (``Factorization.fitted_user_factors``), transferred as those of cold users are.

        Users of the training have the vectors where gradient descent stopped, not quite those of the
        minimum: the two are near, not equal.

        Raises:
            ConfigError: what the model transfers is not a vector alone.
        """
        if type(self).transfer is not MappingRecommender.transfer:
            return super().vectors_of_new_users(rows)
        factors = self.source.fitted_user_factors(rows, self.reg_weight)
        vectors = (factors - self.source_center) / self.source_scale
        ids = self.n_users + torch.arange(rows.count, device=factors.device)
        return self.in_target_space(self.mapped(vectors, ids))

    def pretraining_stages(self) -> list[Stage]:
        """The two base factorisations."""
        return factorization_stages(self, {"source": self.source, "target": self.target})

    def finetuning_stage(self) -> Stage:
        """Target ratings move the vectors of the held-out users on from the transferred ones."""
        loss = partial(factorization_loss, self, self.target)
        return self._finetuning(loss, self.target.tables(self.finetune_items),
                                prepare=self.start_from_transferred)

    @torch.no_grad()
    def start_from_transferred(self) -> None:
        """The start of fine-tuning: users with rows for it leave their transferred vectors in the
        table that is trained. Nothing is left to do after a resume inside of the stage."""
        users = (self.is_transferred & self.is_finetuned).nonzero().squeeze(-1)
        if len(users):
            self.target.set_user_factors(users, self.user_factors(users))
            self.is_transferred[users] = False

    @torch.no_grad()
    def freeze_spaces(self) -> None:
        """The start of the transfer stage: centre and scale of both spaces from the overlapping
        training users, and the standardised vectors of all users, which no longer change."""
        self.forget()
        self.mean_user.copy_(self.target.user_factors(self.overlap_users).mean(0))
        for domain in ("source", "target"):
            if self.standardize:
                factors = getattr(self, domain).user_factors(self.overlap_users)
                getattr(self, f"{domain}_center").copy_(factors.mean(0))
                getattr(self, f"{domain}_scale").copy_(factors.std(0).clamp(min=1e-6))
            # All of them: the users of the source domain alone come after those of the target.
            count = getattr(self, domain).user_embedding.num_embeddings
            self.frozen[domain] = self._vectors(domain, torch.arange(count, device=self.device))

    def _vectors(self, domain: str, user: Tensor) -> Tensor:
        if domain in self.frozen:
            return self.frozen[domain].index_select(0, user)    # Several times faster than indexing.
        factors = getattr(self, domain).user_factors(user).detach()
        return (factors - getattr(self, f"{domain}_center")) / getattr(self, f"{domain}_scale")

    def source_vectors(self, user: Tensor) -> Tensor:
        """(b, size): standardised source vectors of users (b,); no gradient."""
        return self._vectors("source", user)

    def target_vectors(self, user: Tensor) -> Tensor:
        """(b, size): standardised target vectors of users (b,); no gradient."""
        return self._vectors("target", user)

    def in_target_space(self, vectors: Tensor) -> Tensor:
        """Undo the standardisation of target vectors (b, size)."""
        return vectors * self.target_scale + self.target_center

    def transferred_vectors(self, user: Tensor) -> Tensor:
        """(b, size): what pictures show beside true target vectors of users (b,)."""
        return self.in_target_space(self.transfer(user))

    def user_factors(self, user: Tensor) -> Tensor:
        """(b, size): transferred vectors of cold users, trained ones of the others; the mean of the
        overlapping users for who has no row in either domain."""
        factors = torch.where(self.is_unknown[user, None], self.mean_user,
                              self.target.user_factors(user))
        cold = self.is_transferred[user]
        if cold.any():
            factors[cold] = self.in_target_space(self.transfer(user[cold])).to(factors.dtype)
        return factors

    def item_factors(self, item: Tensor) -> Tensor:
        """(b, size): target item vectors."""
        return self.target.item_factors(item)

    def item_offset(self, item: Tensor) -> Tensor:
        """(b,): 0, or mean rating plus item bias."""
        return self.target.item_offset(item)


def perceptron(sizes: list[int], activation: type[nn.Module], bias: bool) -> nn.Sequential:
    """Linear layers of these sizes with an activation between them."""
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        layers += [activation()] * bool(number) + [nn.Linear(inputs, outputs, bias=bias)]
    return nn.Sequential(*layers)
