"""What every model of ours must do, whatever its paper.

A test class ``Test<Model>`` of a cross-domain model is a ``ModelContract``, that of a model that ranks
in one domain a ``RankingContract``.
"""

import random
import re
from math import isfinite
from statistics import mean

import pytest
import torch
from recbole.data.interaction import Interaction
from running import (
    FINETUNED_MODELS,
    assert_same_weights,
    item_mean_rmse,
    run_in_pieces,
    run_keys,
    saved_metrics,
    without_times,
)

from recbole_mmdiff.config.keys import model_keys, recbole_keys
from recbole_mmdiff.config.sources import properties_path, read_yaml
from recbole_mmdiff.evaluator import Evaluator
from recbole_mmdiff.model.registry import get_model
from recbole_mmdiff.quick_start import load_run

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


class Contract:
    """Tests of one model that every kind of model passes.

    Attributes:
        model: its name.
        keys: of a run of a second or so, above the tiny configuration.
        accurate_keys: laid over ``keys`` for a run that is long enough to learn something.
        least_ndcg_ratio: of a ranking model: lower bound of its NDCG@10 over those of popularity and of
            chance, where the taste groups can be told.
    """

    model = ""
    keys: dict = {}
    accurate_keys: dict = {}
    least_ndcg_ratio = 2.5

    # ---- runs that the tests share ------------------------------------------------------------

    @pytest.fixture(scope="class")
    def config_of(self):
        """``config_of(**keys)``: a ``config_dict`` with these keys over ``keys``."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def short(self, config_of, tmp_path_factory):
        """A short run."""
        return run_keys(config_of(), tmp_path_factory.mktemp(self.model) / "run")

    @pytest.fixture(scope="class")
    def accurate(self, config_of, tmp_path_factory):
        """A run that learns."""
        return run_keys(config_of(**self.accurate_keys), tmp_path_factory.mktemp(self.model) / "accurate")

    @staticmethod
    def scores(run_of_model):
        """(users, items) by ``full_sort_predict``, for every user from [PAD] on."""
        parts, model = run_of_model.parts, run_of_model.model.eval()
        users = Interaction({parts.test.uid_field: torch.arange(parts.test.user_num)})
        return model.full_sort_predict(users.to(model.device)).view(parts.test.user_num, -1)

    @staticmethod
    def baselines(run_of_model) -> float:
        """NDCG@10 of popularity, or of chance, whichever is better."""
        popularity = ndcg_of(run_of_model, Popularity(run_of_model.parts))
        chance = mean(ndcg_of(run_of_model, Chance(run_of_model.parts, seed)) for seed in range(10))
        return max(popularity, chance)

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

    # ---- saving, repeating, resuming -----------------------------------------------------------

    def test_a_loaded_run_predicts_the_same(self, short):
        loaded = load_run(short.folder)
        assert_same_weights(loaded.model, short.model)
        assert torch.equal(self.scores(loaded), self.scores(short))
        again = Evaluator(loaded.config, loaded.parts).evaluate(loaded.model, "test")
        assert again.metrics == short.metrics["test"]

    def test_same_seed_same_run(self, short, config_of, tmp_path):
        torch.rand(17)  # Whatever happened before a run must not matter.
        again = run_keys(config_of(), tmp_path / "again")
        assert_same_weights(again.model, short.model)
        assert without_times(again.metrics) == without_times(short.metrics)

    def test_another_seed_is_another_run(self, short, config_of, tmp_path):
        keys = config_of(seed=12345, split_seed=short.config["seed"])
        again = run_keys(keys, tmp_path / "other")
        trained = bool(short.metrics["history"])
        assert (again.metrics["test"] != short.metrics["test"]) == trained

    def test_resumed_at_any_boundary(self, short, config_of, tmp_path, monkeypatch):
        resumed = run_in_pieces(config_of(), tmp_path / "killed", len(short.metrics["history"]), monkeypatch)
        assert_same_weights(resumed.model, short.model)
        assert saved_metrics(resumed.folder) == saved_metrics(short.folder)

    def in_half_precision(self, keys: dict, output):
        """The history of a run with bfloat16 where autocast chooses it; losses and scores are finite."""
        made = run_keys({**keys, "enable_amp": True}, output)
        history = made.metrics["history"]
        assert all(isfinite(loss) for entry in history for loss in entry["loss"])
        assert torch.isfinite(self.scores(made)).all()
        return history

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
    def test_on_cuda(self, short, config_of, tmp_path):
        """The same steps in another order of sums."""
        on_cuda = run_keys(config_of(use_gpu=True), tmp_path / "cuda")
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
        of_every_run = set(read_yaml(properties_path() / "overall.yaml"))
        read = model_keys(get_model(self.model)) | recbole_keys() | of_every_run
        assert not set(read_yaml(path)) - read


class ModelContract(Contract):
    """Of a model for a pair of domains, under ``cold_start_users`` on the tiny pair.

    Attributes:
        transfers: whether it tells a cold-start user from another.
        best_rmse_ratio: upper bound of its RMSE over the item mean's, on the tiny pair.
        least_ndcg_ratio: of a ranking model instead, on the pair of taste groups.
        most_ndcg_ratio: upper bound of the same where source rows tell nothing of their users.
        featured: whether it needs features of the items there.
    """

    transfers = True
    featured = False
    best_rmse_ratio = 1.0
    most_ndcg_ratio = 1.3

    @pytest.fixture(scope="class")
    def config_of(self, tiny_config):
        return lambda **keys: tiny_config(self.model, **{**self.keys, **keys})

    @pytest.fixture(scope="class")
    def on_tastes(self, config_of, taste_pair, swapped_pair, tmp_path_factory, request):
        """Runs of a ranking model where the source tells what a cold user likes, and where not."""
        if get_model(self.model).predicts_ratings:
            pytest.skip("its band is one of RMSE")
        folders = request.getfixturevalue("featured_tastes") if self.featured \
            else [pair.folder for pair in (taste_pair, swapped_pair)]
        return [run_keys(config_of(**{**self.accurate_keys, "data_path": folder}),
                         tmp_path_factory.mktemp(self.model) / "tastes")
                for folder in folders]

    @staticmethod
    def cold_users(parts):
        """The users who are tested and have no training row."""
        return torch.unique(parts.test.inter_feat[parts.test.uid_field])

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
        least = self.baselines(on_tastes[0])
        assert told > self.least_ndcg_ratio * least
        assert untold < self.most_ndcg_ratio * least

    def test_mixed_precision(self, short, config_of, tmp_path):
        """In every stage, fine-tuning among them."""
        if not short.metrics["history"]:
            pytest.skip("nothing is trained")
        if self.model not in FINETUNED_MODELS:
            self.in_half_precision(config_of(), tmp_path / "amp")
            return
        keys = config_of(split_protocol="warm_start", finetune_epochs=1)
        assert self.in_half_precision(keys, tmp_path / "amp")[-1]["stage"] == "finetune"


class RankingContract(Contract):
    """Of a model that ranks in one domain, on the domain of taste groups whose items have features.

    A subclass sets ``model``, ``keys``, ``accurate_keys`` and ``least_ndcg_ratio``: its NDCG@10 on the
    test users over that of popularity or chance, as measured, less some room for another machine. The
    domain has users and items without a training row, and items without an image, a text, or both.
    """

    @pytest.fixture(scope="class")
    def config_of(self, ranking_config):
        return lambda **keys: ranking_config(self.model, **{**self.keys, **keys})

    def test_ranking_band(self, accurate):
        """Users get the items of their group."""
        found = accurate.metrics["test"]["ranking_full"]["ndcg@10"]
        assert found > self.least_ndcg_ratio * self.baselines(accurate)

    def test_users_without_a_training_row_get_scores(self, short, taste_domain):
        part = short.parts.train
        cold = torch.as_tensor(part.token2id(part.uid_field, taste_domain.cold))
        assert not torch.isin(cold, part.inter_feat[part.uid_field]).any()
        rows = self.scores(short)[cold]
        assert torch.isfinite(rows).all()
        assert (rows.std(1) > 0).all()

    def test_training_rows_alone_decide(self, config_of, taste_domain, tmp_path):
        """Weights and scores are the same, bit for bit, whatever the held-out rows are. Without a
        validation, which chooses the epoch by its rows."""
        draw = random.Random(1)
        theirs = {(row[0], row[1]) for row in taste_domain.rows}
        items = sorted({row[1] for row in taste_domain.rows} - {taste_domain.new})
        rows = [row if row[4] == "0" or row[1] == taste_domain.new else
                (row[0], draw.choice([item for item in items if (row[0], item) not in theirs]), *row[2:])
                for row in taste_domain.rows]
        other = taste_domain.write(tmp_path / "data", rows)
        runs = [run_keys(config_of(eval_step=0, data_path=folder), tmp_path / name)
                for name, folder in (("before", taste_domain.folder), ("after", other.folder))]
        before, after = (made.parts for made in runs)
        for field in (before.test.uid_field, before.test.iid_field):
            assert list(before.test.field2id_token[field]) == list(after.test.field2id_token[field])
        assert not torch.equal(before.test.inter_feat["item_id"], after.test.inter_feat["item_id"])
        assert_same_weights(*(made.model for made in runs))
        assert torch.equal(*map(self.scores, runs))

    def test_mixed_precision(self, config_of, tmp_path):
        """In every stage."""
        self.in_half_precision(config_of(), tmp_path / "amp")


def contracts() -> dict[str, type[Contract]]:
    """Model -> its contract class, of the test files that are imported."""
    return {test.model: test for kind in (ModelContract, RankingContract) for test in kind.__subclasses__()}
