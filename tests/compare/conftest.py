"""Small comparisons on the tiny pair of domains."""

import pytest
import yaml

BASE = {"source_domain": {"dataset": "src"}, "target_domain": {"dataset": "tgt"}, "use_gpu": False,
        "epochs": 2, "train_batch_size": 256, "topk": [5, 10], "valid_metric": "RMSE"}


@pytest.fixture
def write_comparison(tiny_pair, tmp_path):
    """``write_comparison(**parts)``: the path of a comparison file of MF and CMF, two seeds."""

    def write(name="small", keys=None, **parts):
        content = {"name": name, "models": {"MF": {}, "CMF": {}}, "seeds": [1, 2],
                   "tables": {"rating": {"metrics": ["rating.mae", "rating.rmse"]}}, **parts,
                   "keys": {**BASE, "data_path": str(tiny_pair.folder), **(keys or {})}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
        return path

    return write


@pytest.fixture
def inline(monkeypatch):
    """Jobs run in this process: starting others takes seconds, and is tested apart."""
    monkeypatch.setattr("recbole_mmdiff.compare.runner.in_processes",
                        lambda function, jobs, *rest: [(job, function(job)) for job in jobs])
