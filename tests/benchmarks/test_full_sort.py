"""Our full ranking against RecBole's, and its memory at 50,000 users x 50,000 items.

Both rank all items of the ml-100k inside RecBole's wheel for the test users of one BPR model, with
equal metrics, in turn, with one thread. What is timed is an evaluation during training: RecBole's
loader and our evaluator are built before, and those times are printed apart.
"""

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.sampler import Sampler
from recbole.trainer import Trainer

from dataset_prep import ml100k
from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.evaluator import Evaluator
from recbole_mmdiff.quick_start import build_model

REQUIRED_RATIO = 3.0
USERS = ITEMS = 50_000
MEMORY_LIMIT = 2 * 2**30


def timed(function):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def interleaved(functions, rounds=7):
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(timed(function)[1])
    return {name: statistics.median(values) for name, values in times.items()}


def test_full_ranking_is_3_times_faster_than_recbole(one_thread, tmp_path):
    config = Config("BPR", "ml-100k", config_dict={
        "data_path": str(ml100k.raw_folder().parent), "load_col": {"inter": ["user_id", "item_id"]},
        "metrics": ["Recall", "MRR", "NDCG", "Hit", "Precision"], "topk": [10, 20],
        "metric_decimal_place": 9, "use_gpu": False, "show_progress": False, "state": "WARNING",
        "log_tensorboard": False, "checkpoint_dir": str(tmp_path), "eval_batch_size": 4096})
    parts = prepare_parts(config)
    model = build_model(config, parts)
    sampler = Sampler(["train", "valid", "test"], [parts.train, parts.valid, parts.test])
    loader, loader_seconds = timed(
        lambda: FullSortEvalDataLoader(config, parts.test, sampler.set_phase("test")))
    trainer = Trainer(config, model)
    trainer.eval_collector.data_collect(SimpleNamespace(dataset=parts.train))
    evaluator, evaluator_seconds = timed(lambda: Evaluator(config, parts))

    def theirs():
        return trainer.evaluate(loader, load_best_model=False)

    def ours():
        return evaluator.evaluate(model, "test", ["ranking_full"]).metrics["ranking_full"]

    expected, found = theirs(), ours()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name

    seconds = interleaved({"theirs": theirs, "ours": ours})
    ratio = seconds["theirs"] / seconds["ours"]
    print(f"\nevaluation: RecBole {seconds['theirs'] * 1e3:.0f} ms, ours {seconds['ours'] * 1e3:.1f} ms, "
          f"{ratio:.1f} times faster; before it: RecBole's loader {loader_seconds * 1e3:.0f} ms, our "
          f"evaluator {evaluator_seconds * 1e3:.0f} ms")
    assert ratio >= REQUIRED_RATIO


class Factors(torch.nn.Module):
    """A factor model with random vectors."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.users, self.items = torch.randn(USERS, 16), torch.randn(ITEMS, 16)

    def full_sort_predict(self, interaction):
        return (self.users[interaction["user_id"]] @ self.items.T).view(-1)


def large_part(rows_per_user):
    """What the evaluator needs of a data set, with random rows."""
    rows = Interaction({"user_id": torch.arange(1, USERS).repeat_interleave(rows_per_user),
                        "item_id": torch.randint(1, ITEMS, ((USERS - 1) * rows_per_user,))})
    return SimpleNamespace(
        uid_field="user_id", iid_field="item_id", label_field="label", user_num=USERS,
        item_num=ITEMS, num_candidates=ITEMS, inter_feat=rows, join=lambda rows: rows,
        get_item_feature=lambda: Interaction({"item_id": torch.arange(ITEMS)}))


def evaluate_large(folder):
    """Rank 50,000 items for 50,000 users; prints seconds, and the peak memory before and after."""
    torch.manual_seed(0)
    config = Config("BPR", "none", config_dict={
        "use_gpu": False, "state": "WARNING", "metrics": ["NDCG", "Recall", "Hit"], "topk": [10, 20],
        "checkpoint_dir": folder})
    parts = SimpleNamespace(observed=large_part(8), valid=large_part(1), test=large_part(2))
    evaluator = Evaluator(config, SimpleNamespace(**{
        name: Sized(part) for name, part in vars(parts).items()}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, seconds = timed(lambda: evaluator.evaluate(Factors(), "test", ["ranking_full"]))
    assert 0 < found.metrics["ranking_full"]["recall@20"] < 0.01
    print(seconds, before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


class Sized:
    """A namespace with a length."""

    def __init__(self, part):
        vars(self).update(vars(part))

    def __len__(self):
        return len(self.inter_feat)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_of_50000_users_and_50000_items(tmp_path):
    command = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); " \
              f"import test_full_sort; test_full_sort.evaluate_large({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parent.parent.parent, timeout=1200)
    assert done.returncode == 0, done.stderr
    seconds, before, peak = map(float, done.stdout.split()[-3:])
    print(f"\n{seconds:.0f} s; peak memory {peak / 2**20:.0f} MiB, of which {before / 2**20:.0f} MiB "
          f"before the evaluation")
    assert peak < MEMORY_LIMIT
