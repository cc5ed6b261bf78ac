"""Encoders: from the text and the image of an item, or the reviews of a user, to a vector."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from dataset_prep.encoders.base import Encoder, Sample
from recbole_mmdiff.errors import ConfigError, suggest

__all__ = ["ENCODERS", "Encoder", "Sample", "encoder_class", "make_encoder"]

#: every encoder: the class (imported when it is asked for), and what it does
ENCODERS = {
    "text": ("dataset_prep.encoders.text:TextEncoder",
             "a sentence-transformers model, or any text encoder (BERT, RoBERTa) with a pooling"),
    "image": ("dataset_prep.encoders.vision:ImageEncoder",
              "any vision model (ViT, DINOv2, ConvNeXt, the image side of CLIP)"),
    "clip-text": ("dataset_prep.encoders.clip:ClipText", "the text side of CLIP or SigLIP"),
    "clip-image": ("dataset_prep.encoders.clip:ClipImage", "the image side of CLIP or SigLIP"),
    "mllm": ("dataset_prep.encoders.mllm:MultimodalEncoder",
             "hidden states of an image-text chat model under a prompt"),
    "llm": ("dataset_prep.encoders.language:LanguageEncoder",
            "hidden states of a causal language model under a prompt"),
    "lsa": ("dataset_prep.encoders.lsa:LsaEncoder",
            "TF-IDF and a truncated SVD; needs no model"),
}


def encoder_class(name: str) -> type[Encoder]:
    """The class registered under ``name``. Raises ConfigError for a name that is not."""
    if name not in ENCODERS:
        raise ConfigError(f"--encoder: {name!r} is not known, use one of {', '.join(ENCODERS)}"
                          f"{suggest(name, ENCODERS)}")
    module, _, kind = ENCODERS[name][0].partition(":")
    return getattr(importlib.import_module(module), kind)


def make_encoder(name: str, **options: Any) -> Encoder:
    """An encoder with the options that are not None; models are loaded when first used.

    Raises:
        ConfigError: an unknown encoder, or an option that it does not have or needs and lacks.
    """
    kind = encoder_class(name)
    given = {key: value for key, value in options.items() if value is not None}
    known = _parameters(kind)
    for key in given:
        if key not in known:
            raise ConfigError(f"--{key.replace('_', '-')}: the encoder {name!r} has no such option")
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in given:
            raise ConfigError(f"--{key.replace('_', '-')}: the encoder {name!r} needs it")
    return kind(**given)


def _parameters(kind: type[Encoder]) -> dict[str, inspect.Parameter]:
    """What the constructor takes, with what it passes on to those of its bases."""
    found = {}
    for base in reversed(kind.__mro__):
        if "__init__" in vars(base):
            found |= inspect.signature(base.__init__).parameters
    return {name: parameter for name, parameter in found.items()
            if name != "self" and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
