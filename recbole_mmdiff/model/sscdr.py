"""SSCDR: semi-supervised cross-domain recommendation."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.diffusion import fold_in, keyed_uniform
from recbole_mmdiff.errors import ConfigError, DataError, one_of
from recbole_mmdiff.graph import mean_of_items, propagate
from recbole_mmdiff.model.base import Stage
from recbole_mmdiff.model.mapping import MappingRecommender, perceptron
from recbole_mmdiff.negatives import KnownItems


class SSCDR(MappingRecommender):
    """Learn the map of user vectors from overlapping users, and from the source items they like.

    Two factorisations are trained apart. The supervised loss is the mean of |f(u_s) - u_t|^2 over
    the overlapping training users. The unsupervised one takes for each of them a source item j that
    the user likes (rating from ``positive_rating`` up) and one, k, that the user has not rated:
    max(0, margin + d(u_t, f(v_j)) - d(u_t, f(v_k))), d the squared distance of vectors clipped to
    the unit ball; its weight is ``triplet_weight`` (lambda). So f also carries source items to where
    their users are in the target space. f is a perceptron with tanh between its layers.

    Multi-hop inference starts from f of all users and items of the source domain; in each of
    ``hops`` steps every vector becomes the mean of itself and of its neighbours' mean (users and the
    items they like are neighbours). 0 takes f(u_s) alone.

    Deviations:
        - The paper's spaces are metric ones (CML): rank by distance. Here the base is the matrix
          factorisation that the papers which compare with SSCDR by MAE (DiffCDR, MuSiC, MMDCDR)
          give to all models.
        - There an item vector [q_i, 1] is a direction, not a point among the users. With
          ``item_points: likers`` v_j is the mean of the standardised source vectors of the users
          who like j, which minimises the squared distances to them: where a metric space would put
          it (an item that nobody likes is at zero, the mean overlapping user). ``factors`` takes
          the factorisation's own vector as DiffCDR's comparison does, times the scale of the users,
          so that products with standardised users keep their order.
        - f is linear by default (``mapping_hidden_sizes: []``), as DiffCDR's comparison has it.
        - No hops by default: on ratings they cost accuracy. All neighbours count, none is sampled,
          and a vector weighs as much as its neighbours together, so that it does not drown in them.
        - Triplets are drawn by (seed, epoch, sample), one a user and epoch. A user who likes no
          source item, or has rated all, has none.
        - The base has biases and an L2 penalty, [p_u, b_u] is transferred, and vectors are
          standardised in each domain (``biases``, ``reg_weight``, ``standardize``), as in EMCDR.
        - The best epoch is chosen on validation users.
    """

    citation = ("Kang, Hwang, Lee and Yu: Semi-Supervised Learning for Cross-Domain Recommendation "
                "to Cold-Start Users. CIKM 2019.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.epochs = config["epochs"]
        self.margin, self.triplet_weight = config["margin"], config["triplet_weight"]
        self.hops = config["hops"]
        for key in ("margin", "triplet_weight", "hops"):
            if config[key] < 0:
                raise ConfigError(f"{key}: {config[key]!r} is negative, use 0 or more")
        self.item_points = one_of("item_points", config["item_points"], ("likers", "factors"))
        sizes = [self.size, *config["mapping_hidden_sizes"], self.size]
        self.mapping = perceptron(sizes, nn.Tanh, bias=config["mapping_bias"])
        source = dataset.source
        liked, rows = source.positive_rows(), source.inter_feat
        if not liked.any() and (self.triplet_weight or self.hops):
            raise DataError(f"positive_rating: no rating of {source.dataset_name} reaches "
                            f"{config['positive_rating']}, so SSCDR has no liked item to learn from")
        user, item = rows[source.uid_field], rows[source.iid_field]
        sizes = source.user_num, source.item_num
        self.known = KnownItems(user, item, *sizes)
        self.liked = KnownItems(user[liked], item[liked], *sizes)
        means = {"items": mean_of_items(user[liked], item[liked], *sizes),
                 "likers": mean_of_items(item[liked], user[liked], *sizes[::-1])}
        for name, matrix in means.items():
            self.register_buffer(f"mean_of_{name}", matrix, persistent=False)

    def stages(self) -> list[Stage]:
        """The two factorisations, then the mapping over overlapping users."""
        mapping = Stage("mapping", "overlap_users", (self.mapping_loss,), self.mapping.parameters(),
                        self.epochs, prepare=self.freeze_spaces)
        return [*self.pretraining_stages(), mapping]

    def train(self, mode: bool = True) -> "SSCDR":
        """Switch the mode; the mapping may change now, and with it what was inferred by it."""
        self.frozen.pop("inferred", None)
        return super().train(mode)

    def mapping_loss(self, interaction) -> Tensor:
        """Supervised plus weighted unsupervised loss of a batch of overlapping users: a scalar."""
        user = interaction[self.USER_ID]
        loss = functional.mse_loss(self.mapping(self.source_vectors(user)), self.target_vectors(user))
        if self.triplet_weight:
            loss = loss + self.triplet_weight * self.triplet_loss(user, interaction["sample_id"])
        return loss

    def triplet_loss(self, user: Tensor, sample_id: Tensor) -> Tensor:
        """Mean hinge over the users (b,) that have a triplet (0 if none has): a scalar."""
        place, liked, unknown = self.sample_items(user, sample_id)
        target = clip_to_ball(self.target_vectors(user[place]))
        near, far = (clip_to_ball(self.mapping(self.source_item_vectors()[item]))
                     for item in (liked, unknown))
        hinge = self.margin + (target - near).square().sum(-1) - (target - far).square().sum(-1)
        return hinge.relu().sum() / max(len(place), 1)

    def sample_items(self, user: Tensor, sample_id: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw triplets for users (b,) by their sample numbers (b,): places in the batch, liked
        items and unknown items, (m,) each, m <= b."""
        known, liked = self.known.to(user.device), self.liked.to(user.device)
        drawable = (liked.counts[user] > 0) & (known.counts[user] < known.num_items - 1)
        place = drawable.nonzero().squeeze(-1)
        user = user[place]
        uniform = keyed_uniform(sample_id[place], 2, fold_in(self.seed, self.epoch), torch.float64)
        nth = (uniform[:, 0] * liked.counts[user]).long()
        positive = liked.items[liked.starts[user] + nth]
        return place, positive, known.sample_unknown(user, uniform[:, 1:]).squeeze(-1)

    @torch.no_grad()
    def source_item_vectors(self) -> Tensor:
        """(source items, size): v_j of all items beside the source users' vectors; no gradient."""
        if "items" not in self.frozen:
            items = torch.arange(self.liked.num_items, device=self.device)
            points = self.source.item_factors(items) * self.source_scale
            if self.item_points == "likers":
                points = propagate(self.mean_of_likers, self._source_user_vectors())
            self.frozen["items"] = points
        return self.frozen["items"]

    def _source_user_vectors(self) -> Tensor:
        return self.source_vectors(torch.arange(len(self.liked.counts), device=self.device))

    def _neighbour_mean(self, matrix: Tensor, vectors: Tensor, default: Tensor) -> Tensor:
        """The means of ``vectors`` that a matrix (rows, n) takes; ``default`` (rows, size) for who
        has no neighbours."""
        alone = matrix.crow_indices().diff() == 0
        return torch.where(alone[:, None], default, propagate(matrix, vectors))

    @torch.no_grad()
    def inferred(self) -> Tensor:
        """(source users, size): multi-hop target vectors of all users of the source domain."""
        if "inferred" in self.frozen:
            return self.frozen["inferred"]
        users = self.mapping(self._source_user_vectors())
        items = self.mapping(self.source_item_vectors())
        for _ in range(self.hops):
            users, items = ((users + self._neighbour_mean(self.mean_of_items, items, users)) / 2,
                            (items + self._neighbour_mean(self.mean_of_likers, users, items)) / 2)
        if not self.training:
            self.frozen["inferred"] = users
        return users

    def transfer(self, user: Tensor) -> Tensor:
        """(b, size): f(u_s), averaged over ``hops`` rings of neighbours."""
        return self.inferred()[user] if self.hops else self.mapping(self.source_vectors(user))


def clip_to_ball(vectors: Tensor) -> Tensor:
    """(b, k) vectors, those longer than 1 shortened to it."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1)
