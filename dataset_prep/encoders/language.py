"""Text under a prompt by the hidden states of a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.encoders.base import ModelEncoder, Sample, Source, to_numpy, token_counts
from recbole_mmdiff.errors import ConfigError, one_of

if TYPE_CHECKING:
    import torch

POOLINGS = ("first_last_avg", "last_avg", "last_token")


def pool_states(states: Sequence[torch.Tensor], mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One float32 vector a text (n, dim) from the hidden states of a model.

    ``states``: (n, tokens, dim) each, the embeddings first, then the output of every block.
    ``mask``: (n, tokens), nonzero at the tokens of the text, padding behind them. ``pooling``:

    - ``first_last_avg``: (first block + last block) / 2, averaged over the tokens (MuSiC, Eq. 1);
    - ``last_avg``: the last block, averaged over the tokens;
    - ``last_token``: the last block at the last token.
    """
    last = states[-1].float()
    if pooling == "last_token":
        places = mask.sum(dim=1) - 1
        return last[range(len(last)), places]
    if pooling == "first_last_avg":
        last = (states[1].float() + last) / 2
    weights = mask.unsqueeze(-1).to(last)
    return (last * weights).sum(dim=1) / weights.sum(dim=1)


def set_padding(tokenizer: Any) -> Any:
    """The tokenizer, set to pad and cut on the right."""
    # Before the text, padding would move its positions; behind it, no token of it looks there.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def adds_special_tokens(tokenizer: Any, texts: Sequence[str]) -> bool:
    """Whether the tokenizer is to add its special tokens; a chat template may have put them there."""
    return not (tokenizer.bos_token and texts and texts[0].startswith(tokenizer.bos_token))


class LanguageEncoder(ModelEncoder):
    """Any causal language model (Llama, Qwen, SmolLM, ...): one forward pass, nothing generated.

    The model runs without its head, so no logits over the vocabulary are made. ``pooling``: see
    `pool_states`. ``max_length``: tokens of a prompt that are read, by default 2,048 or what the
    model takes; longer ones lose their end. ``gguf``: the GGUF file in the folder or repository
    ``model``, which may also name such a file itself (needs the packages gguf and accelerate).
    ``chat_template``: put the prompt into the model's chat template as the user's message.
    """

    prompted = True
    entity = "user"
    batch_size = 64

    def __init__(self, model: str, pooling: str = "first_last_avg", max_length: int = 2048,
                 gguf: str | None = None, chat_template: bool = False, **options: Any) -> None:
        if gguf is None and Path(model).is_file() and Path(model).suffix == ".gguf":
            model, gguf = str(Path(model).parent), Path(model).name
        super().__init__(model, **options)
        self.source = Source(self.source.path, self.source.revision, self.source.trust_remote_code, gguf)
        self.pooling = one_of("--pooling", pooling, POOLINGS)
        self._max_length = max_length
        self.chat_template = chat_template

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "pooling": self.pooling, "max_length": self._max_length,
                "chat_template": self.chat_template}

    @property
    def max_length(self) -> int:
        return min(self._max_length, getattr(self.model.config, "max_position_embeddings", None)
                   or self._max_length)

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        tokenizer = set_padding(self.source.load(AutoTokenizer))
        if self.chat_template and not tokenizer.chat_template:
            raise ConfigError(f"--chat-template: {self.source.path} has none")
        return tokenizer

    @cached_property
    def model(self):
        from transformers import AutoModel

        return self.load(AutoModel)

    def lengths(self, samples: Sequence[Sample]) -> list[int]:
        texts = self._texts(samples)
        return token_counts(self.tokenizer, texts,
                            add_special_tokens=adds_special_tokens(self.tokenizer, texts))

    def encode(self, samples: Sequence[Sample]) -> np.ndarray:
        import torch

        texts = self._texts(samples)
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length,
                                add_special_tokens=adds_special_tokens(self.tokenizer, texts),
                                return_tensors="pt", return_token_type_ids=False).to(self.device)
        with torch.inference_mode():
            output = self.model(**inputs, output_hidden_states=True, use_cache=False)
            return to_numpy(pool_states(output.hidden_states, inputs["attention_mask"], self.pooling))

    def _texts(self, samples: Sequence[Sample]) -> list[str]:
        texts = [sample.text for sample in samples]
        if not self.chat_template:
            return texts
        return [self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                   add_generation_prompt=True) for text in texts]
