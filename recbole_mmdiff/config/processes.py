"""The keys of a run on several processes, which are RecBole's."""

import os
import socket

import torch

from recbole_mmdiff import distributed
from recbole_mmdiff.errors import ConfigError, at_least

_VISIBLE = "CUDA_VISIBLE_DEVICES"
#: the GPUs that were given to this process; RecBole's configuration puts gpu_id in their place
_GIVEN = os.environ.get(_VISIBLE)


def settle_processes(final: dict) -> None:
    """Check the keys, and put what they leave open in their place.

    Raises:
        ConfigError: values that do not fit each other.
    """
    at_least("nproc", final["nproc"], 1)
    at_least("group_offset", final["group_offset"], 0)
    at_least("worker", final["worker"], 0)
    if distributed.launched() > 1:
        final["nproc"], final["world_size"] = 1, distributed.launched()
        return
    if final["world_size"] == -1:
        final["world_size"] = final["nproc"]
    if final["world_size"] < final["group_offset"] + final["nproc"]:
        raise ConfigError(f"world_size: {final['world_size']} is less than the {final['nproc']} processes of "
                          f"this machine (nproc) and the {final['group_offset']} before them (group_offset)")
    if final["world_size"] > final["nproc"] and final["port"] is None:
        raise ConfigError("port: on several machines all need the same free one, write for instance 29500")


def environment(config) -> dict[str, str]:
    """What the processes that ``nproc`` asks for find each other by, as torchrun would set it."""
    port = config["port"]
    if port is None:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
    return {"MASTER_ADDR": config["ip"], "MASTER_PORT": str(port), "WORLD_SIZE": str(config["world_size"]),
            "LOCAL_WORLD_SIZE": str(config["nproc"])}


def show_all_gpus() -> None:
    """Let this process, and those that it starts, choose among all GPUs that were given to it."""
    if _GIVEN is None:
        os.environ.pop(_VISIBLE, None)
    else:
        os.environ[_VISIBLE] = _GIVEN


def own_gpu(gpu_id, chosen: bool) -> str:
    """The GPU of this process: of those that were chosen by hand, or of all that were given; none on CPU.

    Raises:
        ConfigError: there are fewer than processes on this machine.
    """
    if torch.cuda.is_initialized():     # By an earlier run of this process: what is visible cannot change.
        return os.environ[_VISIBLE]
    show_all_gpus()
    there, needed = torch.cuda.device_count(), distributed.local_size()
    listed = [part.strip() for part in str(gpu_id).strip("()").split(",") if part.strip()]
    if not there or (chosen and not listed):
        return ""
    ids = listed if chosen else _GIVEN.split(",") if _GIVEN else [str(number) for number in range(there)]
    if len(ids) < needed:
        raise ConfigError(f"gpu_id: {needed} processes on this machine have {len(ids)} GPUs {ids}; "
                          f"start as many as GPUs, or write gpu_id: '' for the CPU")
    return ids[distributed.local_rank()]
