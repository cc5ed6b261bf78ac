"""Training RecBole's own models on several processes: each takes its part of every batch.

RecBole's trainers would wrap the model for it, which takes a GPU. Here the loader is shared out by
RecBole's own sampler, and the gradients are averaged before each step (``distributed.averaging``).
"""

import torch
from recbole.data.dataset import Dataset
from recbole.utils import init_seed

from recbole_mmdiff import distributed
from recbole_mmdiff.data.preparation import train_loader
from recbole_mmdiff.diffusion.noise import fold_in
from recbole_mmdiff.errors import ConfigError


def shared_loader(config, train: Dataset):
    """RecBole's loader of training rows, whose batches are this process's parts of those of all.

    Raises:
        ConfigError: a key that cannot be had on several processes.
    """
    if distributed.size() == 1:
        return train_loader(config, train)
    if config["enable_scaler"]:
        raise ConfigError(f"enable_scaler: {config['model']} is trained by RecBole's loop, whose scaler may "
                          f"skip a step in one process alone; use enable_amp by itself, or one process")
    config["single_spec"], config["world_size"] = False, distributed.size()
    try:
        return train_loader(config, train)
    finally:
        config["single_spec"] = True


def begin_epoch(config, loader, epoch: int) -> None:
    """Shuffle the rows alike in all processes, and draw numbers apart from each other."""
    if distributed.size() == 1:
        return
    # Anew for each epoch: a checkpoint holds the random state of the first process alone.
    init_seed(fold_in(config["seed"], epoch, distributed.rank()) % 2**32, config["reproducibility"])
    for part in (loader, *vars(loader).values()):
        sampler = getattr(part, "sampler", None)
        if isinstance(sampler, torch.utils.data.DistributedSampler):
            sampler.set_epoch(epoch)


def mean_loss(loss: float | tuple[float, ...]) -> float | tuple[float, ...]:
    """The mean over the processes of what RecBole's loop says of an epoch."""
    if distributed.size() == 1:
        return loss
    values = torch.tensor([loss] if isinstance(loss, float) else loss, dtype=torch.float64)
    means = distributed.gathered(values[None], distributed.size()).mean(0).tolist()
    return means[0] if isinstance(loss, float) else tuple(means)
