"""Tuning: the same number of trials for all, on validation data, and a study that goes on."""

import json
from pathlib import Path

import optuna
import pytest

from recbole_mmdiff.compare import cells, compare
from recbole_mmdiff.compare.space import suggest_values
from recbole_mmdiff.config.sources import read_yaml

SPACE = {"MF": {"learning_rate": {"low": 0.001, "high": 0.3, "log": True}},
         "CMF": {"embedding_size": {"low": 2, "high": 16}, "reg_weight": [0.0, 0.05]}}
TRIALS = 6


def trials_of(study) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(Path(study).glob("trial-*.json"))]


@pytest.fixture
def tuned(write_comparison, tmp_path, inline):
    """A tuned comparison: its file and its store."""
    path = write_comparison(tune={"trials": TRIALS, "space": SPACE}, seeds=[1])
    return path, compare(path, tmp_path / "tuned")


def test_equal_trials_and_the_best_on_validation_is_run(tuned):
    _, store = tuned
    studies = sorted(store.glob("studies/*"))
    assert len(studies) == 2
    plan = json.loads((store / "plan.json").read_text())
    assert {cell["trials"] for cell in plan["cells"]} == {TRIALS}
    for cell in plan["cells"]:
        (study,) = [path for path in studies if path.name.startswith(cell["model"] + "-")]
        trials = trials_of(study)
        assert len(trials) == TRIALS
        assert trials[0]["keys"] == {}    # the defaults
        best = min(trials, key=lambda trial: trial["score"])
        record = json.loads((store / cell["folder"] / "cell.json").read_text())
        assert record["tuned"] == best["keys"]
        config = read_yaml(store / cell["folder"] / "config.yaml")
        assert {key: config[key] for key in best["keys"]} == best["keys"]
        metrics = json.loads((store / cell["folder"] / "metrics.json").read_text())
        assert metrics["valid"]["rating"]["rmse"] == best["score"]


def test_trials_never_see_the_test_data(write_comparison, tmp_path, inline, monkeypatch):
    """Every evaluation inside a study is one of the validation part."""
    from recbole_mmdiff.evaluator import Evaluator

    seen, evaluate = [], Evaluator.evaluate

    def note(self, model, phase, *args, **kwargs):
        seen.append(phase)
        return evaluate(self, model, phase, *args, **kwargs)

    monkeypatch.setattr(Evaluator, "evaluate", note)
    path = write_comparison(tune={"trials": 3, "space": SPACE}, seeds=[1])
    monkeypatch.setattr(cells, "run_cell", lambda job: {"seconds": 0.0})
    compare(path, tmp_path / "store")
    assert seen and set(seen) == {"valid"}


def test_a_killed_study_goes_on_as_if_it_had_not_been(tuned, tmp_path):
    path, store = tuned
    again = tmp_path / "again"
    for study in store.glob("studies/*"):
        folder = again / "studies" / study.name
        folder.mkdir(parents=True)
        for file in sorted(study.glob("trial-*.json"))[:4]:
            (folder / file.name).write_bytes(file.read_bytes())
        # What a kill leaves right after a score, and while one is written.
        (folder / "trial-003").mkdir()
        (folder / ".trial-004.0123456789ab.tmp.json").touch()
    compare(path, again)
    assert {file.name for file in again.glob("studies/*/*")} \
        == {f"trial-{number:03}.json" for number in range(TRIALS)}
    for study in store.glob("studies/*"):
        assert [(trial["keys"], trial["score"]) for trial in trials_of(study)] == \
            [(trial["keys"], trial["score"]) for trial in trials_of(again / "studies" / study.name)]


def test_a_split_of_its_own_has_a_study_of_its_own(write_comparison, tmp_path, inline):
    """Users who choose keys on one split are test users of another: no seed may borrow them."""
    tune = {"trials": 2, "space": {"MF": {"reg_weight": [0.0, 0.1]}, "CMF": {}}}
    apart = compare(write_comparison("apart", tune=tune), tmp_path / "apart")
    assert len(list(apart.glob("studies/*"))) == 2
    shared = compare(write_comparison("shared", tune=tune, keys={"split_seed": 5}), tmp_path / "shared")
    assert len(list(shared.glob("studies/*"))) == 1
    assert len(list(shared.glob("cells/*"))) == 4


def test_all_trials_fail(write_comparison, tmp_path, inline):
    tune = {"trials": 2, "space": {"MF": {"learning_rate": [1e29]}, "CMF": {}}}
    path = write_comparison(tune=tune, seeds=[1], keys={"learning_rate": 1e30})
    store = compare(path, tmp_path / "store")
    errors = [json.loads(file.read_text())["error"] for file in store.glob("cells/*/error.json")]
    assert any("all 2 trials failed" in error for error in errors)
    (study,) = store.glob("studies/*")
    assert all(trial["score"] is None and "training loss" in trial["error"] for trial in trials_of(study))


def test_equal_values_are_tried_once(write_comparison, tmp_path, inline):
    tune = {"trials": 5, "space": {"MF": {"reg_weight": [0.1]}, "CMF": {}}}
    store = compare(write_comparison(tune=tune, seeds=[1]), tmp_path / "store")
    (study,) = store.glob("studies/*")
    defaults, first, *others = trials_of(study)
    assert defaults["keys"] == {} and first["keys"] == {"reg_weight": 0.1} and first["seconds"] > 0
    assert others == [{**first, "seconds": 0.0}] * 3


def test_suggested_values_are_of_the_space():
    space = {"layers": [[], [8], [8, 8]], "rate": {"low": 1e-4, "high": 1e-1, "log": True},
             "size": {"low": 4, "high": 16, "step": 4}, "share": {"low": 0.0, "high": 1}}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    found = [suggest_values(study.ask(), space) for _ in range(50)]
    assert {str(values["layers"]) for values in found} == {"[]", "[8]", "[8, 8]"}
    assert {values["size"] for values in found} == {4, 8, 12, 16}
    rates = sorted(values["rate"] for values in found)
    assert 1e-4 <= rates[0] < 1e-3 and 1e-2 < rates[-1] <= 1e-1
    assert all(isinstance(values["share"], float) and 0 <= values["share"] <= 1 for values in found)


def test_a_split_file_is_one_split(write_comparison, tmp_path, inline):
    first = compare(write_comparison(seeds=[1]), tmp_path / "first")
    split = next(first.glob("cells/*/split.npz"))
    tune = {"trials": 2, "space": {"MF": {"reg_weight": [0.0, 0.1]}, "CMF": {}}}
    store = compare(write_comparison("saved", tune=tune, keys={"split_file": str(split)}), tmp_path / "s")
    assert len(list(store.glob("studies/*"))) == 1


def test_a_failed_trial_is_tried_again(write_comparison, tmp_path, inline, monkeypatch):
    """A full disk, say, is no property of the keys."""
    tune = {"trials": 3, "space": {"MF": {"reg_weight": [0.0, 0.1, 0.2]}, "CMF": {}}}
    path = write_comparison(tune=tune, seeds=[1])
    real = cells.run

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(cells, "run", full)
    store = compare(path, tmp_path / "store")
    (study,) = store.glob("studies/*")
    assert [trial["score"] for trial in trials_of(study)] == [None] * 3
    monkeypatch.setattr(cells, "run", real)
    compare(path, store)
    assert all(trial["score"] > 0 for trial in trials_of(study))
    assert len(list(store.glob("cells/*/metrics.json"))) == 2 and not list(store.glob("cells/*/error.json"))


def test_the_order_of_a_space_tells_nothing(write_comparison, tmp_path, inline):
    spaces = [{"reg_weight": {"low": 0.01, "high": 0.1}, "embedding_size": [4, 8]},
              {"embedding_size": [4, 8], "reg_weight": {"low": 0.01, "high": 0.1}}]
    found = []
    for number, space in enumerate(spaces):
        tune = {"trials": 3, "space": {"MF": space, "CMF": {}}}
        store = compare(write_comparison(tune=tune, seeds=[1]), tmp_path / f"store{number}")
        (study,) = store.glob("studies/*")
        found.append((study.name, [trial["keys"] for trial in trials_of(study)]))
    assert found[0] == found[1]
