"""GOUM: the users of two domains matched, as a plug-in to a recommender of each."""

from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_mmdiff.data.domain import select
from recbole_mmdiff.errors import ConfigError, in_words_of
from recbole_mmdiff.model.matched import MatchedRecommender
from recbole_mmdiff.model.pairwise import PairwiseRecommender
from recbole_mmdiff.model.registry import MODELS, get_model
from recbole_mmdiff.model.representations import Representations


class GOUM(MatchedRecommender):
    """Two models of one domain each (``backbone``), and SIEOUG's loss between users who are matched.

    LATTICE+GOUM of the paper's Figure 5 is ``backbone: LATTICE``. Each domain learns by its backbone's own
    loss, keys and negatives; users' vectors are drawn to what they are matched with in the other domain
    (``UserGuidance``). Scores are the backbone's. Both domains are evaluated (dual target).

    Deviations:
        - Keys are the same in both domains.
        - A user without training rows in a domain has the vector of the other domain, at the usual length, if
          linked and with rows there, else (and without matching) the mean of the others.
        - An epoch is the larger domain. The best epoch is chosen by the mean of both domains.
    """

    reads_sampler = True

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        made = self.backbone_class(config["backbone"])
        source = select(dataset.source, dataset.source.positive_rows())
        self.domains = nn.ModuleDict({
            name: made(config, domain) for name, domain in (("target", dataset), ("source", source))})

    @staticmethod
    def backbone_class(name) -> type[PairwiseRecommender]:
        """The class of a backbone by its name.

        Raises:
            ConfigError: there is no such model, or it has no vectors of all users beside its loss.
        """
        if not isinstance(name, str):
            raise ConfigError(f"backbone: {name!r} is no name of a model, write for instance LATTICE")
        with in_words_of("backbone"):
            found = get_model(name)
        if not _fits(found):
            known = [model for model in MODELS if _fits(get_model(model))]
            raise ConfigError(f"backbone: {name!r} cannot be matched, use one of {known}, or a class of your "
                              f"own that extends recbole_mmdiff.model.pairwise.PairwiseRecommender")
        return found

    def before_epoch(self, epoch: int) -> None:
        """Of both backbones."""
        for backbone in self.domains.values():
            backbone.seed, backbone.epoch = self.seed, epoch
            backbone.before_epoch(epoch)
        super().before_epoch(epoch)

    def after_epoch(self, epoch: int) -> None:
        """Of both backbones."""
        super().after_epoch(epoch)
        for backbone in self.domains.values():
            backbone.after_epoch(epoch)

    def domain_loss(self, name: str, rows: dict[str, Tensor]) -> tuple[Tensor, Representations]:
        """The backbone's loss."""
        backbone = self.domains[name]
        tables = backbone.representations()
        return backbone.loss_of(Interaction(rows), tables), tables

    def has_rows(self, name: str) -> Tensor:
        """(n_users,) bool: the users with training rows in a domain."""
        return self.domains[name].is_trained


def _fits(model_class: type) -> bool:
    """Whether a model's loss follows from the vectors of all users and items."""
    return issubclass(model_class, PairwiseRecommender) \
        and model_class.ranking_loss is PairwiseRecommender.ranking_loss
