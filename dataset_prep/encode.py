"""Features of items or users by an encoder: ``recbole-mmdiff prepare encode``."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_prep.encoders import ENCODERS, Encoder, encoder_class, make_encoder
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


#: what makes two features at once, and their encoders
PAIRS = {"clip": ("clip-text", "clip-image")}
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
        return None if processes.rank else Outcome(work.feature(), 0, 0.0, made=False)
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
    """The folder of a data set. Where it is a symbolic link, the data set has the link's name."""
    folder = Path(os.path.abspath(path))
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


def _accepted(kind: type[Encoder], entity: str) -> set[str]:
    """Which of the reading options concern this encoder and entity."""
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
        if name not in _accepted(kind, entity):
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="folder of the data set; its name is the data set's")
    add("--encoder", required=True, metavar="ENCODER", help="one of " + "; ".join(
        f"{name}: {text}" for name, (_, text) in ENCODERS.items())
        + "; clip: clip-text and clip-image, two features by one command")
    add("--modality", help="name of the feature (default: the encoder's); clip: what goes before -text "
        "and -image")
    add("--entity", choices=ENTITIES, help="what is encoded (default: user for llm, else item)")
    _add_inputs(parser)
    _add_model(parser)
    add("--store", choices=STORES, help="numbers on disk (default: float32)")
    add("--normalize", action="store_true", help="scale the vectors to unit length")
    add("--batch-size", type=int, metavar="N", help="inputs a batch at most (default: the encoder's)")
    add("--batch-tokens", type=int, metavar="N",
        help="tokens a batch at most, padding counted (default: 16384)")
    add("--shard-size", type=int, metavar="N",
        help=f"inputs a shard, the most that a killed run loses (default: {SHARD_SIZE})")
    add("--restart", action="store_true",
        help="throw away what was begun, and the feature if there is one, and make it anew")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--fields", type=lambda text: text.split(","), metavar="A,B",
        help="columns of NAME.item that make up the text (default: all of type token_seq)")
    add("--separator", metavar="TEXT", help="what joins the fields (default: '. ')")
    add("--max-characters", type=int, metavar="N",
        help="characters that are read of a field or review (default: all of a field, 1000 of a review)")
    add("--prompt", metavar="FILE", help="a text with {column} or {text} (the joined fields) or, for users, "
        "{reviews} to fill in (default: the package's own for llm and mllm, else none)")
    add("--images", metavar="DIR", help="images named by item (default: images in the data set's folder)")
    add("--reviews-per-user", type=int, metavar="N",
        help="a user's latest reviews, the newest first (default: 20)")
    add("--split", metavar="FILE", help="split.npz of a run: leave out the reviews of interactions that it "
        "holds out, under cold starts all of the users tested. Needed for user features of a domain that the "
        "run is validated or tested on, always of the target domain: else the features tell what is to be "
        "predicted")
    add("--domain", choices=("target", "source"), help="which of the split's domains the data set is")
    add("--fit-on", action="append", metavar="DIR",
        help="lsa: a further data set to fit on, so that both share a space; encode it with the same "
        "options and this one as --fit-on (may be repeated)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="MODEL", help="folder of a model, or its repository on the Hugging Face Hub")
    add("--revision", help="branch, tag or commit of the repository")
    add("--gguf", metavar="FILE", help="llm: the GGUF file in the model's folder or repository")
    add("--pooling", help="text: mean, cls, max or lasttoken (default: the model's own); image: cls, mean or "
        "pooler; llm, mllm: first_last_avg (default), last_avg or last_token")
    add("--max-length", type=int, metavar="N", help="text, llm: tokens of a text that are read")
    add("--chat-template", action="store_true", help="llm: put the prompt into the model's chat template")
    add("--without-image", help="mllm: leave_out such items (default), or encode their text alone")
    add("--dim", type=int, metavar="N", help="lsa: dimensions (default: 64)")
    add("--dtype", help="of computation: auto (bfloat16 or float16 on a GPU, float32 else), float32, "
        "bfloat16 or float16 (default: auto)")
    add("--device", help="as torch names it (default: the GPU of this process, else cpu)")
    add("--trust-remote-code", action="store_true",
        help="run Python code that comes with the model; read it first")


def main(options: argparse.Namespace) -> None:
    """Encode as the options say, and tell what was made."""
    from dataset_prep.processes import Processes

    processes = Processes()
    with processes.joined():    # Once, also for two features.
        for each in _each(vars(options)):
            if processes.rank == 0:
                _warn_of_leaks(each)
            if outcome := encode(**each, processes=processes):
                _tell(outcome)


def _each(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The options of every feature to be made; those that concern one side of a pair go to it only."""
    if options["encoder"] not in PAIRS:
        yield options
        return
    if options.get("entity") == "user":
        raise ConfigError(f"--entity user: {options['encoder']} reads images, which users have not")
    names = PAIRS[options["encoder"]]
    accepted = {name: _accepted(encoder_class(name), "item") for name in names}
    stem = options.get("modality", options["encoder"])
    for name in names:
        others = set().union(*accepted.values()) - accepted[name]
        kept = {key: value for key, value in options.items() if key not in others}
        yield {**kept, "encoder": name, "modality": stem + name.removeprefix(options["encoder"])}


def _warn_of_leaks(options: dict[str, Any]) -> None:
    entity = options.get("entity") or encoder_class(options["encoder"]).entity
    if entity == "user" and "split" not in options:
        print("without --split these features are made of all reviews, those of interactions that a run "
              "holds out too: do not use them for a domain that is validated or tested, they tell what is "
              "to be predicted")


def _tell(outcome: Outcome) -> None:
    feature, manifest = outcome.feature, outcome.feature.manifest
    rows, dim = feature.matrix.shape
    print(f"{feature.path}: {rows:,} of {manifest['inputs']:,} {manifest['entity']}s x {dim:,} "
          f"{feature.matrix.dtype}")
    for reason, entry in manifest["left_out"].items():
        print(f"left out {entry['count']:,}: {reason} (first: {', '.join(entry['first'])})")
    if cut := manifest["cut_to_max_length"]:
        print(f"cut to the encoder's maximum length: {cut:,}")
    if (pairs := manifest.get("held_out_pairs", 0)) != (found := manifest.get("held_out_pairs_found", 0)):
        print(f"--split: {found:,} of the {pairs:,} interactions held out have a review here")
    if not outcome.made:
        print("it was finished already, from the same inputs and settings; --restart makes it again")
    elif outcome.inputs:
        print(f"encoded {outcome.inputs:,} in {outcome.seconds:.1f} s: "
              f"{outcome.inputs / outcome.seconds:,.1f} a second")
    else:
        print("put together from what was encoded before")
