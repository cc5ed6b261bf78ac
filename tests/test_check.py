"""``recbole-mmdiff check``: numbers against counting in Python, and the test for leaks."""

import copy
import os
import re

import numpy as np
import pytest
import torch

from recbole_mmdiff.check import check
from recbole_mmdiff.cli import main
from recbole_mmdiff.config import Config
from recbole_mmdiff.data.features import write_features
from recbole_mmdiff.data.preparation import prepare_parts, refuse_leaks
from recbole_mmdiff.errors import DataError


def words(folder, **keys):
    keys = {"data_path": folder, "source_domain.dataset": "src", "target_domain.dataset": "tgt",
            **keys}
    return ["check", *[f"--{key}={value}" for key, value in keys.items()]]


@pytest.fixture
def printed(capsys, tmp_path, monkeypatch):
    """Standard output of a command that succeeds and writes nothing."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        before = set(os.listdir(tmp_path))
        assert main(list(arguments)) == 0
        assert set(os.listdir(tmp_path)) == before
        return capsys.readouterr().out

    return run


def counts(rows):
    users, items = ({row[side] for row in rows} for side in (0, 1))
    return (f"{len(users):,} users, {len(items):,} items, {len(rows):,} interactions, sparsity "
            f"{100 * (1 - len(rows) / len(users) / len(items)):.4f}%")


@pytest.mark.parametrize("model", [[], ["--model=DiffCDR"], ["--model=CMF"]], ids=str)
def test_the_numbers_of_both_domains(printed, tiny_pair, model):
    text = printed(*words(tiny_pair.folder), *model)
    assert f"source src: {counts(tiny_pair.source_rows)}" in text
    assert f"target tgt: {counts(tiny_pair.target_rows)}" in text
    assert "overlap: 60 linked users, of whom 43 train; target-only (side) users: 20" in text
    assert "split cold_start_users:" in text
    assert re.search(r"train: [\d,]+ interactions of 63 users on \d+ items\n", text)
    assert re.search(r"valid: [\d,]+ interactions of 5 users .* 5 cold users", text)
    assert re.search(r"test: [\d,]+ interactions of 12 users .* 12 cold users", text)
    sizes = [int(n) for n in re.findall(r"(?:train|valid|test): (\d+) interactions", text)]
    assert sum(sizes) == len(tiny_pair.target_rows)


def test_cold_items_are_counted(printed, tiny_pair):
    text = printed(*words(tiny_pair.folder, split_protocol="cold_start_items",
                          test_item_ratio=0.4, valid_item_ratio=0.4))
    assert re.search(r"test: .* on (\d+) items, 12 cold users, \1 cold items", text)


def test_one_domain(printed, tiny_pair):
    text = printed("check", f"--data_path={tiny_pair.folder}", "--dataset=tgt")
    assert f"data set tgt: {counts(tiny_pair.target_rows)}" in text
    assert "split ratio:" in text


def test_coverage_of_features(printed, tiny_pair, atomic, tmp_path):
    for name, rows in (("src", tiny_pair.source_rows), ("tgt", tiny_pair.target_rows)):
        atomic.write(tmp_path, name, rows)
    items = sorted({row[1] for row in tiny_pair.target_rows})[:30]
    write_features(tmp_path / "tgt", "tgt", "text", items, np.ones((30, 4), np.float32),
                   encoder="ones")
    text = printed(*words(tmp_path))
    line = next(line for line in text.splitlines() if "item features text" in line)
    assert "30" in line and "50" in line
    assert text.count(" item features ") == 1


def test_coverage_of_features_in_one_domain(printed, tiny_pair, atomic, tmp_path):
    atomic.write(tmp_path, "tgt", tiny_pair.target_rows)
    items = sorted({row[1] for row in tiny_pair.target_rows})[:30]
    write_features(tmp_path / "tgt", "tgt", "text", items, np.ones((30, 4), np.float32), encoder="ones")
    text = printed("check", "--dataset=tgt", f"--data_path={tmp_path}")
    assert "item features text (4 dimensions): 30 of 50 tokens" in text


def test_mistakes_are_those_of_a_run(capsys, tiny_pair):
    assert main(words(tiny_pair.folder, test_user_ratio=0.001)) == 2
    assert "test_user_ratio" in capsys.readouterr().err
    assert main(words(tiny_pair.folder, embedding_sise=3)) == 2
    assert "embedding_sise" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["cold_start_users", "warm_start", "cold_start_items"])
def test_a_leak_is_found(tiny_config, protocol):
    parts = prepare_parts(Config(config_dict=tiny_config(
        "BPR", split_protocol=protocol, test_item_ratio=0.4, valid_item_ratio=0.4)))
    refuse_leaks(parts.observed, parts.valid, parts.test)
    leaky = copy.copy(parts)
    leaky.observed = parts.observed.copy(torch_append(parts.observed.inter_feat,
                                                      parts.test.inter_feat, 3))
    with pytest.raises(DataError, match=f"{protocol}: [1-3] test users have target training rows"):
        refuse_leaks(leaky.observed, leaky.valid, leaky.test)


def torch_append(rows, others, count):
    """The rows with the first of others added."""
    return type(rows)({field: torch.cat([rows[field], others[field][:count]]) for field in rows})


def test_a_leak_that_the_protocol_allows(tiny_config):
    parts = prepare_parts(Config(config_dict=tiny_config("BPR", split_protocol="ratio")))
    refuse_leaks(parts.observed, parts.valid, parts.test)


def test_a_saved_split_is_the_live_one(printed, tiny_pair, tiny_config, tmp_path):
    parts = prepare_parts(Config(config_dict=tiny_config("BPR", split_protocol="ratio")))
    parts.observed.saved_split.save(tmp_path / "split.npz")
    text = printed(*words(tiny_pair.folder, split_file=tmp_path / "split.npz"))
    assert "split ratio:" in text


def test_check_from_python(tiny_pair, tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"data_path: {tiny_pair.folder}\nsource_domain: {{dataset: src}}\n"
        "target_domain: {dataset: tgt}\n")
    assert "60 linked users" in check(config_files=[tmp_path / "a.yaml"])


def test_the_model_of_a_file_is_taken(printed, tiny_pair, tmp_path_factory):
    """Its own keys are known then."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text("model: DiffCDR\nguidance_scale: 2.0\n", encoding="utf-8")
    assert "linked users" in printed(*words(tiny_pair.folder), "--config", str(recipe))
