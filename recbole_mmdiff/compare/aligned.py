"""Items beside their users, and negatives of each pool (CCDRec, Figures 4 and 5), out of a finished run."""

from typing import NamedTuple

import torch
from torch import Tensor

from recbole_mmdiff.model.negative_sampling import Rows
from recbole_mmdiff.quick_start import Run, build_model
from recbole_mmdiff.report.embeddings import ITEMS_OF, USER

#: users with fewer training items show nothing; more than so many of one hide the others
LEAST_ITEMS, MOST_ITEMS = 5, 50
USERS_WITH_NEGATIVES = 2
#: the kinds of negatives, pool by pool
POOLS = ("after T/4 steps", "after T/2 steps", "after 3T/4 steps", "after T steps")

Points = list[tuple[str, str, Tensor]]


class Shown(NamedTuple):
    """A user of a picture: name and id, and some training rows: their numbers (m,), their items (m,)."""

    name: str
    user: int
    rows: Tensor
    items: Tensor


def aligns_items(model_class: type) -> bool:
    """Whether a class of models aligns the items of a backbone with their modalities by a diffusion
    (``backbone_class``), and infers pools of negatives out of its steps (``infer``)."""
    return all(hasattr(model_class, name) for name in ("backbone_class", "infer"))


@torch.no_grad()
def aligned_points(run: Run, count: int) -> Points:
    """What both figures show, as (panel, kind, vectors (n, d)).

    Panels "start: <modality>" and "start: fused", then "trained: ...", have ``count`` users and their
    training items: the items' projected features (of those that have the modality) or their fused
    representations e^f, and h_u. "start" is the model as its run began, of the same seed.

    Panels "negatives of user <name>", of the first two of them, have the user, its items
    ("positives"), and for each a negative from each pool, drawn as in training: all by their final
    representations. Pools are not saved with a run: they are inferred anew out of the best epoch's
    weights and noise.

    Args:
        run: a finished one of a model that ``aligns_items``.
        count: users, drawn by the seed of the run among those with ``LEAST_ITEMS`` training items.
    """
    shown = shown_users(run, count)
    start = build_model(run.config, run.parts)
    points = _beside_users(start, shown, "start") + _beside_users(run.model, shown, "trained")
    best = run.metrics["best_epoch"]
    epoch = best if best >= 0 else run.model.epoch    # Without validation it is the last one.
    run.model.infer(epoch)
    for one in shown[:USERS_WITH_NEGATIVES]:
        points += _negatives(run.model, one, epoch)
    return points


def shown_users(run: Run, count: int) -> list[Shown]:
    """At most ``count`` users with at most ``MOST_ITEMS`` training rows each, the same at every call."""
    train, draw = run.parts.train, torch.Generator().manual_seed(run.config["seed"])

    def some(numbers: Tensor, most: int) -> Tensor:
        return numbers[torch.randperm(len(numbers), generator=draw)[:most]]

    users, items = (train.inter_feat[field] for field in (train.uid_field, train.iid_field))
    counts = torch.bincount(users, minlength=train.user_num)
    # Where nobody has as many, those with the most will do.
    eligible = (counts >= min(LEAST_ITEMS, int(counts.max()))).nonzero()[:, 0]
    found = []
    for user in some(eligible, count).tolist():
        rows = some((users == user).nonzero()[:, 0], MOST_ITEMS)
        name = f"{USER} {train.field2id_token[train.uid_field][user]}"
        found.append(Shown(name, user, rows.to(run.model.device), items[rows].to(run.model.device)))
    return found


def _beside_users(model, shown: list[Shown], state: str) -> Points:
    model.eval()
    features = model.backbone.features
    projected, fused = features.project_all(), model.fused_items()
    views = [(name, projected[:, number], features.present[:, number])
             for number, name in enumerate(features.names)]
    points: Points = []
    for title, vectors, present in [*views, ("fused", fused, torch.ones_like(features.present[:, 0]))]:
        panel = f"{state}: {title}"
        for one in shown:
            kept = one.items[present[one.items]]
            points += [(panel, one.name, model.user_factors(one.items.new_tensor([one.user]))),
                       (panel, ITEMS_OF + one.name, vectors[kept])]
    return points


def _negatives(model, one: Shown, epoch: int) -> Points:
    """Of a model whose pools are inferred."""
    model.eval()
    model.negatives.unknown.to(model.device)
    users = torch.full_like(one.items, one.user)
    # Each row is a batch of its own, with its own candidates: training scatters a user's rows, too.
    batches = [Rows(*parts, model.seed, epoch)
               for parts in zip(*(column.split(1) for column in (users, one.items, one.rows)), strict=True)]
    panel = f"negatives of {one.name}"
    points = [(panel, USER, model.user_factors(users[:1])),
              (panel, "positives", model.item_factors(one.items))]
    for kind, pool in zip(POOLS, model.pools, strict=False):    # Last are the final items.
        drawn = torch.cat([model.negatives.from_pool(pool, batch, 1)[:, 0] for batch in batches])
        points.append((panel, kind, model.item_factors(drawn)))
    return points
