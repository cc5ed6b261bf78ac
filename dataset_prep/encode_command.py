"""``recbole-mmdiff prepare encode``: its options, and what it tells of the features that it made."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from dataset_prep.encode import ENTITIES, SHARD_SIZE, STORES, Outcome, encode, reading_options
from dataset_prep.encoders import ENCODERS, encoder_class
from recbole_mmdiff.errors import ConfigError

#: what makes two features at once, and their encoders
PAIRS = {"clip": ("clip-text", "clip-image")}


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
    add("--max-length", type=int, metavar="N", help="text, llm: tokens of a text that are read, never more "
        "than the model has positions for (the manifest tells how many)")
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
    accepted = {name: reading_options(encoder_class(name), "item") for name in names}
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
