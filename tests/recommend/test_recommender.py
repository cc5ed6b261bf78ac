"""Recommendations of known users: equal to the evaluation's ranking, their files, and the command."""

import json
import os
import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from running import SINGLE, run_keys

from recbole_mmdiff import cli
from recbole_mmdiff.errors import CheckpointError, ConfigError, DataError
from recbole_mmdiff.evaluator import Evaluator
from recbole_mmdiff.evaluator.ranking import full_ranking
from recbole_mmdiff.recommend import Recommender, table


@pytest.fixture(scope="module")
def folder(tiny_config, tmp_path_factory):
    """The folder of a run of MF."""
    return run_keys(tiny_config("MF"), tmp_path_factory.mktemp("recommend") / "run").folder


@pytest.fixture(scope="module")
def recommender(folder):
    return Recommender.load(folder, device="cpu")


def rated(part):
    """(user, item) tokens of the rows of a part."""
    rows = part.inter_feat
    return list(zip(part.field2id_token["user_id"][rows["user_id"]].tolist(),
                    part.field2id_token["item_id"][rows["item_id"]].tolist(), strict=True))


@pytest.mark.parametrize("model", ["MF", "LightGCN", "CMF", "FM"])
def test_equal_to_the_ranking_of_the_evaluation(model, tiny_config, tmp_path):
    made = run_keys(tiny_config(model, epochs=1), tmp_path / "run")
    evaluator, test = Evaluator(made.config, made.parts), made.parts.test
    requests, users = evaluator._requests("ranking_full", test, "test", made.model.device)
    ranked = full_ranking(made.model.eval(), requests, 10, 2**20).items
    tokens = test.field2id_token["user_id"][users]
    found = Recommender(made).recommend(tokens, 10, seen="valid")
    for user, items in zip(tokens, test.field2id_token["item_id"][ranked.numpy()], strict=True):
        assert found.of(user) == items.tolist()


@pytest.mark.parametrize(("seen", "parts"), [("train", ["observed"]), ("valid", ["observed", "valid"]),
                                             ("all", ["observed", "valid", "test"])])
def test_all_that_is_not_seen_in_the_order_of_predictions(seen, parts, recommender):
    found = recommender.recommend(k=1000, seen=seen)
    left_out = {pair for part in parts for pair in rated(getattr(recommender.parts, part))}
    users, items = recommender.users.tolist(), recommender.parts.test.field2id_token["item_id"][1:].tolist()
    wanted = {(user, item) for user in users for item in items} - left_out
    assert set(zip(found.user.tolist(), found.item.tolist(), strict=True)) == wanted
    assert len(found) == len(wanted)
    test = recommender.parts.test
    ids = [torch.tensor([test.field2token_id[field][token] for token in tokens])
           for field, tokens in (("user_id", found.user), ("item_id", found.item))]
    scores = recommender.model.forward(*ids).detach().numpy()
    np.testing.assert_allclose(found.score, scores, rtol=1e-5)
    frame = found.frame()
    assert (frame.groupby("user")["score"].diff().dropna() <= 0).all()
    assert (frame["rank"] == frame.groupby("user").cumcount() + 1).all()


def test_cold_users_have_no_training_row(recommender):
    warm = {user for user, _ in rated(recommender.parts.observed)}
    assert set(recommender.cold_users) == set(recommender.users) - warm
    assert {user for user, _ in rated(recommender.parts.test)} <= set(recommender.cold_users)


def test_chunks_change_nothing(recommender, monkeypatch):
    whole = recommender.recommend(k=7)
    monkeypatch.setitem(recommender.config.final_config_dict, "eval_chunk_elements", 150)
    pd.testing.assert_frame_equal(recommender.recommend(k=7).frame(), whole.frame())


def test_unknown_users(recommender):
    user = str(recommender.users[3])
    with pytest.raises(DataError, match=r"'nobody'.*1 of 2.*--skip-unknown"):
        recommender.recommend(["nobody", user])
    assert set(recommender.recommend([user, "nobody", user, "[PAD]"], skip_unknown=True).user) == {user}
    with pytest.raises(DataError, match="nobody is left"):
        recommender.recommend(["nobody"], skip_unknown=True)
    for keys in ({"k": 0}, {"seen": "some"}):
        with pytest.raises(ConfigError):
            recommender.recommend([user], **keys)


def test_devices_and_models_that_are_refused(folder, tiny_config, tmp_path):
    for device in ("tpu", "cuda:", "cuda:x", "cpu:0", ""):
        with pytest.raises(ConfigError, match="use cpu, cuda"):
            Recommender.load(folder, device=device)
    with pytest.raises(ConfigError, match="there is no cuda:99 here"):
        Recommender.load(folder, device="cuda:99")
    keys = {**SINGLE, "epochs": 1, "hidden_size": 8, "embedding_size": 8, "train_neg_sample_args": None}
    run = run_keys(tiny_config("GRU4Rec", **keys), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"recommend: GRU4Rec ranks what follows a sequence, not what"):
        Recommender(run)


@pytest.mark.parametrize("name", ["metrics.json", "checkpoint.pth"])
def test_a_run_that_is_not_finished(name, folder, tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        Recommender.load(tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(ConfigError, match=rf"not finished: there is no {name}; go on .*--resume="):
        Recommender.load(tmp_path / "copy")


def test_nothing_left_to_recommend(recommender):
    """``k`` is more than there is; users who have seen all that is ranked have no row."""
    seen = rated(recommender.parts.observed)
    user, item = seen[0]
    assert len(recommender.recommend([user], k=10**6)) == len(recommender.items) - sum(
        other == user for other, _ in seen)
    found = recommender.recommend([user], items=[item]).frame()
    assert not len(found) and found.columns.tolist() == ["user", "item", "score", "rank"]


# ---- files and the command -------------------------------------------------------------------------


def test_files(recommender, tmp_path):
    found = recommender.recommend(k=3)
    found.save(tmp_path / "a.csv")
    read = pd.read_csv(tmp_path / "a.csv", dtype={"user": str, "item": str, "score": np.float32})
    pd.testing.assert_frame_equal(read, found.frame(), check_dtype=False)
    found.save(tmp_path / "a.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["item"] for line in lines] == found.item.tolist() and set(lines[0]) == set(read)
    for name, message in (("a.txt", r"ends in '\.txt'"), ("none/a.csv", "there is no folder")):
        with pytest.raises(ConfigError, match=message):
            found.save(tmp_path / name)


def test_parquet(recommender, tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    found = recommender.recommend(k=3)
    found.save(tmp_path / "a.parquet")
    read = pyarrow.read_table(tmp_path / "a.parquet")
    assert [str(kind).removeprefix("large_") for kind in read.schema.types] \
        == ["string", "string", "float", "int64"]
    assert read.to_pydict() == {name: column.tolist() for name, column in vars(found).items()}


def test_without_pyarrow_nothing_is_written(recommender, tmp_path, monkeypatch):
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"a\.parquet needs pyarrow \(pip install pyarrow\); or write"):
        recommender.recommend(k=3).save(tmp_path / "a.parquet")
    assert not list(tmp_path.iterdir())


def test_the_command(folder, recommender, tmp_path, capsys):
    users = recommender.cold_users[:2].tolist()
    (tmp_path / "users.txt").write_text("\n".join(users) + "\n", encoding="utf-8-sig")
    for who in (",".join(users), ",".join(users * 99), str(tmp_path / "users.txt")):
        assert cli.main(["recommend", str(folder), f"--users={who}", "-k", "4"]) == 0
        assert capsys.readouterr().out == recommender.recommend(users, 4).frame().to_csv(index=False)
    output = tmp_path / "cold.csv"
    assert cli.main(["recommend", str(folder), "--users=cold", f"--output={output}", "--seen=all"]) == 0
    assert f"for {len(recommender.cold_users)} users: {output}" in capsys.readouterr().out
    assert set(pd.read_csv(output)["user"]) == set(recommender.cold_users)
    for words in ([], ["--users=cold", "--new-users=x"], ["--users=cold", "--seen=x"],
                  ["--users=cold", "-k=0"], ["--users=cold", "--output=x.txt"],
                  ["--users=cold", "--epochs=3"], ["--users=,"]):
        assert cli.main(["recommend", str(folder), *words]) == 2
        assert capsys.readouterr().err.startswith("error: ")


# ---- nothing in a folder is run ----------------------------------------------------------------------


class Bomb:
    """Unpickling it would make a file."""

    def __reduce__(self):
        return os.system, ("touch bomb_went_off",)


def test_no_file_of_a_run_folder_is_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    refused = set()
    for name in files:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        (copy / name).write_bytes(pickle.dumps(Bomb()))
        try:
            Recommender.load(copy)
        except (CheckpointError, ConfigError, DataError) as error:
            refused.add(name.name)
            assert name.name in str(error)
        shutil.rmtree(copy)
    # The others are not read: the log, and the split that the configuration gives anew.
    assert refused == {"checkpoint.pth", "config.yaml", "metrics.json", "kept.json", "src.inter", "tgt.inter"}
    assert not (tmp_path / "bomb_went_off").exists()


def test_a_checkpoint_with_objects_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    torch.save({"format": 1, "model": "MF", "state_dict": Bomb()}, tmp_path / "copy" / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="pickled Python objects"):
        Recommender.load(tmp_path / "copy")
    assert not (tmp_path / "bomb_went_off").exists()
