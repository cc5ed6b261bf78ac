"""Text under a prompt by the hidden states of a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.encoders.base import (
    ModelEncoder,
    Sample,
    Source,
    positions,
    special_tokens,
    to_numpy,
    token_ids,
)
from recbole_mmdiff.errors import ConfigError, DataError, one_of

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

    The output of the last block is what transformers gives as the last hidden state: in Llama and
    models like it that is behind the final norm, which is how we read H_L of the equation.
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


def adds_special_tokens(tokenizer: Any, message: str) -> bool:
    """Whether the tokenizer is to add its special tokens to what a chat template makes, as ``message``."""
    return not (tokenizer.bos_token and message.startswith(tokenizer.bos_token))


class LanguageEncoder(ModelEncoder):
    """Any causal language model (Llama, Qwen, SmolLM, ...): one forward pass, nothing generated.

    The model runs without its head, so no logits over the vocabulary are made. ``pooling``: see
    `pool_states`. ``max_length``: tokens of a prompt that are read, by default 2,048, never more than
    the model has positions for; longer ones lose their end, but not what a chat template or the
    tokenizer puts behind it. ``gguf``: the GGUF file in the folder or repository ``model``, which may
    also name such a file itself (needs the packages gguf and accelerate). ``chat_template``: put the
    prompt into the model's chat template as the user's message.

    The tokenizer's special tokens are replaced by a space where they stand in the prompt: what
    people write is not to end a text or to speak for the model.
    """

    prompted = True
    libraries = ("torch", "transformers", "tokenizers", "numpy")
    entity = "user"
    batch_size = 64

    def __init__(self, model: str, pooling: str = "first_last_avg", max_length: int = 2048,
                 gguf: str | None = None, chat_template: bool = False, **options: Any) -> None:
        if gguf is None and Path(model).is_file() and Path(model).suffix == ".gguf":
            model, gguf = str(Path(model).parent), Path(model).name
        super().__init__(model, **options)
        self.source = Source(self.source.path, self.source.revision, self.source.trust_remote_code, gguf)
        if gguf:
            self.libraries = (*self.libraries, "gguf", "accelerate")
        self.pooling = one_of("--pooling", pooling, POOLINGS)
        self._max_length = max_length
        self.chat_template = chat_template

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "pooling": self.pooling, "max_length": self._max_length,
                "chat_template": self.chat_template}

    def resolved(self) -> dict[str, Any]:
        return {"max_length": self.max_length}

    @cached_property
    def max_length(self) -> int:
        return min(self._max_length, positions(self.model) or self._max_length)

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        tokenizer = self.source.load(AutoTokenizer)
        if self.chat_template and not tokenizer.chat_template:
            raise ConfigError(f"--chat-template: {self.source.path} has none")
        return tokenizer

    @cached_property
    def model(self):
        from transformers import AutoModel
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

        model = self.load(AutoModel)
        # BERT and its kin can be made causal models, but as trained they see the whole text.
        config = model.config
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
            raise DataError(f"{self.called}: a {type(model).__name__} is no causal language model; use it "
                            f"with --encoder text")
        return model

    def lengths(self, samples: Sequence[Sample]) -> list[int]:
        return [len(ids) for ids in self._ids([sample.text for sample in samples])]

    def encode(self, samples: Sequence[Sample]) -> np.ndarray:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        rows = [torch.tensor(self._cut(ids)) for ids in self._ids([sample.text for sample in samples])]
        # Behind the text, where no token of it looks, any token can be the padding.
        inputs = pad_sequence(rows, batch_first=True).to(self.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.device)
        with torch.inference_mode():
            output = self.model(input_ids=inputs, attention_mask=mask, output_hidden_states=True,
                                use_cache=False)
            return to_numpy(pool_states(output.hidden_states, mask, self.pooling))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text with what belongs around it, none cut off."""
        messages = [self._message(text) for text in texts]
        return token_ids(self.tokenizer, messages, add_special_tokens=self._adds_special)

    def _message(self, text: str) -> str:
        text = self._special.sub(" ", text)
        if not self.chat_template:
            return text
        return self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                  add_generation_prompt=True)

    @cached_property
    def _special(self):
        return special_tokens(self.tokenizer)

    @cached_property
    def _adds_special(self) -> bool:
        return not self.chat_template or adds_special_tokens(self.tokenizer, self._message("a"))

    def _cut(self, ids: list[int]) -> list[int]:
        """At most ``max_length`` tokens: the last ones of the text make room."""
        if len(ids) <= self.max_length:
            return ids
        return ids[:self.max_length - self._behind] + ids[len(ids) - self._behind:]

    @cached_property
    def _behind(self) -> int:
        """How many tokens stand behind the text. Raises ConfigError if they leave no room for it."""
        one, other = self._ids(["a", "the"])
        before = _shared(one, other)
        behind = _shared(one[::-1], other[::-1]) if one != other else 0
        if self.max_length <= before + behind:
            raise ConfigError(f"--max-length: {self.max_length} leaves no token of the text, as "
                              f"{before + behind} stand around it; give at least {before + behind + 1}")
        return behind


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many numbers both begin with."""
    return next((place for place, (left, right) in enumerate(zip(one, other, strict=False))
                 if left != right), min(len(one), len(other)))
