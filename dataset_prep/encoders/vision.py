"""Images by a vision model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.encoders.base import ModelEncoder, Sample, Source, to_numpy
from recbole_mmdiff.errors import DataError, one_of

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BaseImageProcessor

POOLINGS = ("cls", "mean", "pooler")


class ImageEncoder(ModelEncoder):
    """Any Hugging Face vision model: ViT, DINOv2, ConvNeXt, Swin, the image side of CLIP, ...

    ``pooling``: ``cls`` the last hidden state of the class token, ``mean`` over all positions of
    the last hidden state, ``pooler`` the model's own pooled output. By default ``cls`` where there
    is a class token, else ``pooler`` where the model pools, else ``mean``.

    Images are prepared by the Pillow form of the model's processor, so that the features do not
    depend on whether torchvision is installed.
    """

    uses = ("image",)
    libraries = ("torch", "transformers", "numpy", "pillow")
    batch_size = 64

    def __init__(self, model: str, pooling: str | None = None, **options: Any) -> None:
        super().__init__(model, **options)
        self._pooling = one_of("--pooling", pooling, POOLINGS) if pooling else None

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "pooling": self._pooling or "the class token, else the model's"}

    def resolved(self) -> dict[str, Any]:
        return {"pooling": self.pooling}

    @cached_property
    def processor(self):
        return image_processor(self.source)

    @cached_property
    def model(self):
        from transformers import AutoModel

        # A pooler without weights does no harm where it is not asked.
        model = self.load(AutoModel, allowed=() if self._pooling == "pooler" else ("pooler",))
        # Of a model of two sides the image side.
        return getattr(model, "vision_model", model)

    @cached_property
    def pooling(self) -> str:
        """The pooling in use. Raises DataError if the model does not have the one asked for."""
        from PIL import Image

        names = [name.rpartition(".")[2] for name, _ in self.model.named_parameters()]
        has_class = any(name in ("cls_token", "class_token", "class_embedding") for name in names)
        if self._pooling == "cls" and not has_class:
            raise DataError(f"--pooling cls: {self.source.path} has no class token; use mean or pooler")
        if self._pooling in ("cls", "mean") or (not self._pooling and has_class):
            return self._pooling or "cls"
        # Whether it pools shows only in what it puts out, here for a picture of nothing.
        pooled = getattr(self._output([Image.new("RGB", (64, 64))]), "pooler_output", None)
        if self._pooling and pooled is None:
            raise DataError(f"--pooling pooler: {self.source.path} has no pooled output; use mean")
        return "mean" if pooled is None else "pooler"

    def encode(self, samples: Sequence[Sample]) -> np.ndarray:
        output = self._output([sample.image for sample in samples])
        return to_numpy(self._pool(output))

    def _output(self, images: Sequence[Image.Image]) -> Any:
        import torch

        inputs = self.processor(images=images, return_tensors="pt")
        with torch.inference_mode():
            return self.model(pixel_values=inputs["pixel_values"].to(self.device, self.dtype))

    def _pool(self, output: Any) -> Any:
        states = output.last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "pooler":
            return output.pooler_output.flatten(1)
        # Convolutions keep (channel, height, width), transformers (position, channel).
        return states.float().mean(dim=(2, 3) if states.ndim == 4 else 1)


def image_processor(source: Source) -> BaseImageProcessor:
    """The processor of a model's images, in its Pillow form."""
    from transformers import AutoImageProcessor

    return source.load(AutoImageProcessor, backend="pil")
