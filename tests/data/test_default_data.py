"""The embedded default data: two domains out of the ml-100k inside recbole's wheel."""

import csv
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dataset_prep import ml100k
from recbole_mmdiff.data.features import FeatureFile, find_modalities

REPOSITORY = Path(__file__).resolve().parents[2]
DRAMA = {"Drama", "Comedy", "Romance", "Children's", "Musical", "Animation", "Documentary"}
DRAMA |= {"Fantasy"}


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def content(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*")
            if p.is_file() and p.suffix != ".lock"}


def run(root, hash_seed):
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OPENBLAS_NUM_THREADS": hash_seed}
    command = [sys.executable, "-m", "dataset_prep.ml100k", str(root)]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "dataset"
    run(root, "1")
    return root


@pytest.fixture
def quick_build(root, tmp_path_factory, monkeypatch):
    """Building copies the finished domains: what is tested is how they are installed."""
    finished = tmp_path_factory.mktemp("finished") / "dataset"
    shutil.copytree(root, finished)

    def copy(workspace):
        shutil.copytree(finished, workspace, dirs_exist_ok=True)

    monkeypatch.setattr(ml100k, "_build", copy)


@pytest.fixture(scope="module")
def inter(root):
    return {name: read(root / name / f"{name}.inter") for name in ml100k.GENRES}


@pytest.fixture(scope="module")
def items(root):
    return {name: read(root / name / f"{name}.item") for name in ml100k.GENRES}


def test_bytes_do_not_depend_on_hash_seed_or_thread_count(root, tmp_path):
    run(tmp_path, "2")
    first, second = content(root), content(tmp_path)
    assert len(first) == 18
    assert first == second


def test_every_row_is_one_of_ml100k_and_none_is_lost(inter, items):
    raw = read(ml100k.raw_folder() / "ml-100k.inter")
    genres = {
        film["item_id:token"]: film["class:token_seq"].split()
        for film in read(ml100k.raw_folder() / "ml-100k.item")
    }
    users = {name: {row["user_id:token"] for row in rows} for name, rows in inter.items()}
    expected = Counter()
    for row in raw:
        listed = [genre for genre in genres[row["item_id:token"]] if genre != "unknown"]
        drama = sum(genre in DRAMA for genre in listed)
        if not listed:
            continue
        tie = 2 * drama == len(listed)
        side = listed[0] in DRAMA if tie else 2 * drama > len(listed)
        name = ml100k.SOURCE if side else ml100k.TARGET
        if row["user_id:token"] in users[name]:
            expected[(name, *row.values())] += 1
    written = Counter((name, *row.values()) for name, rows in inter.items() for row in rows)
    assert written == expected
    assert all(count == 1 for count in written.values())


def test_domains_share_users_but_no_items(inter):
    users = [{row["user_id:token"] for row in inter[name]} for name in ml100k.GENRES]
    films = [{row["item_id:token"] for row in inter[name]} for name in ml100k.GENRES]
    assert not films[0] & films[1]
    assert (len(users[0] - users[1]), len(users[1] - users[0])) == (141, 140)
    assert len(users[0] & users[1]) == 661
    assert [len(found) for found in films] == [1137, 522]
    assert [len(inter[name]) for name in ml100k.GENRES] == [50730, 34688]


def test_user_rule_is_of_the_token_only():
    users = [str(i) for i in range(1, 101)]
    kept = ml100k.user_domains(users)
    assert kept == ml100k.user_domains(users[::-1] + users[:7])
    assert Counter(kept.values()) == {
        ("ml100k-drama",): 15,
        ("ml100k-action",): 15,
        ("ml100k-drama", "ml100k-action"): 70,
    }


@pytest.mark.parametrize(
    ("genres", "expected"),
    [
        ("Drama", "ml100k-drama"),
        ("Crime Drama Thriller", "ml100k-action"),
        ("Action Comedy", "ml100k-action"),
        ("Comedy Action", "ml100k-drama"),
        ("unknown", None),
        ("", None),
        ("unknown War", "ml100k-action"),
    ],
)
def test_family_of_a_film(genres, expected):
    assert ml100k.family(genres.split()) == expected


def test_files_are_sorted_and_their_columns_are_declared(inter, items):
    for name in ml100k.GENRES:
        keys = [
            (r["user_id:token"], int(r["timestamp:float"]), r["item_id:token"]) for r in inter[name]
        ]
        assert keys == sorted(keys)
        films = [film["item_id:token"] for film in items[name]]
        assert films == sorted(set(films))
        assert set(films) == {row["item_id:token"] for row in inter[name]}
        assert list(items[name][0]) == list(ml100k._ITEM_HEAD)
        assert all(all(film.values()) for film in items[name])


def test_features_open_verify_and_belong_to_their_films(root, items):
    for name in ml100k.GENRES:
        assert find_modalities(root / name, name) == ["genre", "text"]
        tokens = ["[PAD]", *(film["item_id:token"] for film in items[name])]
        listed = {film["item_id:token"]: film["genres:token_seq"].split() for film in items[name]}
        order = ["[PAD]", *np.random.default_rng(0).permutation(tokens[1:])]
        genre = FeatureFile.open(root / name, name, "genre")
        genre.verify()
        columns = genre.manifest["columns"]
        hot = genre.align(order, "error").matrix
        assert hot.shape == (len(order), 18)
        for token, row in zip(order[1:], hot[1:], strict=True):
            assert {columns[i] for i in np.flatnonzero(row)} == set(listed[token]) & set(columns)
        text = FeatureFile.open(root / name, name, "text")
        text.verify()
        assert text.matrix.shape == (len(tokens) - 1, 64)
        assert text.manifest["fields"] == ["title"]
        assert {"encoder", "sklearn"} <= set(text.manifest)


def test_text_puts_sequels_of_both_domains_near_each_other(root, items):
    titles, vectors = [], []
    for name in ml100k.GENRES:
        titles += [film["title:token_seq"] for film in items[name]]
        vectors.append(FeatureFile.open(root / name, name, "text").matrix)
    similarity = np.vstack(vectors) @ np.vstack(vectors).T
    at = {title: index for index, title in enumerate(titles)}
    sequel = similarity[at["Home Alone"], at["Home Alone 3"]]
    assert sequel > 0.5
    assert sequel > np.quantile(similarity[at["Home Alone"]], 0.95)


def test_ensure_leaves_complete_domains_alone(root, monkeypatch):
    monkeypatch.setattr(ml100k, "_build", lambda workspace: pytest.fail("nothing to build"))
    ml100k.ensure(root)


def test_ensure_repairs_incomplete_domains(root, tmp_path, quick_build):
    ml100k.ensure(tmp_path)
    (tmp_path / "ml100k-action" / "ml100k-action.text.npy").write_bytes(b"half")
    (tmp_path / "ml100k-drama" / "ml100k-drama.item").unlink()
    ml100k.ensure(tmp_path)
    assert content(tmp_path) == content(root)


def test_killed_build_leaves_no_domain(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ml100k, "_title_vectors", lambda t: np.ones((len(t), 2), np.float32))
    monkeypatch.setattr(ml100k, "_write_record", killed)
    with pytest.raises(KeyboardInterrupt):
        ml100k.ensure(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == [".prepare", "ml100k.lock"]


def test_second_builder_keeps_what_the_first_finished(root, tmp_path, quick_build):
    ml100k.make(tmp_path)
    inode = (tmp_path / "ml100k-drama").stat().st_ino
    ml100k._build_and_install(tmp_path, replace=False)
    assert (tmp_path / "ml100k-drama").stat().st_ino == inode
    ml100k.make(tmp_path)
    assert (tmp_path / "ml100k-drama").stat().st_ino != inode
    assert content(tmp_path) == content(root)


def test_files_of_the_user_are_never_replaced(tmp_path):
    own = tmp_path / "ml100k-drama" / "ml100k-drama.minilm.npy"
    own.parent.mkdir()
    own.write_bytes(b"mine")
    for build in (ml100k.make, ml100k.ensure):
        with pytest.raises(FileExistsError, match=r"ml100k-drama\.minilm\.npy"):
            build(tmp_path)
    assert own.read_bytes() == b"mine"
    assert not (tmp_path / "ml100k-action").exists()


def test_missing_recbole_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ml100k.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install recbole"):
        ml100k.raw_folder()


def test_main_refuses_unknown_arguments(capsys):
    with pytest.raises(SystemExit, match="usage"):
        ml100k.main(["--help"])
