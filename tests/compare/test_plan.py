"""The comparison file: what it may hold, what its cells are, and what it refuses."""

import pytest

from recbole_mmdiff.compare import compare
from recbole_mmdiff.compare.plan import Comparison
from recbole_mmdiff.errors import ConfigError, DataError


def test_cells_are_the_product_and_layers_lie_over_each_other(write_comparison):
    path = write_comparison(
        keys={"epochs": 1},
        models={"plain": {"model": "MF", "biases": False}, "CMF": {}},
        settings={"β=20%": {"test_user_ratio": 0.2}, "β=50%": {"test_user_ratio": 0.5}},
        tables={"rating": {"metrics": ["rating.mae"]},
                "ranking": {"metrics": ["ranking_full.ndcg@10"], "models": ["CMF"],
                            "keys": {"train_neg_ratio": 1, "epochs": 3}}})
    cells = Comparison.read(path).cells()
    found = [(cell.table, cell.setting, cell.seed, cell.model) for cell in cells]
    assert found == [
        *(("rating", setting, seed, model) for setting in ("β=20%", "β=50%") for seed in (1, 2)
          for model in ("plain", "CMF")),
        *(("ranking", setting, seed, "CMF") for setting in ("β=20%", "β=50%") for seed in (1, 2))]
    first, last = cells[0].keys, cells[-1].keys
    assert (first["model"], first["biases"], first["test_user_ratio"], first["seed"],
            first["epochs"]) == ("MF", False, 0.2, 1, 1)
    assert (last["model"], last["test_user_ratio"], last["seed"], last["epochs"],
            last["train_neg_ratio"]) == ("CMF", 0.5, 2, 3, 1)


def test_a_sweep_varies_one_key(write_comparison):
    path = write_comparison(sweeps=[{"model": "MF", "key": "reg_weight", "values": [0.0, 0.1]}])
    comparison = Comparison.read(path)
    swept = [cell for cell in comparison.cells() if cell.sweep]
    assert comparison.labels() == ["MF", "CMF", "MF reg_weight=0.0", "MF reg_weight=0.1"]
    assert [(cell.keys["reg_weight"], cell.seed) for cell in swept] == [(0.0, 1), (0.1, 1), (0.0, 2),
                                                                       (0.1, 2)]
    assert swept[1].sweep == {"model": "MF", "key": "reg_weight", "value": 0.1}


@pytest.mark.parametrize(("parts", "message"), [
    ({"model": {"MF": {}}}, "'model' is unknown.*did you mean 'models'"),
    ({"models": {}}, "models: needs one line"),
    ({"models": ["MF"]}, "models: needs 'key: value' lines"),
    ({"models": {"MF": 3}}, "models: MF: needs 'key: value' lines"),
    ({"models": {"MF": {"seed": 3}}}, "models: MF: seed is of the protocol"),
    ({"seeds": [1, 1]}, "seeds: needs one or more different numbers"),
    ({"seeds": 3}, "seeds: needs a list"),
    ({"seeds": [[1]]}, "seeds: needs a whole number"),
    ({"seeds": [2**32]}, "is not from 0 up to"),
    ({"tables": {"rating": {}}}, "tables: rating: metrics: needs a list"),
    ({"tables": {"rating": {"metrics": ["mae"]}}}, "metrics: needs a list such as"),
    ({"tables": {"rating": {"metrics": ["rating.mae"], "models": ["FM"]}}}, "'FM' is none of"),
    ({"tables": {"rating": {"metric": ["rating.mae"]}}}, "did you mean 'metrics'"),
    ({"sweeps": [{"model": "MF", "key": "reg_weight"}]}, "needs model, key and a list of values"),
    ({"sweeps": [{"model": "FM", "key": "reg_weight", "values": [1]}]}, "'FM' is none of"),
    ({"ours": ["FM"]}, "ours: 'FM' is none of"),
    ({"ours": 3}, "ours: needs a list"),
    ({"ours": ["MF", "MF"]}, "ours: needs one or more different labels"),
    ({"config": [3]}, "config: needs text"),
    ({"models": {"MF": {"test_user_ratio": 0.3}}}, "test_user_ratio is of the protocol"),
    ({"models": {"x": {"model": 3}}}, "models: x: model: needs text"),
    ({"models": {"MF": {"biases": True}}, "settings": {"β": {"biases": False}}},
     "biases is set by models: MF and by settings: β"),
    ({"tables": {"r": {"metrics": ["rating.mae"], "models": []}}}, "models: needs one or more"),
    ({"tables": {"r": {"metrics": ["rating.mae", "rating.mae"]}}}, "metrics: needs a list such as"),
    ({"sweeps": [{"model": "MF", "key": "seed", "values": [1]}]}, "list it under seeds"),
    ({"sweeps": [{"model": "MF", "key": "reg_weight", "values": [1, 1]}]}, "needs different values"),
    ({"sweeps": [{"model": "MF", "key": "reg_weight", "values": [1]}] * 2}, "is swept twice"),
    ({"embeddings": {}}, "embeddings: models: needs a list"),
    ({"embeddings": {"models": ["MF"], "users": 0}}, "users: 0 is too few"),
    ({"embeddings": {"models": ["MF"], "evaluations": {"MF": 3}}}, "evaluations: MF: needs a list"),
    ({"embeddings": {"models": ["MF"], "evaluations": {"CMF": [3]}}}, "'CMF' is none of"),
    ({"tune": {"space": {"MF": {"test_user_ratio": [0.1]}, "CMF": {}}}}, "is of the protocol"),
    ({"tune": {"space": {"MF": {"reg_weight": {"low": 0, "high": 1, "step": -1}}, "CMF": {}}}},
     "a step above 0"),
    ({"tune": {"trials": 3}}, "tune: space: needs 'key: value' lines"),
    ({"tune": {"trials": 0, "space": {}}}, "trials: 0, seed: 0: use trials from 1"),
    ({"tune": {"space": {"MF": {}}}}, "space: there is none for CMF"),
    ({"tune": {"space": {"MF": {}, "CMF": {}, "FM": {}}}}, "'FM' is no model"),
    ({"tune": {"space": {"MF": {"reg_weight": 1}, "CMF": {}}}}, "reg_weight: needs a list or"),
    ({"tune": {"space": {"MF": {"reg_weight": []}, "CMF": {}}}}, "reg_weight: needs one choice or more"),
    ({"tune": {"space": {"MF": {"reg_weight": {"low": 2, "high": 1}}, "CMF": {}}}}, "low below high"),
    ({"tune": {"space": {"MF": {"reg_weight": {"low": 0, "high": 10**400}}, "CMF": {}}}}, "low below high"),
    ({"tune": {"space": {"MF": {"reg_weight": {"low": 0, "high": 1, "log": True}}, "CMF": {}}}},
     "starts above 0"),
    ({"published": {"source": "T", "models": ["MF"]}}, "values is missing"),
    ({"published": {"source": "T", "models": ["MF"], "values": {"default": {"rating.mae": [1, 2]}}}},
     "needs one number for each"),
    ({"published": {"source": "T", "models": ["MF"], "values": {"β": {}}}}, "'β' is none of"),
    ({"published": {"source": "T", "models": ["FM"], "values": {}}}, "'FM' is none of"),
    ({"published": {"source": "T", "models": ["MF"], "values": {"default": {"rating.mea": [1]}}}},
     "'rating.mea' is none of"),
    ({"published": {"source": "T", "models": ["MF"], "values": {"default": {"rating.mae": ["n/a"]}}}},
     "needs a whole number or a number"),
    ({"published": {"source": "T", "models": ["MF"], "values": {}, "tolerance": {"rating.mae": "5%"}}},
     "tolerance: rating.mae: needs"),
])
def test_what_a_file_cannot_say(parts, message, write_comparison):
    with pytest.raises(ConfigError, match=message) as caught:
        Comparison.read(write_comparison(**parts))
    assert "small.yaml" in str(caught.value)


@pytest.mark.parametrize(("parts", "message"), [
    ({"models": {"MFF": {}}}, "no model 'MFF'"),
    ({"models": {"MF": {"embeding_size": 3}}}, "did you mean 'embedding_size'"),
    ({"settings": {"a": {"test_user_ratio": "x"}}}, "test_user_ratio: 'x'"),
    ({"tables": {"r": {"metrics": ["rating.mea"]}}}, "did you mean 'mae'"),
    ({"tables": {"r": {"metrics": ["ranking_full.ndcg@7"]}}}, "'ndcg@7' is not known"),
    ({"tables": {"r": {"metrics": ["ratings.mae"]}}}, "'ratings' is not known"),
    ({"tables": {"r": {"metrics": ["throughput.traning"]}}}, "did you mean 'training'"),
    ({"tables": {"r": {"metrics": ["groups.cold_user.rating.mae"]}}}, "did you mean 'cold_users'"),
    ({"tune": {"space": {"MF": {"reg_weigth": [1.0]}, "CMF": {}}}}, "did you mean 'reg_weight'"),
    ({"sweeps": [{"model": "MF", "key": "reg_weigth", "values": [1]}]}, "did you mean 'reg_weight'"),
])
def test_a_mistake_in_a_cell_is_found_before_anything_runs(parts, message, write_comparison, tmp_path):
    with pytest.raises(ConfigError, match=message):
        compare(write_comparison(**parts), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_missing_data_are_named_with_their_preset(write_comparison, tmp_path):
    path = write_comparison(keys={"target_domain": {"dataset": "nothing"}}, preset="diffcdr-task1")
    with pytest.raises(DataError, match=r"nothing: there is no data set .*"
                                        r"prepare amazon --preset.*diffcdr-task1"):
        compare(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("key", ["seed", "model", "test_user_ratio", "reg_weight", "learning_rate",
                                 "train_neg_ratio", "biases"])
def test_the_command_line_does_not_make_all_cells_the_same(key, write_comparison, tmp_path):
    path = write_comparison(
        models={"MF": {}, "CMF": {}, "plain": {"model": "MF", "biases": False}},
        settings={"a": {"test_user_ratio": 0.2}, "b": {"test_user_ratio": 0.5}},
        tables={"rating": {"metrics": ["rating.mae"], "keys": {"train_neg_ratio": 1}}},
        sweeps=[{"model": "MF", "key": "reg_weight", "values": [0.0, 0.1]}],
        tune={"space": {"MF": {"learning_rate": [0.1, 0.2]}, "CMF": {}, "plain": {}}})
    with pytest.raises(ConfigError, match=f"--{key}: is what the cells .* differ in"):
        compare(path, tmp_path / "store", overrides={key: 1})
