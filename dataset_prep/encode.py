"""Features of items or users by an encoder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_prep.encoders import Encoder, encoder_class, make_encoder
from dataset_prep.folders import data_folder
from recbole_mmdiff.errors import ConfigError, DataError, one_of

if TYPE_CHECKING:
    from dataset_prep.inputs import Inputs
    from dataset_prep.processes import Processes
    from dataset_prep.shards import Work
    from recbole_mmdiff.data.features import FeatureFile

ENTITIES = ("item", "user")
STORES = ("float32", "float16")
SHARD_SIZE = 1024
#: options that say what is read, not how it is encoded
READING = ("fields", "separator", "max_characters", "prompt", "images", "reviews_per_user", "split", "domain")
_LOOK = 5.0    # seconds between looks at what the others have done


@dataclass(frozen=True)
class Outcome:
    """A finished feature, and how many inputs this run encoded for it in how many seconds.

    ``made``: whether this run made it, if only out of what earlier ones encoded.
    """

    feature: FeatureFile
    inputs: int
    seconds: float
    made: bool = True


def encode(data: str | Path, encoder: str, modality: str | None = None, entity: str | None = None,
           fit_on: Sequence[str | Path] = (), store: str = "float32", normalize: bool = False,
           batch_size: int | None = None, batch_tokens: int | None = None, shard_size: int = SHARD_SIZE,
           restart: bool = False, processes: Processes | None = None, **options: Any) -> Outcome | None:
    """Encode the items or users of the data set in folder ``data`` and store the feature.

    The arguments are the options of the command, see its ``--help``; what is None is not given.
    Killed and called again, it goes on where it was. Under torchrun the ``processes`` share the
    work; all but the first return None.

    Raises:
        ConfigError: an option is unknown, missing or does not fit the others.
        DataError: the inputs, the model or the work begun before cannot be used.
    """
    from dataset_prep.batches import BATCH_TOKENS
    from dataset_prep.processes import Processes
    from dataset_prep.shards import Plan, Work

    folder = _folder("--data", data)
    kind = encoder_class(encoder)
    entity = one_of("--entity", entity or kind.entity, ENTITIES)
    one_of("--store", store, STORES)
    counts = {name: options.get(name) for name in ("max_characters", "reviews_per_user", "max_length")}
    _at_least_one(shard_size=shard_size, batch_size=batch_size, batch_tokens=batch_tokens, **counts)
    reading = {name: options.pop(name) for name in READING if options.get(name) is not None}
    engine = make_encoder(encoder, **options)
    corpora = _read_all(folder, kind, entity, fit_on, reading)
    inputs = corpora[folder.name]
    settings = {"encoder": encoder, **engine.describe(), "entity": entity, **inputs.describe(),
                "normalize": normalize, "inputs_sha256": inputs.digest()}
    if kind.fitted:
        settings["fitted_on"] = {name: corpus.digest() for name, corpus in corpora.items()}
    work = Work(folder, modality or encoder, Plan(settings, inputs.tokens, shard_size, store))
    processes = processes or Processes()
    if not restart and work.is_finished():
        if processes.rank:
            return None
        work.clean_up(processes)
        return Outcome(work.feature(), 0, 0.0, made=False)
    batching = {"normalize": normalize, "batch_size": batch_size or kind.batch_size,
                "batch_tokens": batch_tokens or BATCH_TOKENS}
    return _work_through(work, engine, corpora, batching, restart, processes)


def _work_through(work: Work, engine: Encoder, corpora: dict[str, Inputs], batching: dict[str, Any],
                  restart: bool, processes: Processes) -> Outcome | None:
    """Encode what is not done yet, with the other processes; the first makes the feature of it."""
    from dataset_prep.inputs import texts_of

    versions = engine.versions()    # First: it tells of missing packages.
    with processes.joined(), work.lock(processes):
        if processes.rank == 0:
            work.prepare(restart)
        processes.wait()
        todo = sorted(set(range(work.plan.shards)) - set(work.finished()))
        processes.wait()    # Nobody may finish a shard before all have seen what is to be done.
        started = time.perf_counter()
        if engine.fitted and todo[processes.rank::processes.size]:
            engine.fit(chain.from_iterable(map(texts_of, corpora.values())))
        _encode_shards(work, engine, corpora[work.dataset], todo, processes, batching)
        seconds = time.perf_counter() - started
        if processes.rank:
            return None
        feature = work.merge({**versions, **engine.resolved()})
        return Outcome(feature, work.plan.inputs(todo), seconds)


def _encode_shards(work: Work, engine: Encoder, inputs: Inputs, todo: Sequence[int],
                   processes: Processes, batching: dict[str, Any]) -> None:
    """This process's part of the shards to do; then wait for the others."""
    from tqdm import tqdm

    from dataset_prep.batches import encode_samples

    looked = time.monotonic()

    def show_all() -> None:
        """Count what the others have finished, too."""
        nonlocal looked
        if processes.size > 1 and time.monotonic() - looked > _LOOK:
            bar.n = work.plan.inputs(work.finished())
            bar.refresh()
            looked = time.monotonic()

    total = len(inputs.tokens)
    with tqdm(total=total, initial=total - work.plan.inputs(todo), unit="input",
              disable=processes.rank > 0) as bar:
        for shard in todo[processes.rank::processes.size]:
            samples = inputs.part(*work.plan.bounds(shard))
            work.save(shard, encode_samples(engine, samples, advance=bar.update, **batching))
            show_all()
        processes.wait(meanwhile=show_all)
        bar.n = total


def _folder(option: str, path: str | Path) -> Path:
    """The folder of a data set. Raises DataError if there is none."""
    folder = data_folder(path)
    if not folder.is_dir():
        raise DataError(f"{option}: there is no folder {folder}")
    return folder


def _read_all(folder: Path, kind: type[Encoder], entity: str, fit_on: Sequence[str | Path],
              reading: dict[str, Any]) -> dict[str, Inputs]:
    """By name and sorted by it: the data set in ``folder``, and those that the encoder is also fitted on."""
    if fit_on and not kind.fitted:
        raise ConfigError("--fit-on: this encoder is not fitted to data")
    domain = reading.get("domain")
    if domain and len(fit_on) > 1:
        raise ConfigError("--fit-on: with --split there is one other data set, that of the other domain")
    corpora = {folder.name: read_inputs(folder, kind, entity, reading)}
    if domain:
        reading = {**reading, "domain": "source" if domain == "target" else "target"}
    for other in (_folder("--fit-on", path) for path in fit_on):
        if other.name in corpora:
            raise ConfigError(f"--fit-on: {other.name} stands twice; data sets need names of their own")
        corpora[other.name] = read_inputs(other, kind, entity, reading)
    return dict(sorted(corpora.items()))


def reading_options(kind: type[Encoder], entity: str) -> set[str]:
    """Which of the options `READING` concern this encoder and entity."""
    text = {"prompt", "max_characters"}
    if entity == "user":
        return text | {"reviews_per_user", "split", "domain"}
    return (text | {"fields", "separator"} if "text" in kind.uses else set()) \
        | ({"images"} if "image" in kind.uses else set())


def read_inputs(folder: Path, kind: type[Encoder], entity: str, reading: dict[str, Any]) -> Inputs:
    """The items or users as an encoder of this kind reads them; ``reading``: options by name.

    Raises:
        ConfigError: an option that does not concern this encoder or entity.
        DataError: see `Items` and `Users`.
    """
    from dataset_prep.inputs import Items, Users
    from dataset_prep.prompt import PROMPTS, Prompt

    text, image = ("text" in kind.uses), ("image" in kind.uses)
    if entity == "user" and image:
        raise ConfigError("--entity user: this encoder reads images, which users have not")
    for name in reading:
        if name not in reading_options(kind, entity):
            raise ConfigError(f"--{name.replace('_', '-')}: has no meaning for {entity}s and this encoder")
    chosen = dict(reading)
    if text and (kind.prompted or "prompt" in reading):
        chosen["prompt"] = Prompt.read(reading.get("prompt", PROMPTS / f"{entity}.txt"))
    if entity == "user":
        return Users(folder, **chosen)
    if image:
        chosen["images"] = Path(reading.get("images", folder / "images"))
    if not text:
        chosen["fields"] = []
    return Items(folder, **chosen)


def _at_least_one(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: {number} must be at least 1")
