"""Text by a sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dataset_prep.encoders.base import ModelEncoder, Sample, loading_told, positions, token_counts
from recbole_mmdiff.errors import ConfigError, DataError, one_of

POOLINGS = ("cls", "lasttoken", "max", "mean")


class TextEncoder(ModelEncoder):
    """A sentence-transformers model as it is, or any Hugging Face text encoder with a pooling.

    ``pooling``: by default the model's own, which for one without (BERT, RoBERTa) is the mean over
    its tokens. ``max_length``: tokens of a text that are read, by default as many as the model says;
    never more than it has positions for. A model that scales its vectors to unit length does so, and
    one that has a default prompt puts it before the text.
    """

    libraries = ("torch", "transformers", "tokenizers", "numpy", "sentence-transformers")

    def __init__(self, model: str, pooling: str | None = None, max_length: int | None = None,
                 **options: Any) -> None:
        super().__init__(model, **options)
        self.pooling = one_of("--pooling", pooling, POOLINGS) if pooling else None
        self._max_length = max_length

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "pooling": self.pooling or "the model's own",
                "max_length": self._max_length or "the model's own"}

    def resolved(self) -> dict[str, Any]:
        place = _pooling_place(self.model)
        found = {"pooling": getattr(self.model, place).pooling_mode if place else "none",
                 "max_length": self.max_length, "model_prompt": self._prompt}
        return {name: value for name, value in found.items() if value}

    @property
    def max_length(self) -> int | None:
        return self.model.max_seq_length

    @property
    def _prompt(self) -> str:
        """What the model puts before every text."""
        return self.model.prompts.get(self.model.default_prompt_name) or ""

    @cached_property
    def model(self):
        """The sentence-transformers model."""
        from sentence_transformers import SentenceTransformer

        with loading_told() as told:
            model = self.source.guard(SentenceTransformer, self.source.path, device=str(self.device),
                                      revision=self.source.commit,
                                      trust_remote_code=self.source.trust_remote_code)
        for part, info in told:
            self.check_weights(part, info, allowed=("pooler",))
            self._limit(model, positions(part))
        if self.pooling:
            self._pool(model)
        return model.to(self.dtype).eval()

    def _limit(self, model: Any, most: int | None) -> None:
        """Let the model read ``max_length`` tokens, but not more than it has positions for."""
        limits = [limit for limit in (self._max_length or model.max_seq_length, most) if limit]
        if limits:
            model.max_seq_length = min(limits)
        around = model.tokenizer.num_special_tokens_to_add()
        if self._max_length and self._max_length <= around:
            raise ConfigError(f"--max-length: {self._max_length} leaves no token of the text, as the model "
                              f"puts {around} around it; give at least {around + 1}")

    def _pool(self, model: Any) -> None:
        from sentence_transformers.sentence_transformer.modules import Pooling

        place = _pooling_place(model)
        if place is None:
            raise DataError(f"--pooling: {self.source.path} does not pool over tokens; leave the "
                            f"option out")
        old = getattr(model, place)
        setattr(model, place, Pooling(old.embedding_dimension, pooling_mode=self.pooling))

    def lengths(self, samples: Sequence[Sample]) -> list[int]:
        return token_counts(self.model.tokenizer, [self._prompt + sample.text for sample in samples])

    def encode(self, samples: Sequence[Sample]) -> np.ndarray:
        texts = [sample.text for sample in samples]
        return self.model.encode(texts, batch_size=len(texts), show_progress_bar=False,
                                 convert_to_numpy=True).astype(np.float32)


def _pooling_place(model: Any) -> str | None:
    """The name of the part that pools over tokens."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    return next((name for name, part in model.named_children() if isinstance(part, Pooling)), None)
