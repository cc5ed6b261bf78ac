"""What every model of ours must do, whatever its paper."""

import re
from math import isfinite
from statistics import mean

import pytest
import torch
from recbole.data.interaction import Interaction
from running import (
    Killed,
    assert_same_weights,
    item_mean_rmse,
    run_keys,
    saved_metrics,
    without_times,
)

from recbole_mmdiff.config.keys import model_keys, recbole_keys
from recbole_mmdiff.config.sources import properties_path, read_yaml
from recbole_mmdiff.evaluator import Evaluator
from recbole_mmdiff.model.registry import get_model
from recbole_mmdiff.quick_start import load_run, run
from recbole_mmdiff.trainer import StagedTrainer

KEY_LINE = re.compile(r"^(\w+):.*?\s#\s*\S")


class Ranker:
    """What the evaluator asks of a model that ranks."""

    predicts_ratings, device = False, torch.device("cpu")

    def __init__(self, parts):
        self.num_items = parts.test.item_num

    def eval(self):
        return self


class Popularity(Ranker):
    """Scores an item by the number of its positive training rows, for every user."""

    def __init__(self, parts):
        super().__init__(parts)
        rows = parts.observed.inter_feat[parts.observed.iid_field][parts.observed.positive_rows()]
        self.counts = torch.bincount(rows, minlength=self.num_items).float()

    def full_sort_predict(self, interaction):
        return self.counts.repeat(len(interaction))


class Chance(Ranker):
    """Scores drawn by a seed."""

    def __init__(self, parts, seed):
        super().__init__(parts)
        self.generator = torch.Generator().manual_seed(seed)

    def full_sort_predict(self, interaction):
        return torch.rand(len(interaction) * self.num_items, generator=self.generator)


def ndcg_of(run_of_model, ranker) -> float:
    """NDCG@10 of a ranker on the test users of a run."""
    evaluator = Evaluator(run_of_model.config, run_of_model.parts)
    found = evaluator.evaluate(ranker, "test", ["ranking_full"])
    return found.metrics["ranking_full"]["ndcg@10"]


class ModelContract:
    """Tests of one model; a subclass ``Test<Model>`` names it.

    Attributes:
        model: its name.
        keys: of a run of a second or so, above the tiny configuration.
        accurate_keys: laid over ``keys`` for a run that is long enough to learn something.
        transfers: whether it tells a cold-start user from another.
        best_rmse_ratio: upper bound of its RMSE over the item mean's, on the tiny pair.
        least_ndcg_ratio: of a ranking model instead: lower bound of its NDCG@10 over those of
            popularity and of chance, on the pair of taste groups.
        most_ndcg_ratio: upper bound of the same where source rows tell nothing of their users.
    """

    model = ""
    keys: dict = {}
    accurate_keys: dict = {}
    transfers = True
    best_rmse_ratio = 1.0
    least_ndcg_ratio = 2.5
    most_ndcg_ratio = 1.3

    # ---- runs that the tests share ------------------------------------------------------------

    @pytest.fixture(scope="class")
    def short(self, tiny_config, tmp_path_factory):
        """A short run."""
        return run_keys(tiny_config(self.model, **self.keys),
                        tmp_path_factory.mktemp(self.model) / "run")

    @pytest.fixture(scope="class")
    def accurate(self, tiny_config, tmp_path_factory):
        """A run that learns."""
        keys = {**self.keys, **self.accurate_keys}
        return run_keys(tiny_config(self.model, **keys),
                        tmp_path_factory.mktemp(self.model) / "accurate")

    @pytest.fixture(scope="class")
    def on_tastes(self, tiny_config, taste_pair, swapped_pair, tmp_path_factory):
        """Runs of a ranking model where the source tells what a cold user likes, and where not."""
        if get_model(self.model).predicts_ratings:
            pytest.skip("its band is one of RMSE")
        keys = {**self.keys, **self.accurate_keys}
        return [run_keys(tiny_config(self.model, **keys, data_path=pair.folder),
                         tmp_path_factory.mktemp(self.model) / "tastes")
                for pair in (taste_pair, swapped_pair)]

    @staticmethod
    def scores(run_of_model):
        """(users, items) by ``full_sort_predict``, for every user from [PAD] on."""
        parts, model = run_of_model.parts, run_of_model.model.eval()
        users = Interaction({parts.test.uid_field: torch.arange(parts.test.user_num)})
        return model.full_sort_predict(users.to(model.device)).view(parts.test.user_num, -1)

    @staticmethod
    def cold_users(parts):
        """The users who are tested and have no training row."""
        return torch.unique(parts.test.inter_feat[parts.test.uid_field])

    # ---- predictions ---------------------------------------------------------------------------

    def test_one_pair_and_all_items_agree(self, short):
        table, parts = self.scores(short), short.parts
        users = torch.arange(parts.test.user_num)
        for item in (0, 1, parts.test.item_num - 1):
            rows = Interaction({parts.test.uid_field: users,
                                parts.test.iid_field: torch.full_like(users, item)})
            torch.testing.assert_close(short.model.predict(rows), table[:, item],
                                       rtol=1e-5, atol=1e-5)

    def test_scores_are_finite_for_everybody(self, short):
        assert torch.isfinite(self.scores(short)).all()

    def test_cold_users_differ_where_the_model_transfers(self, accurate):
        rows = self.scores(accurate)[self.cold_users(accurate.parts), 1:accurate.parts.test.item_num]
        assert len(rows) > 3
        if self.transfers:
            assert len(torch.unique(rows, dim=0)) == len(rows)
            assert rows.std(0).mean() > 0.02

    def test_cold_users_are_cold(self, short):
        seen = set(short.parts.observed.inter_feat[short.parts.observed.uid_field].tolist())
        assert not seen & set(self.cold_users(short.parts).tolist())

    def test_accuracy_band(self, accurate):
        if not get_model(self.model).predicts_ratings:
            pytest.skip("its band is one of NDCG")
        rmse = accurate.metrics["test"]["rating"]["rmse"]
        assert rmse < self.best_rmse_ratio * item_mean_rmse(accurate.parts)

    def test_ranking_band(self, on_tastes):
        """Cold users get the items of their group, by what the source tells and nothing else."""
        told, untold = (made.metrics["test"]["ranking_full"]["ndcg@10"] for made in on_tastes)
        popularity = ndcg_of(on_tastes[0], Popularity(on_tastes[0].parts))
        chance = mean(ndcg_of(on_tastes[0], Chance(on_tastes[0].parts, seed)) for seed in range(10))
        assert told > self.least_ndcg_ratio * max(popularity, chance)
        assert untold < self.most_ndcg_ratio * max(popularity, chance)

    # ---- saving, repeating, resuming -----------------------------------------------------------

    def test_a_loaded_run_predicts_the_same(self, short):
        loaded = load_run(short.folder)
        assert_same_weights(loaded.model, short.model)
        assert torch.equal(self.scores(loaded), self.scores(short))
        again = Evaluator(loaded.config, loaded.parts).evaluate(loaded.model, "test")
        assert again.metrics == short.metrics["test"]

    def test_same_seed_same_run(self, short, tiny_config, tmp_path):
        torch.rand(17)  # Whatever happened before a run must not matter.
        again = run_keys(tiny_config(self.model, **self.keys), tmp_path / "again")
        assert_same_weights(again.model, short.model)
        assert without_times(again.metrics) == without_times(short.metrics)

    def test_another_seed_is_another_run(self, short, tiny_config, tmp_path):
        keys = {**self.keys, "seed": 12345, "split_seed": short.config["seed"]}
        again = run_keys(tiny_config(self.model, **keys), tmp_path / "other")
        trained = bool(short.metrics["history"])
        assert (again.metrics["test"] != short.metrics["test"]) == trained

    def test_resumed_at_any_boundary(self, short, tiny_config, tmp_path, monkeypatch):
        """Ended after every single checkpoint in turn, and gone on with each time."""
        folder, save = tmp_path / "killed", StagedTrainer._save
        count = len(short.metrics["history"])

        def save_and_die(trainer, loader=None, finished=False):
            save(trainer, loader, finished)
            if not finished:
                raise Killed

        monkeypatch.setattr(StagedTrainer, "_save", save_and_die)
        arguments = {"config_dict": tiny_config(self.model, **self.keys), "output": folder}
        for _ in range(count):
            with pytest.raises(Killed):
                run(**arguments)
            arguments = {"resume": folder}
        resumed = run(**arguments)
        assert_same_weights(resumed.model, short.model)
        assert saved_metrics(folder) == saved_metrics(short.folder)

    def test_mixed_precision(self, short, tiny_config, tmp_path):
        """bfloat16 where autocast chooses it, in every stage."""
        if not short.metrics["history"]:
            pytest.skip("nothing is trained")
        keys = {**self.keys, "enable_amp": True, "split_protocol": "warm_start", "finetune_epochs": 1}
        made = run_keys(tiny_config(self.model, **keys), tmp_path / "amp")
        history = made.metrics["history"]
        assert history[-1]["stage"] == "finetune"
        assert all(isfinite(loss) for entry in history for loss in entry["loss"])
        assert torch.isfinite(self.scores(made)).all()

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
    def test_on_cuda(self, short, tiny_config, tmp_path):
        """The same steps in another order of sums."""
        keys = tiny_config(self.model, **{**self.keys, "use_gpu": True})
        on_cuda = run_keys(keys, tmp_path / "cuda")
        assert on_cuda.model.device.type == "cuda"
        losses = [torch.tensor([loss for entry in made.metrics["history"]
                                for loss in entry["loss"] if entry["epoch"] == 0])
                  for made in (short, on_cuda)]
        torch.testing.assert_close(*losses, rtol=0.02, atol=1e-3)
        assert torch.isfinite(self.scores(on_cuda)).all()

    # ---- its papers ----------------------------------------------------------------------------

    def test_citation_and_deviations(self):
        model_class = get_model(self.model)
        assert re.search(r"\b(19|20)\d\d\b", model_class.citation), "a citation names a year"
        assert "Deviations" in model_class.__doc__

    def test_every_default_is_explained_and_read(self):
        path = properties_path() / "model" / f"{self.model}.yaml"
        lines = [line for line in path.read_text(encoding="utf-8").splitlines()
                 if line.strip() and not line.startswith("#")]
        uncommented = [line for line in lines if not KEY_LINE.match(line)]
        assert not uncommented
        read = model_keys(get_model(self.model)) | recbole_keys()
        assert not set(read_yaml(path)) - read
