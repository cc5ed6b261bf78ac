"""Gradients do not depend on which thread adds first: the same batch gives the same bits.

On a CPU with several threads the gradient of ``vectors[place]`` adds up in any order, from 32768
elements on; that of an embedding in one.
"""

from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from recbole.utils import init_seed
from running import CROSS_MODELS, FINETUNED_MODELS, RANKING_MODELS, contract_of

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.loaders import BothDomainsLoader, stage_loader
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.model.registry import get_model

ROWS, TIMES = 4096, 3
VARIANTS = [*((model, {}) for model in FINETUNED_MODELS if model != "Bias"),
            ("SSCDR", {"hops": 1}), ("SSCDR", {"item_points": "factors"}), ("CMF", {"finetune_items": True}),
            ("P2M2CDR", {"train_neg_ratio": 1}), ("BiTGCF", {"layers": "mean"}),
            ("BiTGCF", {"item_exploration": True, "num_clusters": 3}),
            ("CoNet", {"cross_sparsity": 0.1, "train_neg_ratio": 3})]


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batch_of(loader):
    """A batch of ``ROWS`` rows, each of which comes as often as it must."""
    samples = torch.arange(ROWS)
    if isinstance(loader, BothDomainsLoader):
        return loader.collate_fn((samples, samples))
    return loader.collate_fn(samples % len(loader.rows))


def gradients(model, stage, loss_of, batch, state):
    """name -> gradient of a loss in the first batch of an epoch, by two threads, from the same ``state``."""
    model.load_state_dict(state)
    if stage.before_epoch is not None:
        stage.before_epoch(0)
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    with threads(2):
        loss_of(batch).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()
            if parameter.grad is not None}


@pytest.mark.parametrize(("model", "keys"), VARIANTS, ids=str)
def test_the_same_batch_gives_the_same_gradient(model, keys, tiny_config, content):
    keys = {**contract_of(model).keys, "embedding_size": 32, "data_path": content(""),
            "split_protocol": "warm_start", "finetune_epochs": 1, **keys}
    config = Config(config_dict=tiny_config(model, **keys))
    init_seed(config["seed"], config["reproducibility"])
    parts = prepare_parts(config)
    built = get_model(model)(config, parts.train).train()
    for stage in [*built.stages(), built.finetuning_stage()]:
        check_stage(stage, built, config, parts)


@pytest.mark.parametrize("model", [model for model in CROSS_MODELS if model not in FINETUNED_MODELS])
def test_of_both_domains(model, tiny_config, content):
    keys = {**contract_of(model).keys, "embedding_size": 32, "data_path": content("")}
    config = Config(config_dict=tiny_config(model, **keys))
    init_seed(config["seed"], config["reproducibility"])
    parts = prepare_parts(config)
    built = get_model(model)(config, parts.train).train()
    for stage in built.stages():
        check_stage(stage, built, config, parts)


@pytest.mark.parametrize(("model", "keys"), [
    *((model, {}) for model in RANKING_MODELS), ("FREEDOM", {"train_features": True}),
    ("FREEDOM", {"negative_sampler": "mixgcf"}), ("CCDRec", {"reference": "code"}),
    ("SLMRec", {"ssl_task": "FD"})], ids=str)
def test_ranking_in_one_domain(model, keys, ranking_config):
    config = Config(config_dict=ranking_config(
        model, **{**contract_of(model).keys, "embedding_size": 16, **keys}))
    init_seed(config["seed"], config["reproducibility"])
    parts = prepare_parts(config)
    built = get_model(model)(config, parts.train).train()
    for stage in built.stages():
        check_stage(stage, built, config, parts)


def check_stage(stage, built, config, parts):
    """Every loss of a stage has one gradient."""
    if stage.prepare is not None:
        stage.prepare()
    batch = batch_of(stage_loader(config, parts.train, stage.data, ROWS, 5))
    for loss_of in stage.losses:
        state = deepcopy(built.state_dict())
        first, *others = (gradients(built, stage, loss_of, batch, state) for _ in range(TIMES))
        wrong = {name for again in others for name, value in again.items()
                 if not torch.equal(value, first[name])}
        assert first
        assert not wrong, f"{stage.name}, {loss_of.__name__}: {sorted(wrong)}"
