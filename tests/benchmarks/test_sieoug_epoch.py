"""SIEOUG's step at the size of Amazon Baby, in two domains: which share of it is spent in matching users.

Generated data: 19,445 users in each domain, half of whom are linked, 7,050 items, 117,352 training rows, 384
features; batches of 2,048 rows, float32, one thread.
"""

import pytest
import torch
from measuring import times_in_turn
from test_multimodal_step import ITEMS, ROWS, USERS, write_domain

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.quick_start import build_model, prepare_data

MOST_SHARE = {"transport": 0.6, "gromov": 0.95}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.parametrize("matching", MOST_SHARE)
def test_share_of_a_step_that_is_matching(tmp_path, matching):
    for number, name in enumerate(("src", "tgt")):
        write_domain(tmp_path, USERS, ITEMS, ROWS, {"text": 384}, name, seed=number)
    config = Config(config_dict={
        "model": "SIEOUG", "matching": matching, "data_path": str(tmp_path), "use_gpu": False,
        "source_domain": {"dataset": "src"}, "target_domain": {"dataset": "tgt"}, "log_tensorboard": False,
        "load_col": {"inter": ["user_id", "item_id"]}, "split_protocol": "ratio", "overlap_ratio": 0.5,
        "train_batch_size": 2048, "num_clusters": 15})
    parts = prepare_data(config)
    model = build_model(config, parts).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    batches = [batch for _, batch in zip(range(3), stage_loader(config, parts.train, "both", 2048, 1),
                                         strict=False)]

    def epoch(kind):
        """From potentials of nobody: the first epoch, which has most to do."""
        model.guidance.matcher.matching = kind
        model.guidance.matcher.matched_before.zero_()
        for batch in batches:
            optimizer.zero_grad()
            model.ranking_loss(batch).backward()
            optimizer.step()

    whole, links = times_in_turn(lambda: epoch(matching), lambda: epoch("links"))
    share = 1 - links / whole
    print(f"\nSIEOUG, {matching}: {1000 * whole / 3:.0f} ms a step, of which matching takes {share:.0%}")
    assert share < MOST_SHARE[matching]
