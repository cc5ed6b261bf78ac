"""What every model of ours is: a RecBole recommender that declares its stages of training."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType, ModelType
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.data.ids import id_mask
from recbole_mmdiff.data.new_items import NewItems
from recbole_mmdiff.errors import ConfigError, DataError
from recbole_mmdiff.model.new_users import SourceRows


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: unique in the model; part of the checkpoint.
        data: what is iterated, one of ``recbole_mmdiff.data.loaders.STAGE_DATA``.
        losses: functions from a batch (RecBole Interaction) to a scalar tensor. Each is followed
            by a step of the optimiser before the next is computed.
        parameters: what the optimiser of this stage changes.
        epochs: at most so many.
        validates: whether validation (and early stopping) happens; False keeps the last epoch.
        batch_size, learning_rate, weight_decay: None takes the key ``train_batch_size``,
            ``learning_rate``, ``weight_decay``.
        by_user: the rows come in batches of ``batch_size`` users with all of their rows.
        clips: whether ``clip_grad_norm`` holds in this stage.
        keeps_start: whether the weights that it starts from are validated too, and may be the best.
        prepare: called once when the stage starts, also after a resume: must depend on the
            weights of earlier stages only.
        before_epoch, after_epoch: called with the number of each epoch: before it (also of the
            first after a resume), and after its last batch, before the validation.
    """

    name: str
    data: str
    losses: tuple[Callable[..., Tensor], ...]
    parameters: Iterable[nn.Parameter]
    epochs: int
    validates: bool = True
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    by_user: bool = False
    clips: bool = True
    keeps_start: bool = False
    prepare: Callable[[], None] | None = None
    before_epoch: Callable[[int], None] | None = None
    after_epoch: Callable[[int], None] | None = None


class StagedRecommender(GeneralRecommender):
    """Base of our models.

    A subclass sets ``citation``, says in its docstring where it deviates from its paper, and
    implements ``stages``, ``predict`` and ``full_sort_predict``.

    Attributes:
        citation: the paper, as the model's page prints it.
        needs_source: whether it transfers from a source domain and cannot do without.
        uses_source: whether it reads the source domain's ratings where there is one.
        predicts_ratings: whether ``predict`` is on the scale of the ratings.
        reads_sampler: whether ``negative_sampler`` and ``num_negatives`` have an effect.
        domain_view, domain_views: the view of the data that it is trained on by default, and
            those that it can be trained on (``target``, ``merged``).
        seed, epoch: of this stage, set by the trainer, for noise drawn by (seed, epoch, sample).
    """

    type = ModelType.GENERAL
    input_type = InputType.POINTWISE
    citation = ""
    needs_source = False
    uses_source = False
    predicts_ratings = True
    reads_sampler = False
    domain_view = "target"
    domain_views = ("target", "merged")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.RATING = config["RATING_FIELD"]
        self.seed, self.epoch = config["seed"], 0
        self.finetune_epochs = config["finetune_epochs"]
        self.finetune_learning_rate = config["finetune_learning_rate"]
        self.finetune_items = config["finetune_items"]
        if self.predicts_ratings and self.RATING not in dataset.inter_feat:
            raise DataError(
                f"{config['model']} learns ratings, but the column {self.RATING!r} is not loaded; "
                f"add it to load_col.inter, or set RATING_FIELD to the column that holds them")

    def stages(self) -> list[Stage]:
        """The stages of training, in order; an empty list if nothing is trained by gradient."""
        raise NotImplementedError

    def finetuning_stage(self) -> Stage | None:
        """The stage after all others under ``split_protocol: warm_start``, which learns from the
        earlier target rows of the held-out users (validation users too, so that its best epoch is
        chosen on their later rows); None if the model takes those rows in otherwise.

        Raises:
            ConfigError: the model cannot be fine-tuned.
        """
        raise ConfigError(f"finetune_epochs: {type(self).__name__} cannot be fine-tuned; set it to 0, "
                          f"which leaves the held-out users cold")

    def cautions(self, test_users: Tensor) -> list[str]:
        """What to tell before a run whose test users are these (n,): a line each."""
        return []

    def _finetuning(self, loss: Callable[..., Tensor], parameters: Iterable[nn.Parameter],
                    prepare: Callable[[], None] | None = None) -> Stage:
        # A decay would move the vectors of everybody else, too.
        return Stage("finetune", "finetune", (loss,), parameters, self.finetune_epochs, clips=False,
                     learning_rate=self.finetune_learning_rate, weight_decay=0.0, keeps_start=True,
                     prepare=prepare)

    def calculate_loss(self, interaction) -> Tensor:
        """The loss of the last stage, so that RecBole's own trainer can use a one-stage model."""
        return sum(loss(interaction) for loss in self.stages()[-1].losses)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Predicted ratings (b,) of pairs of users (b,) and items (b,)."""
        users, items = self.user_factors(user), self.item_factors(item)
        return (users * items).sum(-1) + self.item_offset(item)

    def user_factors(self, user: Tensor) -> Tensor:
        """(b, k): the vectors that items are scored with, for users (b,)."""
        raise NotImplementedError

    def item_factors(self, item: Tensor) -> Tensor:
        """(b, k): the vectors of items (b,)."""
        raise NotImplementedError

    def item_offset(self, item: Tensor) -> Tensor:
        """(b,): what is added to the score of items (b,) for every user."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, interaction) -> Tensor:
        """Predicted ratings (b,) of the rows of an Interaction."""
        users, place = torch.unique(interaction[self.USER_ID], return_inverse=True)
        items = interaction[self.ITEM_ID]
        scores = (self.user_factors(users)[place] * self.item_factors(items)).sum(-1)
        return scores + self.item_offset(items)

    @torch.no_grad()
    def full_sort_predict(self, interaction) -> Tensor:
        """Scores of all items for the users of an Interaction, (b * n_items,)."""
        return self.score_items(self.user_factors(interaction[self.USER_ID])).view(-1)

    @torch.no_grad()
    def score_items(self, users: Tensor) -> Tensor:
        """(b, n_items): scores of all items for users with these vectors (b, k)."""
        items = torch.arange(self.n_items, device=self.device)
        return (users @ self.item_factors(items).T).add_(self.item_offset(items))

    def vectors_of_new_users(self, rows: SourceRows) -> Tensor:
        """(count, k): what ``user_factors`` would be of users outside of the training, out of what they
        rated in the source domain.

        Raises:
            ConfigError: the model cannot tell them.
        """
        raise ConfigError(f"new users: {type(self).__name__} makes no vectors of users out of source ratings "
                          f"alone; train it with them, or use MMDCDR, MuSiC, DiffCDR, EMCDR, LACDR or SIEOUG")

    def vectors_of_new_items(self, items: NewItems) -> tuple[Tensor, Tensor]:
        """(m, k) and (m,): what ``item_factors`` and ``item_offset`` would be of items outside of the
        training, out of their features.

        Raises:
            ConfigError: the model cannot tell them.
        """
        raise ConfigError(f"new items: {type(self).__name__} makes no vectors of items out of features "
                          f"alone; train it with them, or use MMDCDR, MuSiC, P2M2CDR, SIEOUG, CCDRec (on "
                          f"FREEDOM or LATTICE), FREEDOM, LATTICE or VBPR")


class OffsetRecommender(StagedRecommender):
    """Base of models that compute the vectors of users: fine-tuning learns what is added to them.

    A subclass sets ``user_offset``, a ``FinetunedOffset``, and ``reg_weight``, and implements
    ``computed_user_factors``.
    """

    def finetuning_stage(self) -> Stage:
        """What is learned is added to the vectors of the held-out users; of the items, which are
        computed too, ``finetune_items`` moves the biases alone."""
        parameters = [*self.user_offset.parameters(),
                      *(self.item_bias_parameters() if self.finetune_items else ())]
        return self._finetuning(self.finetuning_loss, parameters)

    def finetuning_loss(self, interaction) -> Tensor:
        """Squared error of target ratings."""
        user, item = interaction[self.USER_ID], interaction[self.ITEM_ID]
        with torch.no_grad():
            users, place = torch.unique(user, return_inverse=True)
            factors, items = self.computed_user_factors(users)[place], self.item_factors(item)
        offset = self.user_offset(user)
        scores = ((factors + offset) * items).sum(-1) + self.item_offset(item)
        penalty = offset.square().sum(-1).mean()
        return functional.mse_loss(scores, interaction[self.RATING]) + self.reg_weight * penalty

    def user_factors(self, user: Tensor) -> Tensor:
        """(b, k): computed vectors of users, and what fine-tuning added to them."""
        return self.computed_user_factors(user) + self.user_offset(user)

    def computed_user_factors(self, user: Tensor) -> Tensor:
        """(b, k): the vectors of users (b,) before fine-tuning."""
        raise NotImplementedError

    def item_bias_parameters(self) -> Iterable[nn.Parameter]:
        """The learned biases of target items."""
        raise NotImplementedError


def finetuned_users(dataset) -> Tensor:
    """(users,): whether a user has target rows that are set aside for fine-tuning."""
    finetune = getattr(dataset, "finetune", None)
    users = torch.zeros(0, dtype=torch.int64) if finetune is None \
        else finetune.inter_feat[finetune.uid_field]
    return id_mask(users, dataset.user_num)


def overlap_training_users(dataset, model: str) -> Tensor:
    """Ids (n,) of the users that ``model`` learns to transfer from.

    Raises:
        DataError: there are fewer than two.
    """
    users = dataset.overlap_users()
    if len(users) < 2:
        raise DataError(f"{model} learns to map from overlapping training users, but there are "
                        f"{len(users)}; lower test_user_ratio, or raise overlap_ratio")
    return users


class FinetunedOffset(nn.Module):
    """Vectors (size,) that fine-tuning adds to those of held-out users; nothing without such users.

    Zero at first, so that fine-tuning starts from what the model predicts without it. There is a row
    for every linked user, so that even its shape tells nothing of who is held out.
    """

    def __init__(self, dataset, size: int):
        super().__init__()
        self.num_linked = getattr(dataset, "num_overlap", 0)
        rows = torch.zeros(self.num_linked + 1, size)
        self.table = nn.Parameter(rows) if getattr(dataset, "finetune", None) is not None else None

    def forward(self, user: Tensor) -> Tensor | float:
        """(b, size): what is added to the vectors of users (b,)."""
        if self.table is None:
            return 0.0
        # Row 0 is everybody else's, and stays.
        return take(self.table, torch.where(user <= self.num_linked, user, 0))


def take(vectors: Tensor, place: Tensor) -> Tensor:
    """The rows of ``vectors`` (n, k) at ``place`` (...,): (..., k).

    As indexing, but with a gradient that adds up in one order: that of indexing follows the threads.
    """
    return functional.embedding(place, vectors)
