"""Models of a few thousand random weights, saved as the real ones are, and a small data set."""

import torch

WORDS = ["the", "a", "of", "and", "red", "blue", "old", "new", "cat", "dog", "ship", "war", "love", "film",
         "story", "who", "goes", "to", "in", "town", "night", "day", "man", "woman", "robot", "king", "star",
         "item", "reviews", "likes"]
SENTENCES = [" ".join(WORDS[(start + step * step) % len(WORDS)] for step in range(length))
             for start, length in enumerate((3, 17, 1, 9, 5, 26, 2, 12, 7, 4, 21, 6))]


def write_items(folder, rows, head=("item_id:token", "title:token_seq", "description:token_seq")):
    """``folder/NAME.item`` of rows of cells."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(row) for row in (head, *rows)]
    (folder / f"{folder.name}.item").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def sentences(folder):
    """A data set whose items i0, i1, ... have the sentences as titles, and no description."""
    return write_items(folder, [(f"i{n}", text, "") for n, text in enumerate(SENTENCES)])


def _seeded(make):
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        return make()
    finally:
        torch.set_rng_state(state)


def _word_tokenizer(model, folder, special, **options):
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(model(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [name for name in special if name in ("[CLS]", "[SEP]", "[BOS]")]
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([around[0], "$A", *around[1:]]),
            special_tokens=[(name, vocabulary[name]) for name in around])
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", **options}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.save_pretrained(folder)
    return wrapped


def tiny_bert(folder, kind="Bert", **options):
    """Also other models of this family by name; ``options`` of their config."""
    import transformers
    from tokenizers.models import WordPiece

    tokenizer = _word_tokenizer(WordPiece, folder, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
                                cls_token="[CLS]", sep_token="[SEP]", model_max_length=24)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, **{"max_position_embeddings": 32, **options})
    _seeded(lambda: getattr(transformers, f"{kind}Model")(config)).save_pretrained(folder)
    return folder


def tiny_llama(folder, layers=3, chat_template=None, positions=64):
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _word_tokenizer(WordLevel, folder, ["[PAD]", "[UNK]", "[EOS]", "[BOS]"],
                                eos_token="[EOS]", bos_token="[BOS]", pad_token=None,
                                chat_template=chat_template)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                         max_position_embeddings=positions, bos_token_id=3, eos_token_id=2,
                         initializer_range=0.3)
    _seeded(lambda: LlamaForCausalLM(config)).save_pretrained(folder)
    return folder


def _vision(kind, **options):
    return kind(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                image_size=32, patch_size=8, **options)


def tiny_vit(folder):
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    _seeded(lambda: ViTModel(_vision(ViTConfig))).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def tiny_mae(folder):
    from transformers import ViTImageProcessorPil, ViTMAEConfig, ViTMAEModel

    _seeded(lambda: ViTMAEModel(_vision(ViTMAEConfig))).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def tiny_convnext(folder):
    from transformers import ConvNextConfig, ConvNextImageProcessorPil, ConvNextModel

    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    _seeded(lambda: ConvNextModel(config)).save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


def _clip_vision(kind, folder):
    from transformers import CLIPImageProcessorPil

    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return _vision(kind)


def tiny_clip(folder):
    from tokenizers.models import WordPiece
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    tokenizer = _word_tokenizer(WordPiece, folder, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
                                cls_token="[CLS]", sep_token="[SEP]")
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2,
                          num_attention_heads=4, intermediate_size=48, max_position_embeddings=16,
                          eos_token_id=3, bos_token_id=2, pad_token_id=0)
    config = CLIPConfig(text_config=text.to_dict(), projection_dim=24,
                        vision_config=_clip_vision(CLIPVisionConfig, folder).to_dict())
    _seeded(lambda: CLIPModel(config)).save_pretrained(folder)
    return folder


def tiny_siglip(folder):
    from tokenizers.models import WordPiece
    from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig

    tokenizer = _word_tokenizer(WordPiece, folder, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
                                cls_token="[CLS]", sep_token="[SEP]")
    text = SiglipTextConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2,
                            num_attention_heads=4, intermediate_size=48, max_position_embeddings=16)
    config = SiglipConfig(text_config=text.to_dict(),
                          vision_config=_clip_vision(SiglipVisionConfig, folder).to_dict())
    _seeded(lambda: SiglipModel(config)).save_pretrained(folder)
    return folder


_CHAT = ("{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
         "IMAGE {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} [EOS]")


def tiny_llava(folder):
    from tokenizers.models import WordLevel
    from transformers import CLIPImageProcessorPil as Images
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = _word_tokenizer(WordLevel, folder, ["[PAD]", "[UNK]", "[EOS]", "<image>"], eos_token="[EOS]",
                                additional_special_tokens=["<image>"])
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                       num_key_value_heads=2, intermediate_size=48, initializer_range=0.3)
    config = LlavaConfig(text_config=text, vision_config=_vision(CLIPVisionConfig), image_token_index=3)
    _seeded(lambda: LlavaForConditionalGeneration(config)).save_pretrained(folder)
    LlavaProcessor(Images(size={"shortest_edge": 32}, crop_size=32), tokenizer, patch_size=8,
                   vision_feature_select_strategy="default", num_additional_image_tokens=1,
                   chat_template=_CHAT.replace("IMAGE", "<image>")).save_pretrained(folder)
    return folder


def tiny_qwen(folder):
    from tokenizers.models import WordLevel
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = _word_tokenizer(
        WordLevel, folder, ["[PAD]", "[UNK]", "[EOS]", *special], eos_token="[EOS]",
        additional_special_tokens=special,
        chat_template=_CHAT.replace("IMAGE", "<|vision_start|> <|image_pad|> <|vision_end|>"))
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
            "bos_token_id": None, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=3, video_token_id=4,
                           vision_start_token_id=5, vision_end_token_id=6)
    _seeded(lambda: Qwen2VLForConditionalGeneration(config)).save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56).save_pretrained(folder)
    return folder
