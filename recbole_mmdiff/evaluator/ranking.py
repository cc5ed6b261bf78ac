"""Full ranking in chunks of users: RecBole's metrics without its loops over users."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator.collector import Collector, DataStruct
from recbole.evaluator.register import metrics_dict
from torch import Tensor

from recbole_mmdiff import distributed
from recbole_mmdiff.evaluator.memory import Done, in_chunks, telling_of_memory
from recbole_mmdiff.negatives import KnownItems


@dataclass
class Requests:
    """Whose items are ranked.

    Attributes:
        rows: Interaction of length n that ``full_sort_predict`` takes: a user (or a sequence) each.
        positives: relevant items, keyed by the request's number; None where nothing is measured.
        seen: items that are left out of the ranking, keyed by user; None leaves out nothing.
        uid_field: the column of users in ``rows``.
        num_items, num_candidates: all items a model scores, and how many of them (the first, with
            [PAD]) are ranked.
        item_features: Interaction of all items, for models that can only score pairs.
        sampled: what alone is ranked, keyed by the request's number; None ranks all candidates.
    """

    rows: Interaction
    positives: KnownItems | None
    seen: KnownItems | None
    uid_field: str
    num_items: int
    num_candidates: int
    item_features: Interaction
    sampled: KnownItems | None = None


@dataclass
class Ranking:
    """The head of every request's ranking.

    Attributes:
        items: (n, k) item ids, best first.
        hits: (n, k) whether each is relevant.
        relevant: (n,) how many items are relevant.
        struct: what RecBole's metrics read (``rec.topk``, ``rec.items``, ``rec.meanrank``).
    """

    items: Tensor
    hits: Tensor
    relevant: Tensor
    struct: DataStruct = field(default_factory=DataStruct)


def score_all(model, rows: Interaction, requests: Requests, pairs_at_once: int) -> Tensor:
    """Scores (b, num_items) of all items for the requests ``rows``."""
    try:
        return model.full_sort_predict(rows).view(len(rows), -1)
    except NotImplementedError:
        pass
    users = torch.arange(len(rows), device=model.device).repeat_interleave(requests.num_items)
    items = torch.arange(requests.num_items, device=model.device).repeat(len(rows))

    def score(places: Tensor) -> Tensor:
        user, item = users[places], items[places]
        pairs = {name: rows[name][user] for name in rows}
        pairs |= {name: requests.item_features[name][item] for name in requests.item_features}
        return model.predict(Interaction(pairs))

    places = torch.arange(len(users), device=model.device)
    scores = [found for _, found in in_chunks(places, pairs_at_once, score, "pairs")]
    return torch.cat(scores).view(len(rows), -1)


def score_candidates(model, requests: Requests, numbers: Tensor,
                     pairs_at_once: int) -> tuple[Interaction, Tensor]:
    """The rows of some requests (b,), and scores (b, num_candidates): minus infinity for [PAD] and whatever
    else is left out."""
    picked = numbers.to(requests.rows[requests.uid_field].device)
    rows = Interaction({name: requests.rows[name][picked] for name in requests.rows}).to(model.device)
    scores = score_all(model, rows, requests, pairs_at_once)[:, :requests.num_candidates]
    scores[:, 0] = -torch.inf
    if requests.seen is not None:
        scores[requests.seen.rows(rows[requests.uid_field])] = -torch.inf
    if requests.sampled is not None:
        place = requests.sampled.rows(numbers)
        kept = scores[place]
        scores = torch.full_like(scores, -torch.inf)
        scores[place] = kept
    return rows, scores


def scored_chunks(model, requests: Requests, chunk_elements: int, work: Callable[..., Done],
                  pairs_at_once: int = 2**16) -> Iterator[tuple[Tensor, Done]]:
    """Score the candidate items of all requests, ``chunk_elements`` scores at a time, or fewer where the GPU
    has too little memory.

    Args:
        work: from numbers (b,) of some requests, their rows, and scores (b, num_candidates) to what is kept
            of them.

    Yields:
        numbers (b,) of some of this process's requests, and what ``work`` made of them.

    Raises:
        ConfigError: not even one request fits.
    """
    numbers = torch.arange(len(requests.rows), device=model.device)[distributed.part_of(len(requests.rows))]
    chunk = max(1, chunk_elements // requests.num_items)

    def of_some(part: Tensor) -> Done:
        return work(part, *score_candidates(model, requests, part, pairs_at_once))

    with telling_of_memory(model.device, f"one user's {requests.num_items} items"):
        yield from in_chunks(numbers, chunk, of_some, "users")


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores (b, k) and items (b, k) of the heads of rankings. What is NaN (RecBole's NAIS has no number for
    users without a training row) becomes minus infinity in ``scores``, and the log tells of it."""
    values, items = scores.topk(k, dim=-1)
    wrong = values.isnan().any(dim=1)   # For torch, NaN is the greatest of all.
    if not wrong.any():
        return values, items
    logging.getLogger().warning("the model gives scores that are NaN to %d of %d users: such items rank last",
                                int(wrong.sum()), len(wrong), extra=distributed.EACH)
    return scores.masked_fill_(scores.isnan(), -torch.inf).topk(k, dim=-1)


@torch.no_grad()
def full_ranking(model, requests: Requests, k: int, chunk_elements: int,
                 mean_ranks: bool = False, pairs_at_once: int = 2**16) -> Ranking:
    """Rank all candidate items for every request, ``chunk_elements`` scores at a time.

    Args:
        model: a RecBole recommender in eval mode.
        k: length of the head that is kept.
        mean_ranks: also gather what GAUC needs (sorts every row).
    """
    k = min(k, requests.num_candidates - 1)
    collector = None
    if mean_ranks:
        collector = Collector({"metrics": ["gauc"], "topk": [k], "device": model.device,
                               "eval_args": {"mode": {}}})

    def head(numbers, rows, scores) -> tuple[Tensor, Tensor]:
        values, items = best(scores, k)
        hits = requests.positives.contains(numbers[:, None], items) & (values > -torch.inf)
        if collector is not None:
            collector.eval_batch_collect(scores, rows, *requests.positives.rows(numbers))
        return items.cpu(), hits.cpu()

    chunks = scored_chunks(model, requests, chunk_elements, head, pairs_at_once)
    found, count = zip(*(found for _, found in chunks), strict=True), len(requests.rows)
    items, hits = (distributed.gathered(torch.cat(parts), count) for parts in found)
    ranking = Ranking(items, hits, requests.positives.counts.cpu())
    ranking.struct.set("rec.items", ranking.items)
    ranking.struct.set("rec.topk", torch.cat([ranking.hits, ranking.relevant[:, None]], dim=1))
    if collector is not None:
        found = collector.get_data_struct().get("rec.meanrank")
        ranking.struct.set("rec.meanrank", distributed.gathered(found, count))
    return ranking


class RankingMetrics:
    """RecBole's ranking metrics of a Ranking, averaged and user by user.

    Args:
        config: the keys ``metrics`` and ``topk``.
        train_items: Counter of the training rows of each item, for popularity metrics.
        num_items, num_users: sizes for coverage metrics.
    """

    def __init__(self, config, train_items, num_items: int, num_users: int):
        self.topk = sorted(config["topk"])
        settings = {"topk": self.topk, "metric_decimal_place": 12,
                    "tail_ratio": config["tail_ratio"]}
        self.metrics = {name.lower(): metrics_dict[name.lower()](settings)
                        for name in config["metrics"]}
        self.mean_ranks = any("rec.meanrank" in m.metric_need for m in self.metrics.values())
        self.data = {"data.count_items": train_items, "data.num_items": num_items,
                     "data.num_users": num_users}
        for metric in self.metrics.values():
            if hasattr(metric, "topk_result"):
                # RecBole averages here; keep each user's row instead.
                metric.topk_result = lambda name, value: {name: value}

    def per_request(self, ranking: Ranking) -> dict[str, np.ndarray]:
        """``metric@k`` -> (n,) for every metric that is a mean over users."""
        longest, width = max(self.topk), ranking.hits.shape[1]
        hits = torch.nn.functional.pad(ranking.hits, (0, longest - width))
        struct = DataStruct()
        struct.set("rec.topk", torch.cat([hits.long(), ranking.relevant[:, None]], dim=1))
        values = {}
        for metric in self.metrics.values():
            if hasattr(metric, "topk_result") and metric.metric_need == ["rec.topk"]:
                for name, table in metric.calculate_metric(struct).items():
                    values |= {f"{name}@{k}": table[:, k - 1] for k in self.topk}
        return values

    def of_all(self, ranking: Ranking) -> dict[str, float]:
        """The metrics that are no mean over users: coverage, popularity, GAUC ..."""
        for key, value in self.data.items():
            ranking.struct.set(key, value)
        values = {}
        for metric in self.metrics.values():
            if metric.metric_need != ["rec.topk"]:
                for name, result in metric.calculate_metric(ranking.struct).items():
                    if isinstance(result, np.ndarray):
                        averaged = result.mean(axis=0)
                        values |= {f"{name}@{k}": float(averaged[min(k, len(averaged)) - 1])
                                   for k in self.topk}
                    else:
                        values[name] = float(result)
        return values
