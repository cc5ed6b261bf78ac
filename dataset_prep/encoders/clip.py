"""Text and images in the space that the two sides of a CLIP model share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dataset_prep.encoders.base import ModelEncoder, Sample, special_tokens, to_numpy, token_counts
from dataset_prep.encoders.vision import image_processor
from recbole_mmdiff.errors import DataError


class _Clip(ModelEncoder):
    """A CLIP or SigLIP model; its vectors before they are scaled to unit length."""

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "pooling": "projection"}

    @cached_property
    def model(self):
        from transformers import AutoModel

        model = self.load(AutoModel)
        if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
            raise DataError(f"--model {self.source.path}: a {type(model).__name__} has no space that "
                            f"text and images share; use a CLIP or SigLIP model")
        return model


class ClipText(_Clip):
    """The text side of CLIP or SigLIP.

    Text is cut to what the model reads (77 and 64 tokens). The tokenizer's special tokens are
    replaced by a space where they stand in a text: CLIP takes its vector at the first end of text.
    """

    libraries = ("torch", "transformers", "tokenizers", "numpy")

    def resolved(self) -> dict[str, Any]:
        return {"max_length": self.max_length}

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        return self.source.load(AutoTokenizer)

    @property
    def max_length(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    @cached_property
    def _special(self):
        return special_tokens(self.tokenizer)

    def _texts(self, samples: Sequence[Sample]) -> list[str]:
        return [self._special.sub(" ", sample.text) for sample in samples]

    def lengths(self, samples: Sequence[Sample]) -> list[int]:
        return token_counts(self.tokenizer, self._texts(samples))

    def encode(self, samples: Sequence[Sample]) -> np.ndarray:
        import torch

        # SigLIP was trained on padded texts and has no attention mask.
        padding = "max_length" if self.model.config.model_type.startswith("siglip") else True
        inputs = self.tokenizer(self._texts(samples), padding=padding, truncation=True,
                                max_length=self.max_length, return_tensors="pt")
        with torch.inference_mode():
            return _vectors(self.model.get_text_features(**inputs.to(self.device)))


class ClipImage(_Clip):
    """The image side of CLIP or SigLIP."""

    uses = ("image",)
    libraries = ("torch", "transformers", "numpy", "pillow")
    batch_size = 64

    @cached_property
    def processor(self):
        return image_processor(self.source)

    def encode(self, samples: Sequence[Sample]) -> np.ndarray:
        import torch

        inputs = self.processor(images=[sample.image for sample in samples], return_tensors="pt")
        with torch.inference_mode():
            pixels = inputs["pixel_values"].to(self.device, self.dtype)
            return _vectors(self.model.get_image_features(pixel_values=pixels))


def _vectors(output: Any) -> np.ndarray:
    # A tensor in transformers 4, an output of several fields in 5.
    return to_numpy(getattr(output, "pooler_output", output))
