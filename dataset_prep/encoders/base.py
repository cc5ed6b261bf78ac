"""What an encoder is, and what every encoder of the Hugging Face kind needs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_mmdiff.errors import ConfigError, DataError
from recbole_mmdiff.files import sha256

if TYPE_CHECKING:
    import torch
    from PIL import Image

DTYPES = ("auto", "float32", "bfloat16", "float16")


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
    """

    uses: tuple[str, ...] = ("text",)
    prompted = False
    fitted = False
    entity = "item"
    libraries: tuple[str, ...] = ("torch", "transformers")
    batch_size = 256
    max_length: int | None = None

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

    def describe(self) -> dict[str, Any]:
        """What the vectors depend on, in plain values."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """The versions of the libraries that it computes with."""
        return {name: version(name) for name in self.libraries}


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
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.source = Source(str(model), revision, trust_remote_code)

    def describe(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {**self.source.describe(), "compute_dtype": dtype}

    def load(self, auto: Any, allowed: Sequence[str] = ()) -> torch.nn.Module:
        """The model, ready to use; ``auto`` is the Auto class that knows its kind.

        Raises:
            DataError: it cannot be loaded, or lacks weights whose names hold none of ``allowed``.
        """
        model, info = self.source.load(auto, dtype=self.dtype, output_loading_info=True)
        # transformers fills what is missing with random numbers and only warns.
        missing = [name for name in sorted(info["missing_keys"])
                   if not any(part in name for part in allowed)]
        if missing:
            raise DataError(f"--model {self.source.path}: lacks {len(missing)} weights of a "
                            f"{type(model).__name__}, first {missing[0]!r}; is it a model for "
                            f"another encoder?")
        return model.eval().to(self.device)


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
        gguf = {"gguf": self.gguf} if self.gguf else {}
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


def token_counts(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[int]:
    """Tokens of each text, none cut off."""
    # Not verbose: it would warn of every text that is longer than the model takes.
    return [len(ids) for ids in tokenizer(list(texts), verbose=False, **options)["input_ids"]]


def to_numpy(vectors: torch.Tensor) -> np.ndarray:
    return vectors.float().cpu().numpy()
