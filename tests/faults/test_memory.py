"""A GPU without enough memory for an evaluation: smaller chunks, and the same numbers."""

import logging

import pytest
import torch
from running import SINGLE, run_keys

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.evaluator import Evaluator
from recbole_mmdiff.evaluator.memory import in_chunks
from recbole_mmdiff.recommend import Recommender

METRICS = ["NDCG", "Recall", "GAUC", "ItemCoverage"]


class Small(torch.nn.Module):
    """A table of scores (users, items) on a device with room for so many users, or pairs, at once."""

    predicts_ratings, device = True, torch.device("cpu")

    def __init__(self, scores, users=10**9, pairs=10**9, ranks=True):
        super().__init__()
        self.scores, self.users, self.pairs, self.ranks, self.widths = scores, users, pairs, ranks, []

    def fit_in(self, interaction, room):
        self.widths.append(len(interaction))
        if len(interaction) > room:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(interaction)} GiB.\nMore of it")

    def predict(self, interaction):
        self.fit_in(interaction, self.pairs)
        return self.scores[interaction["user_id"], interaction["item_id"]].clone()

    def full_sort_predict(self, interaction):
        if not self.ranks:
            raise NotImplementedError
        self.fit_in(interaction, self.users)
        return self.scores[interaction["user_id"]].reshape(-1).clone()


@pytest.fixture(scope="module")
def ready(tiny_config):
    """An evaluator of all passes, and scores."""
    config = Config(config_dict=tiny_config(
        "MF", metrics=METRICS, eval_passes=["rating", "ranking_full", "ranking_sampled", "ranking_labeled"],
        eval_args={"mode": {"valid": "full", "test": "uni20"}}))
    parts = prepare_parts(config)
    scores = 1 + 4 * torch.rand(parts.test.user_num, parts.test.item_num,
                                generator=torch.Generator().manual_seed(1))
    return Evaluator(config, parts), scores


def evaluated(ready, **room):
    evaluator, scores = ready
    model = Small(scores, **room)
    return evaluator.evaluate(model, "test", by_group=True), model


@pytest.mark.parametrize("room", [{"users": 5}, {"users": 1}, {"pairs": 3}, {"users": 3, "pairs": 30},
                                  {"ranks": False, "pairs": 100}, {"ranks": False, "pairs": 1}])
def test_the_numbers_are_those_of_a_large_gpu(ready, room, caplog):
    whole, _ = evaluated(ready)
    with caplog.at_level(logging.WARNING):
        found, model = evaluated(ready, **room)
    assert max(model.widths) > min(room.get("users", 10**9), room.get("pairs", 10**9))
    assert found.metrics == whole.metrics and found.groups == whole.groups
    assert all((found.per_user[name] == value).all() for name, value in whole.per_user.items())
    assert "out of memory with" in caplog.text and "at once: going on with" in caplog.text


def test_a_chunk_is_halved_once_and_not_tried_again():
    asked = []

    def work(part):
        asked.append(len(part))
        if len(part) > 5:
            raise torch.OutOfMemoryError
        return 2 * part

    parts, found = zip(*in_chunks(torch.arange(23), 20, work, "users"), strict=True)
    assert asked == [20, 10, 5, 5, 5, 5, 3]
    assert torch.cat(parts).tolist() == list(range(23))
    assert torch.cat(found).tolist() == list(range(0, 46, 2))


def test_of_nothing_there_is_one_part():
    """As of torch.split: a part of the data without rows."""
    assert [(len(part), done) for part, done in in_chunks(torch.arange(0), 4, len, "rows")] == [(0, 0)]


def test_no_tensor_of_a_failed_attempt_is_kept():
    import gc
    import weakref

    kept = []

    def work(part):
        if len(part) > 1:
            large = torch.zeros(3)
            kept.append(weakref.ref(large))
            raise torch.OutOfMemoryError
        gc.disable()    # What is alive now is held by somebody.
        alive = kept[-1]() is not None
        gc.enable()
        return not alive

    assert all(done for _, done in in_chunks(torch.arange(2), 2, work, "users"))


@pytest.mark.parametrize(("room", "what"), [({"users": 0}, r"one user's \d+ items"),
                                            ({"pairs": 0}, "one row")])
def test_too_small_for_one_is_told(ready, room, what):
    with pytest.raises(ConfigError, match=rf"^use_gpu: cpu has not enough memory to score {what} "
                                          r"\(CUDA out of memory: 1 GiB.\); .*use_gpu: False"):
        evaluated(ready, **room)


def test_another_runtime_error_is_no_matter_of_memory(ready, monkeypatch):
    def broken(*_):
        raise RuntimeError("another fault")

    monkeypatch.setattr(Small, "full_sort_predict", broken)
    with pytest.raises(RuntimeError, match="another fault"):
        evaluated(ready)


def test_a_model_that_can_only_score_pairs(tiny_config, tmp_path, monkeypatch):
    """RecBole's FM, in a whole run."""
    keys = tiny_config("FM", **SINGLE, epochs=1, threshold={"rating": 4})
    whole = run_keys(keys, tmp_path / "whole").metrics["test"]
    from recbole.model.context_aware_recommender.fm import FM

    predict, failed = FM.predict, []

    def small(self, interaction):
        if len(interaction) > 200:
            failed.append(len(interaction))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return predict(self, interaction)

    monkeypatch.setattr(FM, "predict", small)
    found = run_keys(keys, tmp_path / "small").metrics["test"]
    assert failed
    for name, values in whole.items():
        assert found[name] == (values and pytest.approx(values)), name


@pytest.fixture(scope="module")
def recommender(tiny_config, tmp_path_factory):
    made = run_keys(tiny_config("CMF", epochs=1), tmp_path_factory.mktemp("memory") / "run")
    return Recommender(made)


def test_recommendations_are_those_of_a_large_gpu(recommender, monkeypatch):
    whole = recommender.recommend(k=5).frame()
    scoring = type(recommender.model).full_sort_predict

    def small(self, interaction):
        if len(interaction) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return scoring(self, interaction)

    monkeypatch.setattr(type(recommender.model), "full_sort_predict", small)
    assert recommender.recommend(k=5).frame().drop(columns="score").equals(whole.drop(columns="score"))


def test_vectors_of_new_users_are_made_in_smaller_parts(ready):
    from recbole_mmdiff.model.new_users import SourceRows
    from recbole_mmdiff.recommend.scoring import Scorer

    class Sums:
        device = torch.device("cpu")

        def eval(self):
            return self

        def vectors_of_new_users(self, rows):
            if rows.count > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return torch.zeros(rows.count).index_add(0, rows.user, rows.rating)[:, None]

    rows = SourceRows(torch.tensor([0, 0, 1, 2, 3, 3, 4]), torch.ones(7, dtype=torch.long),
                      torch.tensor([1., 2, 4, 8, 16, 32, 64]), 5)
    assert Scorer(Sums(), "user_id", rows, None).users[:, 0].tolist() == [3, 4, 8, 48, 64]
