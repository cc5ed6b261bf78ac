"""Text and image together, under a prompt, by the hidden states of an image-text chat model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dataset_prep.encoders.base import ModelEncoder, Sample, Source, special_tokens, to_numpy, token_counts
from dataset_prep.encoders.language import POOLINGS, adds_special_tokens, pool_states, set_padding
from recbole_mmdiff.errors import DataError, one_of

WITHOUT_IMAGE = ("leave_out", "text")


class MultimodalEncoder(ModelEncoder):
    """An image-text chat model (Qwen-VL, LLaVA, ...): one forward pass, nothing generated.

    The image and the prompt form the user's message in the model's chat template; ``pooling``
    averages over all its tokens, those of the image included (MuSiC, Eq. 1; see `pool_states`).
    ``without_image``: items without a usable image are left out (as in the paper), or encoded by
    their ``text`` alone. Special tokens are replaced by a space where they stand in the prompt.

    Works with the models that transformers itself brings. MiniCPM-Llama3-V 2.5, which MuSiC names,
    is not one of them: its repository's own code was written for transformers 4 and takes its
    inputs in a form of its own, so expect it to fail here, with ``trust_remote_code`` too. The
    MiniCPM-V models inside transformers are its nearest successors.
    """

    uses = ("image", "text")
    prompted = True
    libraries = ("torch", "transformers", "tokenizers", "numpy", "pillow")
    batch_size = 8

    def __init__(self, model: str, pooling: str = "first_last_avg",
                 without_image: str = "leave_out", **options: Any) -> None:
        super().__init__(model, **options)
        self.pooling = one_of("--pooling", pooling, POOLINGS)
        self.without_image = one_of("--without-image", without_image, WITHOUT_IMAGE)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "pooling": self.pooling, "without_image": self.without_image}

    def lacks(self, sample: Sample) -> str | None:
        if sample.image is not None:
            return None
        if self.without_image == "leave_out":
            return "no image"
        return "no text and no image" if sample.blank else None

    @cached_property
    def processor(self):
        """What turns messages into the model's inputs."""
        processor = load_processor(self.source)
        if getattr(processor, "tokenizer", None) is None or not processor.chat_template:
            raise DataError(f"--model {self.source.path}: has no processor with a tokenizer and a chat "
                            f"template; is it an image-text chat model?")
        set_padding(processor.tokenizer)
        return processor

    @cached_property
    def model(self):
        from transformers import AutoModelForImageTextToText

        return self.load(AutoModelForImageTextToText).base_model

    def lengths(self, samples: Sequence[Sample]) -> list[int]:
        # Without the image's tokens: what matters is that samples of like length stand together.
        return token_counts(self.processor.tokenizer, [sample.text for sample in samples])

    def encode(self, samples: Sequence[Sample]) -> np.ndarray:
        seen = np.array([sample.image is not None for sample in samples])
        if seen.all() or not seen.any():
            return self._encode(samples)
        # Processors differ in how they take batches of which only some have an image.
        parts = [self._encode([sample for sample in samples if (sample.image is not None) == which])
                 for which in (True, False)]
        rows = np.empty((len(samples), parts[0].shape[1]), dtype=np.float32)
        rows[seen], rows[~seen] = parts
        return rows

    def _encode(self, samples: Sequence[Sample]) -> np.ndarray:
        import torch

        texts = [self._message(sample) for sample in samples]
        images = [[sample.image] for sample in samples if sample.image is not None]
        inputs = self.processor(text=texts, images=images or None, padding=True, return_tensors="pt",
                                add_special_tokens=self._adds_special)
        inputs = inputs.to(self.device, dtype=self.dtype)    # Whole numbers stay what they are.
        with torch.inference_mode():
            output = self.model(**inputs, output_hidden_states=True, use_cache=False)
            return to_numpy(pool_states(output.hidden_states, inputs["attention_mask"], self.pooling))

    @cached_property
    def _special(self):
        # In a text the tokens of images and videos would stand for more of them.
        return special_tokens(self.processor.tokenizer, getattr(self.processor, "image_token", None),
                              getattr(self.processor, "video_token", None))

    @cached_property
    def _adds_special(self) -> bool:
        return adds_special_tokens(self.processor.tokenizer, self._message(Sample("", "a")))

    def _message(self, sample: Sample) -> str:
        content = [{"type": "text", "text": self._special.sub(" ", sample.text)}]
        if sample.image is not None:
            content.insert(0, {"type": "image"})
        return self.processor.apply_chat_template([{"role": "user", "content": content}],
                                                  tokenize=False, add_generation_prompt=True)


def load_processor(source: Source) -> Any:
    """The processor of a model of text and images; images in the Pillow form of theirs.

    Models that also see videos cannot load their part for them without torchvision, nor in a Pillow
    form; they are loaded without it.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = source.load(AutoConfig)
    kind = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None or "video_processor" not in kind.get_attributes():
        return source.load(AutoProcessor, backend="pil")

    class ImagesOnly(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    return source.load(ImagesOnly, backend="pil")
