"""One evaluation of a trained model: its passes, by group, and user by user."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator.register import metrics_dict
from recbole.utils import ModelType

from recbole_mmdiff import distributed
from recbole_mmdiff.config import SAMPLED_MODE
from recbole_mmdiff.data.domain import DomainDataset
from recbole_mmdiff.data.preparation import Parts, seen_pairs
from recbole_mmdiff.diffusion.noise import fold_in
from recbole_mmdiff.errors import ConfigError, TrainingError
from recbole_mmdiff.evaluator.labeled import labeled_ndcg
from recbole_mmdiff.evaluator.memory import in_chunks, telling_of_memory
from recbole_mmdiff.evaluator.ranking import RankingMetrics, Requests, full_ranking
from recbole_mmdiff.evaluator.sampled import sampled_candidates
from recbole_mmdiff.negatives import KnownItems

ROWS_AT_ONCE = 2**17
#: cold: without a training row in the domain that is evaluated; the last two of two domains alone
GROUPS = ("cold_users", "warm_users", "cold_items", "warm_items", "linked_users", "unlinked_users")


@dataclass
class Evaluation:
    """What one evaluation found.

    Attributes:
        metrics: pass -> metric -> value; a pass that the model or the data cannot do is None.
        groups: group (of ``GROUPS``) -> the same for its part of the rows.
        per_user: ``pass.user`` -> (n,) tokens, ``pass.metric`` -> (n,) values.
        throughput: rows a second that ``predict`` scored; None without a pass over rows.
    """

    metrics: dict = field(default_factory=dict)
    groups: dict = field(default_factory=dict)
    per_user: dict = field(default_factory=dict)
    throughput: float | None = None


@contextmanager
def repeatable(model, seed: int) -> Iterator[None]:
    """Evaluation mode, where a model that draws random numbers draws the same each time, and takes
    nothing from the streams of others."""
    model.eval()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Evaluator:
    """Runs the passes that ``eval_passes`` asks for over the validation or the test part.

    ``rating`` compares predictions with labels row by row (RecBole's value metrics).
    ``ranking_full`` ranks all target items but those seen, relevant are the positive rows
    (RecBole's ranking metrics). ``ranking_sampled`` ranks the positives among the candidates that
    ``eval_args.mode`` (uniN, popN) draws. ``ranking_labeled`` ranks each user's own rows.

    Args:
        config: the run's configuration.
        parts: training rows say what is seen and what is cold; nothing else is taken from them.
    """

    def __init__(self, config, parts: Parts):
        self.config, self.parts = config, parts
        observed = parts.observed
        self.uid, self.iid = observed.uid_field, observed.iid_field
        self.sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        users, items = observed.inter_feat[self.uid], observed.inter_feat[self.iid]
        self.user_groups = _user_groups(users, parts.test.user_num, parts.num_overlap)
        self.warm_items = torch.bincount(items, minlength=parts.test.item_num) > 0
        self.ranking_metrics = RankingMetrics(
            config, Counter(items.tolist()), parts.test.item_num, parts.test.user_num)
        self._prepared: dict[tuple[str, str], tuple[Requests, np.ndarray]] = {}

    def score(self, model, phase: str = "valid") -> tuple[float, dict]:
        """The value of ``valid_metric`` and the pass that it belongs to, for early stopping."""
        result = self.evaluate(model, phase, [self.config.valid_pass]).metrics
        values = result[self.config.valid_pass]
        found = {key for key, value in (values or {}).items() if not math.isnan(value)}
        if self.config.valid_key not in found:
            raise ConfigError(
                f"valid_metric: {self.config['valid_metric']!r} has no value for "
                f"{self.config['model']} on this data; use one of {sorted(found)}")
        return values[self.config.valid_key], values

    def evaluate(self, model, phase: str, passes: list[str] | None = None,
                 by_group: bool = False) -> Evaluation:
        """Evaluate in eval mode, without gradient.

        Models that draw random numbers for their scores (RecBole's ADMMSLIM, Random) draw the same
        at every evaluation, and take nothing from the stream of the training.

        Args:
            model: a RecBole recommender.
            phase: ``valid`` or ``test``.
            passes: ``eval_passes`` by default.
            by_group: also for each of ``GROUPS``, and user by user.
        """
        passes = self.config["eval_passes"] if passes is None else passes
        with repeatable(model, self.config["seed"]):
            return self._evaluate(model, phase, passes, by_group)

    def _evaluate(self, model, phase, passes, by_group) -> Evaluation:
        evaluation = Evaluation()
        part = getattr(self.parts, phase)
        pairs = {"rating", "ranking_labeled"} & set(passes)
        if pairs:
            started = perf_counter()
            scores = self._predict(model, part)
            evaluation.throughput = len(scores) / (perf_counter() - started)
            for name in sorted(pairs):
                getattr(self, f"_{name}")(evaluation, model, part, scores, by_group)
        for name in ("ranking_full", "ranking_sampled"):
            if name in passes:
                self._ranking(name, evaluation, model, part, phase, by_group)
        evaluation.metrics = {name: evaluation.metrics[name] for name in passes}
        return evaluation

    # ---- rows ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _predict(self, model, part) -> np.ndarray:
        def score(rows: torch.Tensor) -> torch.Tensor:
            batch = part.join(Interaction(
                {name: part.inter_feat[name][rows] for name in part.inter_feat}))
            return model.predict(batch.to(model.device)).view(-1).cpu()

        own = torch.arange(len(part))[distributed.part_of(len(part))]
        with telling_of_memory(model.device, "one row"):
            chunks = in_chunks(own, ROWS_AT_ONCE, score, "rows")
            return distributed.gathered(torch.cat([found for _, found in chunks]), len(part)).numpy()

    def _labels(self, model, part) -> np.ndarray | None:
        """What ``predict`` should have said: ratings, or 0/1 labels of a click model."""
        name = self.config["RATING_FIELD"] if getattr(model, "predicts_ratings", False) \
            else self.config["LABEL_FIELD"]
        known = name in part.inter_feat and (
            getattr(model, "predicts_ratings", False)
            or self.config["MODEL_TYPE"] == ModelType.CONTEXT)
        return part.inter_feat[name].numpy() if known else None

    def _rating(self, evaluation, model, part, scores, by_group) -> None:
        labels = self._labels(model, part)
        if labels is None:
            evaluation.metrics["rating"] = None
            return
        if not np.isfinite(scores).all():
            raise TrainingError("the model predicts ratings that are not finite")
        if self.config["clip_ratings"]:
            ratings = self.parts.observed.ratings
            scores = scores.clip(float(ratings.min()), float(ratings.max()))
        scores, labels = scores.astype(np.float64), labels.astype(np.float64)
        evaluation.metrics["rating"] = self._value_metrics(scores, labels)
        if by_group:
            for group, mask in self._groups(part).items():
                values = self._value_metrics(scores[mask], labels[mask]) if mask.any() else None
                evaluation.groups.setdefault(group, {})["rating"] = values
            user = part.inter_feat[self.uid].numpy()
            users, place, count = np.unique(user, return_inverse=True, return_counts=True)
            error = np.bincount(place, np.abs(scores - labels)) / count
            square = np.bincount(place, (scores - labels)**2) / count
            self._keep(evaluation, "rating", users, {"mae": error, "rmse": np.sqrt(square)})

    def _value_metrics(self, scores, labels) -> dict[str, float]:
        settings = {"metric_decimal_place": 12}
        return {name.lower(): float(metrics_dict[name.lower()](settings).metric_info(scores, labels))
                for name in self.config["rating_metrics"]}

    def _ranking_labeled(self, evaluation, model, part, scores, by_group) -> None:
        ratings = part.inter_feat[self.config["RATING_FIELD"]].numpy() \
            if self.config["RATING_FIELD"] in part.inter_feat else None
        if ratings is None:
            evaluation.metrics["ranking_labeled"] = None
            return
        user = part.inter_feat[self.uid].numpy()
        topk, gain = sorted(self.config["topk"]), self.config["labeled_gain"]
        values = labeled_ndcg(user, scores, ratings, topk, gain)
        users = values.pop("user")
        evaluation.metrics["ranking_labeled"] = _means(values)
        if by_group:
            self._by_user_group(evaluation, "ranking_labeled", users, values)
            self._keep(evaluation, "ranking_labeled", users, values)

    # ---- full ranking --------------------------------------------------------------------------

    def _ranking(self, name, evaluation, model, part, phase, by_group) -> None:
        if (name, phase) not in self._prepared:
            self._prepared[name, phase] = self._requests(name, part, phase, model.device)
        requests, users = self._prepared[name, phase]
        if not len(requests.rows):
            evaluation.metrics[name] = None
            return
        ranking = full_ranking(model, requests, max(self.config["topk"]),
                               self.config["eval_chunk_elements"], self.ranking_metrics.mean_ranks)
        values = self.ranking_metrics.per_request(ranking)
        evaluation.metrics[name] = _means(values) | self.ranking_metrics.of_all(ranking)
        if by_group:
            self._by_user_group(evaluation, name, users, values)
            self._by_item_group(evaluation, name, ranking, requests)
            self._keep(evaluation, name, users, values)

    def _candidates(self, mode, phase, part, positives, users) -> KnownItems:
        """The sampled candidates of a phase: drawn once from the run's seed, outside of all that
        the user is known to have rated by then."""
        known = [self.parts.observed, *self.parts.aside.values(), self.parts.valid]
        if phase == "test":
            known.append(self.parts.test)
        pairs = KnownItems(*seen_pairs(*known), part.user_num, part.num_candidates)
        return sampled_candidates(mode, positives, users, pairs,
                                  self.parts.observed.inter_feat[self.iid],
                                  fold_in(self.config["seed"], ("valid", "test").index(phase)))

    def _requests(self, name, part, phase, device) -> tuple[Requests, np.ndarray]:
        """One request for every user with a positive row (for every row of sequences)."""
        features = part.get_item_feature()
        if self.sequential:
            rows, users = part.inter_feat, part.inter_feat[self.uid]
            numbers, items = torch.arange(len(part)), part.inter_feat[self.iid]
            seen = None
        else:
            mask = self._positive(part)
            users, numbers = torch.unique(part.inter_feat[self.uid][mask], return_inverse=True)
            items = part.inter_feat[self.iid][mask]
            rows = part.join(Interaction({self.uid: users}))
            seen = self._seen_items(phase).to(device)
        positives = KnownItems(numbers, items, len(rows), part.item_num)
        sampled, mode = None, self.config["eval_args"]["mode"][phase]
        if name == "ranking_sampled" and SAMPLED_MODE.fullmatch(mode):
            sampled = self._candidates(mode, phase, part, positives, users).to(device)
        return Requests(rows, positives.to(device), seen, self.uid, part.item_num,
                        part.num_candidates, features.to(device), sampled), users.numpy()

    @staticmethod
    def _positive(part) -> torch.Tensor:
        if isinstance(part, DomainDataset):
            return part.positive_rows()
        # RecBole's own data sets: every test row is relevant, unless labels say otherwise.
        label = part.label_field
        return part.inter_feat[label] > 0 if label in part.inter_feat \
            else torch.ones(len(part), dtype=torch.bool)

    def _seen_items(self, phase: str) -> KnownItems:
        """What a ranking leaves out: training rows, those that the split gives to no part, and in
        the test the validation rows."""
        with_valid = phase == "test" and self.config["mask_valid_items"]
        return self.parts.seen_items(*["valid"] * with_valid)

    # ---- groups and users ----------------------------------------------------------------------

    def _groups(self, part) -> dict[str, np.ndarray]:
        """Masks over rows."""
        user, item = (part.inter_feat[field].numpy() for field in (self.uid, self.iid))
        warm = self.warm_items.numpy()[item]
        return {"cold_items": ~warm, "warm_items": warm,
                **{group: mask[user] for group, mask in self.user_groups.items()}}

    def _by_user_group(self, evaluation, name, users, values) -> None:
        for group, mask in self.user_groups.items():
            own = mask[users]
            part = {key: value[own] for key, value in values.items()}
            evaluation.groups.setdefault(group, {})[name] = _means(part) if own.any() else None

    def _by_item_group(self, evaluation, name, ranking, requests) -> None:
        """The same rankings, with only the cold or only the warm items relevant."""
        warm = self.warm_items.to(ranking.items.device)
        positive_warm = warm[requests.positives.items.cpu()]
        for group, wanted in (("cold_items", False), ("warm_items", True)):
            relevant = torch.bincount(requests.positives.users.cpu()[positive_warm == wanted],
                                      minlength=len(ranking.relevant))
            some = relevant > 0
            part = type(ranking)(ranking.items[some],
                                 (ranking.hits & (warm[ranking.items] == wanted))[some],
                                 relevant[some])
            values = _means(self.ranking_metrics.per_request(part)) if some.any() else None
            evaluation.groups.setdefault(group, {})[name] = values

    def _keep(self, evaluation, name, users, values) -> None:
        tokens = self.parts.test.field2id_token[self.uid][users]
        evaluation.per_user |= {f"{name}.user": tokens.astype(str)}
        evaluation.per_user |= {f"{name}.{key}": value for key, value in values.items()}


def _user_groups(users: torch.Tensor, count: int, num_overlap: int | None) -> dict[str, np.ndarray]:
    """group -> which of ``count`` ids are in it, of the users of the training rows."""
    warm = np.bincount(users.numpy(), minlength=count) > 0
    groups = {"cold_users": ~warm, "warm_users": warm}
    if num_overlap is not None:
        linked = np.arange(count) <= num_overlap
        groups |= {"linked_users": linked, "unlinked_users": ~linked}
    return groups


def _means(values: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean over users; users without a value (no gain at all) do not count."""
    return {key: float(np.nanmean(value)) if np.isfinite(value).any() else float("nan")
            for key, value in values.items()}
