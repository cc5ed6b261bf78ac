"""The data in a run folder: what is written, and that it alone rebuilds the model."""

import io
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from running import run_keys, write_item_features

from recbole_mmdiff.data import keeping
from recbole_mmdiff.errors import DataError
from recbole_mmdiff.quick_start import load_run

#: a model of one domain and one of two that read features, and one that reads none
CASES = {"VBPR": {"modalities": ["text"], "embedding_size": 4},
         "MuSiC": {"modalities": ["image"], "use_ids": False, "embedding_size": 4, "feature_epochs": 1,
                   "side_epochs": 1, "epochs": 1, "num_steps": 4},
         "MF": {}}


@pytest.fixture
def lent_pair(make_tiny_pair, tmp_path):
    """A pair with features and a column that no model reads, in a folder that may go."""
    pair = make_tiny_pair(tmp_path / "lent")
    write_item_features(pair)
    path = pair.folder / "src" / "src.inter"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(f"{line}\t{row or 'secret:token'}"
                              for row, line in enumerate(lines)) + "\n", encoding="utf-8")
    return pair


def scores_of(run):
    users = run.parts.test.join(run.parts.test.inter_feat[:20])
    return run.model.eval().predict(users.to(run.model.device))


@pytest.fixture
def moved(lent_pair, tiny_config, ranking_config, tmp_path):
    """``moved(model, **keys)``: a run, and the place of a copy; the data and the folder are gone."""

    def make(model, **keys):
        keys = {"data_path": lent_pair.folder, **CASES[model], **keys}
        if model == "VBPR":
            keys |= {"split_protocol": "ratio", "val_interval": None,
                     "load_col": {"inter": ["user_id", "item_id"]}}
        made = (ranking_config if model == "VBPR" else tiny_config)(model, **keys)
        run = run_keys(made, tmp_path / "run")
        shutil.copytree(run.folder, tmp_path / "copy")
        shutil.rmtree(run.folder)
        shutil.rmtree(lent_pair.folder)
        return run, tmp_path / "copy"

    return make


@pytest.mark.parametrize("model", CASES)
def test_a_copied_folder_is_enough(moved, model):
    run, copy = moved(model)
    assert torch.equal(scores_of(load_run(copy)), scores_of(run))


def test_links_and_a_split_of_another_run_are_kept(moved, lent_pair, tiny_config, tmp_path):
    links = tmp_path / "links.tsv"
    links.write_text("source\ttarget\n" + "".join(f"{user}\t{user}\n" for user in lent_pair.overlap[:40]),
                     encoding="utf-8")
    keys = {"user_link_file_path": str(links), "data_path": lent_pair.folder}
    other = run_keys(tiny_config("Bias", seed=5, **keys), tmp_path / "other")
    run, copy = moved("MF", split_file=str(other.folder / "split.npz"), **keys)
    links.unlink()
    shutil.rmtree(other.folder)
    loaded = load_run(copy)
    assert loaded.parts.observed.num_overlap == 40
    assert torch.equal(scores_of(loaded), scores_of(run))


def test_only_what_was_read_is_kept(moved):
    _, copy = moved("MuSiC")
    kept = json.loads((copy / "data" / "kept.json").read_text(encoding="utf-8"))["bytes"]
    triples = {f"{role}/{name}/{name}.image.{suffix}" for role, name in (("source", "src"), ("target", "tgt"))
               for suffix in ("npy", "tokens", "json")}
    assert set(kept) == triples | {"source/src/src.inter", "target/tgt/tgt.inter"}
    assert all(os.path.getsize(copy / "data" / name) == size for name, size in kept.items())
    header = (copy / "data/source/src/src.inter").read_text(encoding="utf-8").splitlines()[0]
    assert "rating:float" in header and "secret" not in header


def test_feature_rows_of_other_items_are_left(lent_pair, tiny_config, tmp_path):
    """The file may be of a larger catalogue."""
    from recbole_mmdiff.data.features import FeatureFile

    folder = lent_pair.folder / "tgt"
    lines = (folder / "tgt.inter").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.split("\t")[1] not in ("ti5", "ti6")]
    (folder / "tgt.inter").write_text("\n".join(rows) + "\n", encoding="utf-8")
    keys = tiny_config("MuSiC", data_path=lent_pair.folder, **CASES["MuSiC"])
    run = run_keys(keys, tmp_path / "run")
    whole = set(FeatureFile.open(folder, "tgt", "image").tokens)
    file = FeatureFile.open(run.folder / "data" / "target" / "tgt", "tgt", "image")
    file.verify()
    assert whole - set(file.tokens) == {"ti5", "ti6"} and file.manifest["encoder"] == "test"


def test_without_data_the_error_says_why(moved):
    _, copy = moved("MF", keep_data=False)
    assert not (copy / "data").exists()
    with pytest.raises(DataError, match=r"there is no folder .*keeps no data \(keep_data\)"):
        load_run(copy)


def test_what_is_unfinished_does_not_count(lent_pair, tiny_config, tmp_path, monkeypatch):
    """A run killed while it copies has no ``kept.json``; resumed, it copies again."""
    class Full(OSError):
        pass

    def fail(*_):
        raise Full(28, "No space left on device", "src.inter")

    keys = tiny_config("MF", data_path=lent_pair.folder)
    with monkeypatch.context() as patch:
        patch.setattr(keeping, "write_json", fail)
        with pytest.raises(DataError, match=r"keep_data: .*No space left.*keep_data: False"):
            run_keys(keys, tmp_path / "run")
    assert keeping.kept_keys(tmp_path / "run", keys) == {}
    from recbole_mmdiff.quick_start import run

    run(resume=tmp_path / "run")
    assert keeping.kept_keys(tmp_path / "run", keys)["target_domain"]["data_path"].endswith("data/target")


def test_a_given_data_path_goes_first(lent_pair, tiny_config, tmp_path):
    run = run_keys(tiny_config("MF", data_path=lent_pair.folder), tmp_path / "run")
    loaded = load_run(run.folder, overrides={"data_path": str(lent_pair.folder)})
    assert loaded.parts.observed.dataset_path.startswith(str(lent_pair.folder))


class Bomb:
    """Unpickling it would make a file."""

    def __reduce__(self):
        return os.system, ("touch bomb_went_off",)


def test_kept_features_are_not_run(moved, tmp_path, monkeypatch):
    """Neither a pickle in place of a file, nor one inside of a matrix."""
    _, copy = moved("MuSiC")
    monkeypatch.chdir(tmp_path)
    folder = copy / "data" / "target" / "tgt"
    bombs = [(name, pickle.dumps(Bomb())) for name in ("tgt.inter", "tgt.image.npy", "tgt.image.tokens",
                                                       "tgt.image.json")]
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    for name, content in [*bombs, ("tgt.image.npy", buffer.getvalue())]:
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=re.escape(name)):
            load_run(copy)
        (folder / name).write_bytes(good)
    load_run(copy)
    assert not (tmp_path / "bomb_went_off").exists()
