"""SIEOUG: joint similarity item exploration and overlapped user guidance."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.ids import id_mask
from recbole_mmdiff.data.loaders import rows_of_both_domains
from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.distributed import by_parts
from recbole_mmdiff.graph import bipartite_adjacency
from recbole_mmdiff.model.base import take
from recbole_mmdiff.model.dual import DOMAINS
from recbole_mmdiff.model.item_exploration import ExploresItems, ItemExploration
from recbole_mmdiff.model.matched import MatchedRecommender
from recbole_mmdiff.model.new_users import SourceRows
from recbole_mmdiff.model.representations import Representations, lightgcn
from recbole_mmdiff.negatives import KnownItems


class SIEOUG(ExploresItems, MatchedRecommender):
    """Two domains, each with an item graph and a hypergraph, whose users are matched by transport.

    In each domain: LightGCN on the graph of users and items (Eq. 11); item vectors of it, of the fused
    graph of similar items, and of groups of items, joined by attention (``ItemExploration``). The
    contrastive collaborative filtering loss sets a row's item against the other items of the batch, by the
    cosine (Eq. 16). Users of both domains are matched (GOUM), and drawn to what they are matched with
    (``UserGuidance``). L = L_R of the source + L_R of the target + ``guidance_weight`` * L_C (Eq. 24).
    Scores are cosines. Both domains are evaluated (dual target).

    Ablations: ``matching: none`` is SIEOUG-O, ``links`` SIEOUG-M, ``gromov`` SIEOUG-G; ``guidance: none``
    is plain Sinkhorn. Ours: ``guided_users: linked`` draws linked users alone.

    Deviations:
        - The hypergraph has D_E^-1 where Eq. 13 prints D_E^-1/2, which lets vectors grow in every layer. Its
          weights are d x d, and start as identities.
        - SISHE starts from k-means, and from a larger eta (``anneal_from``): at the paper's start, equal
          shares of all clusters, nothing moves. With two modalities RISGF is their mean, whatever mu is.
        - Of Eq. 15 the users' term is left out: it is the same in all three weights and cancels out.
        - Negatives of Eq. 16 are the other items of the batch that the user has in no training row; those of
          Eq. 23 all other users of the batch but for the linked and the most probable partner. Both losses
          are means over users, not sums.
        - A share ``linked_share`` (all by default) of a batch's linked users with rows in both domains is put
          into both halves of what is matched. Two random batches have next to no linked user in common, and
          guidance would vanish.
        - Users are matched by vectors of length 1 (``cost_scale``), marginals are 1 / n and 1 / m, and
          epsilon is .1: see ``match_users``.
        - A user without training rows in a domain has the vector of the other domain, if linked and with rows
          there, else (and in SIEOUG-O) the mean of the others.
        - An epoch is the larger domain. The best epoch is chosen by the mean of both domains.
    """

    cosine = True

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.temperature = config["temperature"]
        self.positive_rating = dataset.source.config["positive_rating"]
        size, num_layers = config["embedding_size"], config["num_layers"]
        self.domains = nn.ModuleDict()
        both = zip(DOMAINS, (dataset, dataset.source), rows_of_both_domains(config, dataset), strict=True)
        for name, domain, rows in both:
            exploration = self.exploration_of(config, domain, size, num_layers)
            self.domains[name] = Domain(domain, rows, exploration, size, num_layers)

    def domain_loss(self, name: str, rows: dict[str, Tensor]) -> tuple[Tensor, Representations]:
        """L_R of a domain's rows (Eq. 16)."""
        domain = self.domains[name]
        tables = domain.representations()
        return domain.contrastive_loss(rows[self.USER_ID], rows[self.ITEM_ID], tables,
                                       self.temperature), tables

    @torch.no_grad()
    def vectors_of_new_users(self, rows: SourceRows) -> Tensor:
        """(count, d): of users outside of the training, out of their positive source rows.

        They enter the source graph as new nodes (``Domain.vectors_of_new_nodes``), and have the vector that
        they have there, as a linked user without target rows; without guidance, or a positive row, the mean
        of the target's users. A user of the training also has a learned start vector, which is zero here:
        the two are near, not equal.
        """
        target = self.representations("target").users[self.has_rows("target")].mean(0)
        found = self.domains["source"].vectors_of_new_nodes(rows.positive(self.positive_rating))
        known = (found != 0).any(1, keepdim=True) if self.guides else torch.zeros_like(found[:, :1]).bool()
        return functional.normalize(torch.where(known, found, target), dim=-1)

    @torch.no_grad()
    def vectors_of_new_items(self, items: NewItems) -> tuple[Tensor, Tensor]:
        """Of target items outside of the training: ``ItemExploration.of_new_items``, at length 1."""
        domain = self.domains["target"]
        found = domain.exploration.of_new_items(domain.item_embedding.weight, items)
        return functional.normalize(found, dim=-1), found.new_zeros(len(items))

    def has_rows(self, name: str) -> Tensor:
        """(n_users,) bool: the users with training rows in a domain."""
        return self.domains[name].has_rows


class Domain(nn.Module):
    """The users and items of one domain (section 3.2).

    Args:
        dataset: the training part of the domain.
        rows: its training rows: users and items that interacted.
        exploration: of its items.
        size: d, length of the vectors.
        num_layers: of LightGCN.
    """

    def __init__(self, dataset, rows, exploration: ItemExploration, size: int, num_layers: int):
        super().__init__()
        users, items = rows[dataset.uid_field], rows[dataset.iid_field]
        count = dataset.user_num, dataset.item_num
        self.num_layers, self.exploration = num_layers, exploration
        self.user_embedding, self.item_embedding = (nn.Embedding(number, size) for number in count)
        for table in (self.user_embedding, self.item_embedding):
            nn.init.xavier_uniform_(table.weight)
        self.register_buffer("adjacency", bipartite_adjacency(users, items, *count), persistent=False)
        self.register_buffer("has_rows", id_mask(users, count[0]), persistent=False)
        self.known = KnownItems(users, items, *count)

    def representations(self) -> Representations:
        """U and V (Eqs. 11 to 15)."""
        start = self.item_embedding.weight
        found = lightgcn(self.adjacency, self.user_embedding.weight, start, self.num_layers)
        return Representations(found.users, self.exploration(start, found.items))

    def vectors_of_new_nodes(self, rows: SourceRows) -> Tensor:
        """(count, d): U of users outside of the graph; 0 without an item of the training rows.

        One step of propagation (Eq. 11): layer l of a user is the sum over the d_u items of layer l - 1 of
        each over sqrt(d_u d_i), and layer 0, which would be learned, is zero. Items stay as they are.
        """
        layers = lightgcn(self.adjacency, self.user_embedding.weight, self.item_embedding.weight,
                          self.num_layers).layers
        degrees = torch.bincount(self.known.to(rows.item.device).items, minlength=len(layers[0]))
        rows = rows.where(degrees[rows.item] > 0)
        own = torch.bincount(rows.user, minlength=rows.count)
        weights = (own[rows.user] * degrees[rows.item]).to(layers[0].dtype).rsqrt()
        steps = sum(layers[1:-1], start=layers[0])
        total = steps.new_zeros(rows.count, steps.shape[1])
        total.index_add_(0, rows.user, weights[:, None] * steps[rows.item])
        return total / (self.num_layers + 1)

    def contrastive_loss(self, users: Tensor, items: Tensor, tables: Representations,
                         temperature: float) -> Tensor:
        """L_R (Eq. 16) of rows (b,), a scalar."""
        self.known.to(users.device)
        vectors = functional.normalize(take(tables.users, users), dim=-1)
        candidates, place = torch.unique(items, return_inverse=True)
        others = functional.normalize(take(tables.items, candidates), dim=-1).T / temperature

        def losses_of(users: Tensor, vectors: Tensor, place: Tensor) -> Tensor:
            scores, known = vectors @ others, self.known.among(users, candidates)
            # Not minus infinity: of nothing but these, the gradient would be no number.
            negatives = scores.masked_fill(known, torch.finfo(scores.dtype).min).logsumexp(1)
            return (negatives - scores.gather(1, place[:, None])[:, 0]).where(~known.all(1), 0)

        return by_parts(losses_of, users, vectors, place).mean()
