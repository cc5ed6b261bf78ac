"""The passes of one evaluation, against RecBole's own and against slow loops."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.evaluator import Collector
from recbole.sampler import Sampler
from recbole.trainer import Trainer
from running import SINGLE, run_keys

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.evaluator import Evaluator

METRICS = ["NDCG", "Recall", "Hit", "MRR", "Precision", "MAP", "GAUC", "ItemCoverage",
           "AveragePopularity", "ShannonEntropy", "GiniIndex", "TailPercentage"]


class Table(torch.nn.Module):
    """A model that is a table of scores (users, items)."""

    predicts_ratings = True
    device = torch.device("cpu")

    def __init__(self, scores):
        super().__init__()
        self.scores, self.widest = scores, 0

    def predict(self, interaction):
        return self.scores[interaction["user_id"], interaction["item_id"]]

    def full_sort_predict(self, interaction):
        self.widest = max(self.widest, len(interaction))
        return self.scores[interaction["user_id"]].reshape(-1).clone()


class PairsOnly(Table):
    """The same without full ranking, as RecBole's context models."""

    def full_sort_predict(self, interaction):
        raise NotImplementedError


class CountsAside(Collector):
    """RecBole's collector, which asks plain counts for ``.cpu()`` as soon as a metric needs them."""

    def get_data_struct(self):
        struct = self.data_struct._data_dict
        counts = {key: struct.pop(key) for key in list(struct) if key.startswith("data.")}
        collected = super().get_data_struct()
        for key, value in counts.items():
            collected.set(key, value)
        return collected


@pytest.fixture
def prepare(tiny_config):
    """``prepare(model, **keys)``: a namespace of evaluator, parts and a table of random scores."""

    def build(model="MF", **keys):
        config = Config(config_dict=tiny_config(model, **keys))
        parts = prepare_parts(config)
        generator = torch.Generator().manual_seed(1)
        scores = 1 + 4 * torch.rand(parts.test.user_num, parts.test.item_num, generator=generator)
        return SimpleNamespace(evaluator=Evaluator(config, parts), parts=parts, scores=scores,
                               config=config)

    return build


def rows_of(part):
    """(user, item, rating) of every row, as Python numbers."""
    return list(zip(part.inter_feat["user_id"].tolist(), part.inter_feat["item_id"].tolist(),
                    part.ratings.tolist(), strict=True))


def slow_full_ranking(ready, k, seen_parts, relevant=lambda user, item, rating: rating >= 4):
    """NDCG@k, recall@k, hit@k, MRR@k and precision@k of every user, one user at a time."""
    seen, positive = {}, {}
    for part in seen_parts:
        for user, item, _ in rows_of(part):
            seen.setdefault(user, set()).add(item)
    for user, item, rating in rows_of(ready.parts.test):
        if relevant(user, item, rating):
            positive.setdefault(user, set()).add(item)
    values = {}
    for user, wanted in sorted(positive.items()):
        candidates = [item for item in range(1, ready.parts.test.num_candidates)
                      if item not in seen.get(user, ())]
        ranked = sorted(candidates, key=lambda item: -ready.scores[user, item].item())[:k]
        hits = [item in wanted for item in ranked]
        gain = sum(1 / math.log2(place + 2) for place, hit in enumerate(hits) if hit)
        best = sum(1 / math.log2(place + 2) for place in range(min(k, len(wanted))))
        first = next((place for place, hit in enumerate(hits, 1) if hit), math.inf)
        values[user] = {"ndcg": gain / best, "recall": sum(hits) / len(wanted),
                        "hit": float(any(hits)), "mrr": 1 / first, "precision": sum(hits) / k}
    return values


def means(values):
    names = next(iter(values.values()))
    return {name: np.mean([one[name] for one in values.values()]) for name in names}


def assert_ranking(found, slow, k):
    for name, value in slow.items():
        assert found[f"{name}@{k}"] == pytest.approx(value, abs=1e-9), name


# ---- full ranking ------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [
    {}, {"split_protocol": "ratio"}, {"split_protocol": "warm_start"}, {"domain_view": "merged"},
    {"split_protocol": "cold_start_items", "test_user_ratio": 0.5, "test_item_ratio": 0.4,
     "valid_item_ratio": 0.4, "valid_user_ratio": 0.4}])
def test_full_ranking_equals_a_slow_loop(prepare, keys):
    ready = prepare(**keys)
    found = ready.evaluator.evaluate(Table(ready.scores), "test", ["ranking_full"])
    observed = ready.parts.observed
    aside = [part for part in (observed.finetune, observed.unused) if part is not None]
    assert len(aside) == (keys.get("split_protocol") in ("warm_start", "cold_start_items"))
    slow = means(slow_full_ranking(ready, 10, [observed, ready.parts.valid, *aside]))
    assert_ranking(found.metrics["ranking_full"], slow, 10)


def test_validation_leaves_out_training_items_only(prepare):
    ready = prepare(split_protocol="ratio")
    swapped = SimpleNamespace(**{**vars(ready), "parts": SimpleNamespace(test=ready.parts.valid)})
    found = ready.evaluator.evaluate(Table(ready.scores), "valid", ["ranking_full"])
    slow = means(slow_full_ranking(swapped, 10, [ready.parts.observed]))
    assert_ranking(found.metrics["ranking_full"], slow, 10)


def test_mask_valid_items(prepare):
    found = {}
    for mask in (True, False):
        ready = prepare(split_protocol="ratio", mask_valid_items=mask)
        # Each user likes the own validation items best: left in, they push the others down.
        user, item, _ = zip(*rows_of(ready.parts.valid), strict=True)
        ready.scores[list(user), list(item)] += 10
        found[mask] = ready.evaluator.evaluate(Table(ready.scores), "test", ["ranking_full"]).metrics
        seen = [ready.parts.observed] + ([ready.parts.valid] if mask else [])
        assert_ranking(found[mask]["ranking_full"], means(slow_full_ranking(ready, 5, seen)), 5)
    assert found[True]["ranking_full"]["ndcg@5"] > found[False]["ranking_full"]["ndcg@5"]


def test_the_merged_view_ranks_target_items_only(prepare):
    ready = prepare("CMF")
    assert ready.parts.test.item_num == 50 + 40 + 1 and ready.parts.test.num_candidates == 51
    before = ready.evaluator.evaluate(Table(ready.scores), "test", ["ranking_full"]).metrics
    ready.scores[:, 51:] += 100
    ready.scores[:, 0] += 1000
    assert ready.evaluator.evaluate(Table(ready.scores), "test", ["ranking_full"]).metrics == before


def test_chunks_change_nothing(prepare):
    results = []
    for elements in (1, 51, 51 * 5, 10**9):
        ready = prepare(metrics=METRICS, eval_chunk_elements=elements)
        table = Table(ready.scores)
        results.append(ready.evaluator.evaluate(table, "test", by_group=True))
        assert table.widest <= max(1, elements // 51)
    for other in results[1:]:
        assert other.metrics == results[0].metrics and other.groups == results[0].groups


def test_a_model_that_only_scores_pairs(prepare):
    ready = prepare()
    whole = ready.evaluator.evaluate(Table(ready.scores), "test", ["ranking_full"]).metrics
    pairs = ready.evaluator.evaluate(PairsOnly(ready.scores), "test", ["ranking_full"]).metrics
    assert pairs == whole


def test_k_beyond_the_number_of_items(prepare):
    ready = prepare(topk=[10, 500])
    found = ready.evaluator.evaluate(Table(ready.scores), "test", ["ranking_full"]).metrics
    slow = means(slow_full_ranking(ready, 500, [ready.parts.observed, ready.parts.valid]))
    assert_ranking(found["ranking_full"], slow, 500)
    assert found["ranking_full"]["recall@500"] == 1


def test_nothing_to_rank(prepare):
    ready = prepare(positive_rating=6.0)
    found = ready.evaluator.evaluate(Table(ready.scores), "test", by_group=True)
    assert found.metrics["ranking_full"] is None
    assert found.metrics["rating"]["mae"] > 0


def test_equal_to_recbole(tiny_config, tmp_path):
    """On one domain: RecBole's loaders, Trainer.evaluate and metrics find the same numbers."""
    keys = {**SINGLE, "metrics": METRICS, "topk": [1, 5, 10], "metric_decimal_place": 9,
            "eval_batch_size": 500, "checkpoint_dir": str(tmp_path / "theirs")}
    bpr = run_keys(tiny_config("BPR", **keys), tmp_path / "bpr")
    parts, config = bpr.parts, bpr.config
    config["checkpoint_dir"] = str(tmp_path / "theirs")
    sampler = Sampler(["train", "valid", "test"], [parts.train, parts.valid, parts.test])
    for phase in ("valid", "test"):
        trainer = Trainer(config, bpr.model)
        trainer.eval_collector = CountsAside(config)
        trainer.eval_collector.data_collect(SimpleNamespace(dataset=parts.train))
        loader = FullSortEvalDataLoader(config, getattr(parts, phase), sampler.set_phase(phase))
        theirs = trainer.evaluate(loader, load_best_model=False)
        ours = bpr.metrics[phase]["ranking_full"]
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, abs=1e-6), (phase, name)


# ---- ratings -----------------------------------------------------------------------------------


def test_ratings_equal_numpy(prepare):
    ready = prepare(rating_metrics=["MAE", "RMSE"])
    found = ready.evaluator.evaluate(Table(ready.scores), "test", ["rating"]).metrics["rating"]
    rows = rows_of(ready.parts.test)
    error = np.array([ready.scores[user, item].item() - rating for user, item, rating in rows])
    assert found["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-9)
    assert found["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-9)


def test_clip_ratings(prepare):
    plain, clipped = prepare(), prepare(clip_ratings=True)
    wild = plain.scores * 10 - 20
    found = clipped.evaluator.evaluate(Table(wild), "test", ["rating"]).metrics
    observed = plain.parts.observed.ratings
    tame = wild.clip(observed.min(), observed.max())
    assert found == plain.evaluator.evaluate(Table(tame), "test", ["rating"]).metrics
    assert found["rating"]["mae"] < plain.evaluator.evaluate(Table(wild), "test").metrics["rating"]["mae"]


def test_a_click_model_has_no_ratings(prepare):
    ready = prepare("BPR")
    model = Table(ready.scores)
    model.predicts_ratings = False
    found = ready.evaluator.evaluate(model, "test").metrics
    assert found["rating"] is None
    assert found["ranking_full"] and found["ranking_labeled"]


def test_score_names_the_metrics_there_are(prepare):
    ready = prepare("MF", valid_metric="RMSE")
    model = Table(ready.scores)
    model.predicts_ratings = False
    with pytest.raises(ValueError, match="valid_metric: 'RMSE' has no value for MF"):
        ready.evaluator.score(model)


def test_score_is_that_of_the_whole_evaluation(prepare):
    for metric, name, key in (("RMSE", "rating", "rmse"), ("NDCG@5", "ranking_full", "ndcg@5"),
                              ("ranking_labeled.NDCG@10", "ranking_labeled", "ndcg@10")):
        ready = prepare(valid_metric=metric)
        model = Table(ready.scores)
        score, values = ready.evaluator.score(model)
        whole = ready.evaluator.evaluate(model, "valid").metrics
        assert score == whole[name][key] and values == whole[name]


# ---- groups and users --------------------------------------------------------------------------


@pytest.fixture
def grouped(prepare):
    """A split in which users and items are partly cold."""
    ready = prepare(split_protocol="ratio",
                    eval_args={"split": {"RS": [0.03, 0.03, 0.94]}, "group_by": "none"})
    ready.found = ready.evaluator.evaluate(Table(ready.scores), "test", by_group=True)
    observed = rows_of(ready.parts.observed)
    ready.warm_users, ready.warm_items = ({row[place] for row in observed} for place in (0, 1))
    ready.linked = ready.parts.train.num_overlap
    return ready


def test_groups_are_told_by_training_rows(grouped):
    rows = rows_of(grouped.parts.test)
    for group, wanted in {
            "cold_users": lambda user, item: user not in grouped.warm_users,
            "warm_users": lambda user, item: user in grouped.warm_users,
            "linked_users": lambda user, item: user <= grouped.linked,
            "unlinked_users": lambda user, item: user > grouped.linked,
            "cold_items": lambda user, item: item not in grouped.warm_items,
            "warm_items": lambda user, item: item in grouped.warm_items}.items():
        errors = [abs(grouped.scores[user, item].item() - rating) for user, item, rating in rows
                  if wanted(user, item)]
        found = grouped.found.groups[group]["rating"]
        if not errors:
            assert found is None
        else:
            assert found["mae"] == pytest.approx(np.mean(errors), rel=1e-6)
    assert grouped.found.groups["cold_items"]["rating"] and grouped.found.groups["warm_items"]["rating"]
    assert grouped.found.groups["linked_users"]["rating"] and grouped.found.groups["unlinked_users"]["rating"]


def test_user_groups_of_the_ranking(grouped):
    slow = slow_full_ranking(grouped, 5, [grouped.parts.observed, grouped.parts.valid])
    for group, wanted in {"cold_users": lambda user: user not in grouped.warm_users,
                          "warm_users": lambda user: user in grouped.warm_users,
                          "linked_users": lambda user: user <= grouped.linked,
                          "unlinked_users": lambda user: user > grouped.linked}.items():
        part = {user: one for user, one in slow.items() if wanted(user)}
        found = grouped.found.groups[group]["ranking_full"]
        if part:
            assert_ranking(found, means(part), 5)
        else:
            assert found is None


def test_item_groups_keep_the_ranking_and_change_what_is_relevant(grouped):
    for group, warm in (("cold_items", False), ("warm_items", True)):
        slow = slow_full_ranking(
            grouped, 5, [grouped.parts.observed, grouped.parts.valid],
            lambda user, item, rating: rating >= 4 and (item in grouped.warm_items) == warm)  # noqa: B023
        assert_ranking(grouped.found.groups[group]["ranking_full"], means(slow), 5)


def test_groups_recombine_to_the_whole(grouped):
    rows = rows_of(grouped.parts.test)
    for kind, place in (("users", 0), ("items", 1)):
        warm = np.mean([row[place] in getattr(grouped, f"warm_{kind}") for row in rows])
        parts = [(weight, grouped.found.groups[f"{name}_{kind}"]["rating"])
                 for name, weight in (("cold", 1 - warm), ("warm", warm)) if weight]
        for metric, power in (("mae", 1), ("rmse", 2)):
            whole = sum(weight * values[metric]**power for weight, values in parts)
            assert whole**(1 / power) == pytest.approx(grouped.found.metrics["rating"][metric])


def test_values_of_every_user(grouped):
    slow = slow_full_ranking(grouped, 10, [grouped.parts.observed, grouped.parts.valid])
    per_user, tokens = grouped.found.per_user, grouped.parts.test.field2id_token["user_id"]
    assert per_user["ranking_full.user"].tolist() == [str(tokens[user]) for user in slow]
    for name in ("ndcg", "recall", "hit", "mrr", "precision"):
        np.testing.assert_allclose(per_user[f"ranking_full.{name}@10"],
                                   [one[name] for one in slow.values()], atol=1e-9)


def test_evaluation_repeats_and_leaves_the_generators_alone(prepare):
    class Noisy(Table):
        def full_sort_predict(self, interaction):
            scores = super().full_sort_predict(interaction)
            return scores + torch.rand(len(scores))

    ready = prepare()
    model = Noisy(ready.scores).train()
    state = torch.get_rng_state()
    first = ready.evaluator.evaluate(model, "test")
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert ready.evaluator.evaluate(model, "test").metrics == first.metrics


def test_no_gradient_is_kept(prepare):
    ready = prepare()
    scores = ready.scores.clone().requires_grad_()
    found = ready.evaluator.evaluate(Table(scores), "test")
    assert found.metrics["rating"]["mae"] > 0 and scores.grad is None


def test_users_of_the_source_domain_are_never_evaluated(prepare):
    ready = prepare("CMF")
    found = ready.evaluator.evaluate(Table(ready.scores), "test", by_group=True)
    test = ready.parts.test
    tokens = set(test.field2id_token["user_id"][np.unique(test.inter_feat["user_id"].numpy())])
    assert set(found.per_user["rating.user"]) == tokens
    assert isinstance(test.join(Interaction({"user_id": torch.tensor([1])})), Interaction)
