"""What an encoder is, and what every encoder of the Hugging Face kind needs."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_mmdiff.errors import ConfigError, DataError
from recbole_mmdiff.files import sha256

if TYPE_CHECKING:
    import torch
    from PIL import Image

DTYPES = ("auto", "float32", "bfloat16", "float16")
_NOISE = 0.01    # of the largest number of a vector: what two computations of it may differ by


@dataclass(frozen=True)
class Sample:
    """One item or user as an encoder gets it.

    ``text``: what is read, "" where there is nothing. ``blank``: whether the text says nothing of
    the item, although a prompt stands around it. ``image``: where the image lies; opened when it
    reaches ``Encoder.encode``.
    """

    token: str
    text: str = ""
    blank: bool = False
    image: Path | Image.Image | None = None


class Encoder:
    """Turns samples into vectors.

    Attributes:
        uses: of a sample, ``text``, ``image`` or both.
        prompted: whether the text is put into a prompt, also where none is given.
        fitted: whether `fit` must see all texts before `encode`.
        entity: what it encodes unless told otherwise, ``item`` or ``user``.
        libraries: packages whose versions the manifest tells.
        batch_size: samples a batch at most.
        max_length: tokens of a text that are read; None: all of them.
        called: what messages call the model that it uses; None where a fault cannot be the model's.
    """

    uses: tuple[str, ...] = ("text",)
    prompted = False
    fitted = False
    entity = "item"
    libraries: tuple[str, ...] = ("torch", "transformers", "numpy")
    batch_size = 256
    max_length: int | None = None
    called: str | None = None

    def lacks(self, sample: Sample) -> str | None:
        """Why the sample can have no vector, or None."""
        if "text" in self.uses and (sample.blank or not sample.text.strip()):
            return "no text"
        if "image" in self.uses and sample.image is None:
            return "no image"
        return None

    def fit(self, texts: Iterable[str]) -> None:
        """Learn from the texts what `encode` needs."""

    def lengths(self, samples: Sequence[Sample]) -> list[int]:
        """Tokens of each sample before it is cut; samples of like length are encoded together."""
        return [1] * len(samples)

    def encode(self, samples: Sequence[Sample]) -> np.ndarray:
        """float32 (samples, dim), the images of the samples being open."""
        raise NotImplementedError

    def probe(self, sample: Sample) -> None:
        """Raise DataError if `encode` cannot be relied on; told an encodable sample before any is encoded."""

    def describe(self) -> dict[str, Any]:
        """What the vectors depend on, in plain values."""
        raise NotImplementedError

    def resolved(self) -> dict[str, Any]:
        """What `describe` leaves to the model, as it is in use; loads the model."""
        return {}

    def versions(self) -> dict[str, str]:
        """The versions of the libraries that it computes with. Raises DataError if one is missing."""
        try:
            return {name: version(name) for name in self.libraries}
        except PackageNotFoundError as error:
            raise DataError(f"this encoder needs the package {error.name}: pip install {error.name}, or "
                            f'pip install "recbole-mmdiff[features]"') from error


class ModelEncoder(Encoder):
    """An encoder around a Hugging Face model.

    ``model``: a local folder, or a repository of the Hugging Face Hub. ``revision``: a branch, tag
    or commit of the repository. ``dtype``: of weights and computation; ``auto`` is bfloat16 on a
    GPU that has it, float16 on others, float32 elsewhere. ``device``: as torch names it; by default
    this process's GPU, else the CPU. ``trust_remote_code``: whether Python code that comes with the
    model may run.
    """

    def __init__(self, model: str, revision: str | None = None, dtype: str = "auto",
                 device: str | None = None, trust_remote_code: bool = False) -> None:
        if not str(model).strip():
            raise ConfigError("--model: is empty; give a folder or a repository of the Hugging Face Hub")
        self.called = f"--model {model}"
        self._probed = False
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.source = Source(str(model), revision, trust_remote_code)

    def describe(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {**self.source.describe(), "compute_dtype": dtype}

    def probe(self, sample: Sample) -> None:
        """Once, encode the sample twice. Raises DataError if the vectors differ."""
        if self._probed:
            return
        once, again = self.encode([sample]), self.encode([sample])
        if np.abs(again - once).max() > _NOISE * np.abs(once).max():
            raise DataError(f"{self.called}: gives another vector each time that it encodes "
                            f"{sample.token!r}; use a model without chance in it (masked autoencoders hide "
                            f"some of their input)")
        self._probed = True

    def load(self, auto: Any, allowed: Sequence[str] = ()) -> torch.nn.Module:
        """The model, ready to use; ``auto`` is the Auto class that knows its kind.

        Raises:
            DataError: it cannot be loaded, or lacks weights whose names hold none of ``allowed``.
        """
        model, info = self.source.load(auto, dtype=self.dtype, output_loading_info=True)
        self.check_weights(model, info, allowed)
        return model.eval().to(self.device)

    def check_weights(self, model: torch.nn.Module, info: Mapping[str, Any], allowed: Sequence[str]) -> None:
        """Raise DataError if ``info`` of loading tells of missing weights; see `load`."""
        # transformers fills what is missing with random numbers and only warns.
        missing = [name for name in sorted(info["missing_keys"])
                   if not any(part in name for part in allowed)]
        if missing:
            raise DataError(f"{self.called}: lacks {len(missing)} weights of a {type(model).__name__}, "
                            f"first {missing[0]!r}; is it a model for another encoder?")


@dataclass(frozen=True)
class Source:
    """Where a model comes from; see `ModelEncoder`. ``gguf``: the file in it, if it is of that kind."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    gguf: str | None = None

    @property
    def local(self) -> bool:
        return Path(self.path).is_dir()

    @cached_property
    def commit(self) -> str | None:
        """The commit that ``revision`` stands for, so that all processes use the same."""
        if self.local:
            return None
        from huggingface_hub import snapshot_download

        # Snapshots lie in folders that are named by their commit.
        return Path(self.guard(snapshot_download, self.path, revision=self.revision,
                               allow_patterns="*.json")).name

    def describe(self) -> dict[str, Any]:
        """Repository and commit, or the name of the folder and a checksum of what is in it."""
        gguf = {"gguf_file": self.gguf} if self.gguf else {}
        if not self.local:
            return {"model": self.path, "revision": self.commit, **gguf}
        if self.revision is not None:
            raise ConfigError(f"--revision: {self.path} is a folder, which has no revisions")
        return {"model": Path(self.path).resolve().name, "model_sha256": self.checksum, **gguf}

    @cached_property
    def checksum(self) -> str:
        """Of the names and contents of the files that make up a local model."""
        digest = hashlib.sha256()
        folder = Path(self.path)
        kinds = {".json", ".txt", ".model", ".jinja", ".safetensors", ".bin", ".py"}
        files = [folder / self.gguf] if self.gguf else \
            sorted(path for path in folder.rglob("*") if path.suffix in kinds and path.is_file())
        for path in files:
            digest.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
        return digest.hexdigest()

    def load(self, auto: Any, **options: Any) -> Any:
        """``auto.from_pretrained`` of this model. Raises DataError when it cannot be loaded."""
        if self.gguf:
            options["gguf_file"] = self.gguf
        return self.guard(auto.from_pretrained, self.path, revision=self.commit,
                           trust_remote_code=self.trust_remote_code, **options)

    def guard(self, load: Any, *arguments: Any, **options: Any) -> Any:
        """The result of ``load``. Raises DataError with whatever keeps it from loading the model."""
        try:
            return load(*arguments, **options)
        except Exception as error:    # A damaged or foreign model can make libraries raise anything.
            kind = "" if self.local else "is no folder, and "
            hint = "" if self.trust_remote_code or "trust_remote_code" not in str(error) else \
                "; --trust-remote-code lets the code that comes with it run: read it first"
            raise DataError(f"--model {self.path}: {kind}cannot be loaded: {error}{hint}") from error


def choose_device(name: str | None) -> torch.device:
    """The device named; by default the GPU that torchrun gave this process, else the CPU."""
    import torch

    if name is None:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device: {name!r} cannot be used: {error}") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype named; see `ModelEncoder` for ``auto``."""
    import torch

    if name not in DTYPES:
        raise ConfigError(f"--dtype: {name!r} is not known, use one of {', '.join(DTYPES)}")
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


@contextmanager
def loading_told() -> Iterator[list[tuple[torch.nn.Module, dict[str, Any]]]]:
    """Every model that transformers loads meanwhile, and what it tells of the loading.

    For libraries that load models and keep this to themselves.
    """
    from transformers import PreTrainedModel

    told: list[tuple[torch.nn.Module, dict[str, Any]]] = []
    original = vars(PreTrainedModel)["from_pretrained"]

    def loaded(kind: type, *arguments: Any, **options: Any) -> torch.nn.Module:
        told.append(original.__func__(kind, *arguments, **{**options, "output_loading_info": True}))
        return told[-1][0]

    PreTrainedModel.from_pretrained = classmethod(loaded)
    try:
        yield told
    finally:
        PreTrainedModel.from_pretrained = original


def positions(model: torch.nn.Module) -> int | None:
    """Tokens of a text that the model has positions for; None where it does not say."""
    for name, part in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and hasattr(part, "num_embeddings"):
            # RoBERTa counts its positions from behind that of the padding.
            return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return stated if stated and stated > 0 else None


def special_tokens(tokenizer: Any, *further: str | None) -> re.Pattern[str]:
    """Matches what the tokenizer would take for a special token in a text, and the ``further`` strings."""
    names = {*tokenizer.all_special_tokens, *filter(None, further)}
    names |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # The longest first: one may begin another. Without any, a pattern that matches nothing.
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def token_ids(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """The tokens of each text, none cut off."""
    # Not verbose: it would warn of every text that is longer than the model takes.
    return tokenizer(list(texts), verbose=False, **options)["input_ids"]


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """How many tokens each text has, none cut off."""
    return [len(ids) for ids in token_ids(tokenizer, texts)]


def to_numpy(vectors: torch.Tensor) -> np.ndarray:
    return vectors.float().cpu().numpy()
