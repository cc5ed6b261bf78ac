"""Vectors for the t-SNE pictures: what is gathered, and that the truth is made apart."""

import numpy as np
import pytest
import torch
from running import PRETRAINING, run_keys

from recbole_mmdiff.compare import compare
from recbole_mmdiff.compare.embeddings import true_target_vectors
from recbole_mmdiff.errors import ConfigError

QUICK = {"pretrain_epochs": 2}


def test_what_is_gathered(write_comparison, tmp_path, inline):
    path = write_comparison(
        models={"EMCDR": QUICK, "DiffCDR": QUICK, "CMF": {}}, seeds=[1],
        embeddings={"models": ["EMCDR", "DiffCDR"], "evaluations": {"DiffCDR": [3, 30]}, "users": 20})
    store = compare(path, tmp_path / "store")
    with np.load(store / "embeddings.npz") as saved:
        vectors, kind, panel = (saved[name] for name in ("vectors", "kind", "panel"))
    assert len(vectors) == len(kind) == len(panel) and np.isfinite(vectors).all()
    kinds = {title: set(kind[panel == title]) for title in dict.fromkeys(panel)}
    assert kinds == {
        "training users": {"truth", "EMCDR", "DiffCDR"}, "test users": {"truth", "EMCDR", "DiffCDR"},
        "DiffCDR, training users": {"source", "truth", "3 evaluations", "30 evaluations"},
        "DiffCDR, test users": {"source", "truth", "3 evaluations", "30 evaluations"}}
    for title in kinds:
        counts = {name: int(((panel == title) & (kind == name)).sum()) for name in kinds[title]}
        assert len(set(counts.values())) == 1 and max(counts.values()) <= 20
    # 30 evaluations is what the run itself does, and 3 is something else.
    test = vectors[(panel == "test users") & (kind == "DiffCDR")]
    thirty, three = (vectors[(panel == "DiffCDR, test users") & (kind == f"{n} evaluations")]
                     for n in (30, 3))
    np.testing.assert_allclose(thirty, test, atol=1e-5)
    assert np.abs(three - test).max() > 1e-4


def test_the_truth_is_the_base_where_nobody_is_held_out(tiny_config, tmp_path):
    """Same start, same batches: with no held-out rows to add it is the run's own target base."""
    run = run_keys(tiny_config("EMCDR", **PRETRAINING), tmp_path / "run")
    for part in (run.parts.valid, run.parts.test):
        part.inter_feat = part.inter_feat[torch.zeros(len(part.inter_feat), dtype=torch.bool)]
    truth = true_target_vectors(run)
    users = torch.arange(run.parts.train.user_num)
    assert torch.equal(truth, run.model.target.user_factors(users).detach())


def test_the_truth_knows_the_held_out_rows_and_the_run_does_not(tiny_config, tmp_path):
    run = run_keys(tiny_config("EMCDR", **PRETRAINING), tmp_path / "run")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    truth = true_target_vectors(run)
    held_out = run.parts.test.users_with_rows()
    start = run.model.target.user_factors(held_out).detach()
    assert (truth[held_out] - start).abs().amax(1).min() > 0
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_a_model_without_vectors_to_show(write_comparison, tmp_path, inline):
    path = write_comparison(seeds=[1], embeddings={"models": ["CMF"]})
    with pytest.raises(ConfigError, match="embeddings: CMF carries no vector"):
        compare(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()
