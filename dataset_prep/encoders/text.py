"""Text by a sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dataset_prep.encoders.base import ModelEncoder, Sample, token_counts
from recbole_mmdiff.errors import DataError, one_of

POOLINGS = ("cls", "lasttoken", "max", "mean")


class TextEncoder(ModelEncoder):
    """A sentence-transformers model as it is, or any Hugging Face text encoder with a pooling.

    ``pooling``: by default the model's own, which for one without (BERT, RoBERTa) is the mean over
    its tokens. ``max_length``: tokens of a text that are read, by default as many as the model says.
    A model that scales its vectors to unit length does so.
    """

    libraries = ("torch", "transformers", "sentence-transformers")

    def __init__(self, model: str, pooling: str | None = None, max_length: int | None = None,
                 **options: Any) -> None:
        super().__init__(model, **options)
        self.pooling = one_of("--pooling", pooling, POOLINGS) if pooling else None
        self._max_length = max_length

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "pooling": self.pooling or "the model's own",
                "max_length": self._max_length or "the model's own"}

    @property
    def max_length(self) -> int | None:
        return self.model.max_seq_length

    @cached_property
    def model(self):
        """The sentence-transformers model."""
        from sentence_transformers import SentenceTransformer

        model = self.source.guard(SentenceTransformer, self.source.path, device=str(self.device),
                                  revision=self.source.commit,
                                  trust_remote_code=self.source.trust_remote_code)
        if self.pooling:
            self._pool(model)
        if self._max_length:
            model.max_seq_length = self._max_length
        return model.to(self.dtype).eval()

    def _pool(self, model: Any) -> None:
        from sentence_transformers.models import Pooling

        place = next((name for name, part in model.named_children() if isinstance(part, Pooling)), None)
        if place is None:
            raise DataError(f"--pooling: {self.source.path} does not pool over tokens; leave the "
                            f"option out")
        old = getattr(model, place)
        # The name of the dimension changed in sentence-transformers 6.
        dim = getattr(old, "embedding_dimension", None) or old.word_embedding_dimension
        setattr(model, place, Pooling(dim, pooling_mode=self.pooling))

    def lengths(self, samples: Sequence[Sample]) -> list[int]:
        return token_counts(self.model.tokenizer, [sample.text for sample in samples])

    def encode(self, samples: Sequence[Sample]) -> np.ndarray:
        texts = [sample.text for sample in samples]
        return self.model.encode(texts, batch_size=len(texts), show_progress_bar=False,
                                 convert_to_numpy=True)
