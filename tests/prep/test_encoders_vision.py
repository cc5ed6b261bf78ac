"""Image encoders and both sides of CLIP, without torchvision."""

import json
import zlib
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
    tiny_convnext,
    tiny_llava,
    tiny_mae,
    tiny_siglip,
    tiny_vit,
    write_items,
)

from dataset_prep.encode import encode
from dataset_prep.encoders import Sample, make_encoder
from dataset_prep.images import open_image
from recbole_mmdiff.errors import ConfigError, DataError

pytest.importorskip("transformers")
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    makers = {"vit": tiny_vit, "convnext": tiny_convnext, "clip": tiny_clip, "siglip": tiny_siglip}
    return {name: make(folder / name) for name, make in makers.items()}


def pictures(count=9):
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (40 + 3 * n, 30 + 5 * n, 3), dtype=np.uint8))
            for n in range(count)]


@pytest.fixture
def gallery(tmp_path):
    """A data set of which every item but the last has a picture."""
    folder = write_items(tmp_path / "toy", [(f"a/{n}", f"red item {n}", "") for n in range(10)])
    (folder / "images").mkdir()
    for n, picture in enumerate(pictures()):
        picture.save(folder / "images" / f"a%2F{n}.png")
    return folder


def vit_by_hand(folder, pooling):
    """One picture at a time: resized and scaled here, pooled in a loop."""
    from transformers import ViTModel

    model = ViTModel.from_pretrained(folder).eval()
    rows = []
    for picture in pictures():
        small = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32)
        pixels = torch.from_numpy((small / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
        with torch.no_grad():
            output = model(pixels)
        states = list(output.last_hidden_state[0])
        rows.append({"cls": states[0], "pooler": output.pooler_output[0],
                     "mean": sum(states) / len(states)}[pooling].numpy())
    return np.array(rows)


def test_images_are_prepared_by_pillow_whether_or_not_torchvision_is_here(models):
    for name in ("vit", "convnext", "clip", "siglip"):
        processor = make_encoder("image", model=models[name]).processor
        assert type(processor).__name__.endswith("Pil")


@pytest.mark.parametrize("pooling", [None, "cls", "mean", "pooler"])
def test_vit_equals_a_plain_loop(models, gallery, pooling):
    outcome = encode(gallery, "image", model=models["vit"], pooling=pooling, batch_size=4)
    expected = vit_by_hand(models["vit"], pooling or "cls")
    np.testing.assert_allclose(outcome.feature.matrix, expected, atol=2e-6)
    assert outcome.feature.tokens == tuple(f"a/{n}" for n in range(9))
    assert outcome.feature.manifest["left_out"] == {"no image": {"count": 1, "first": ["a/9"]}}


def test_convolutions_and_models_without_a_class_token(models):
    from transformers import ConvNextModel, SiglipModel

    samples = [Sample(str(n), image=picture) for n, picture in enumerate(pictures(3))]
    pooler, mean = (make_encoder("image", model=models["convnext"], pooling=how) for how in (None, "mean"))
    assert pooler.pooling == "pooler"
    pixels = pooler.processor(images=pictures(3), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = ConvNextModel.from_pretrained(models["convnext"]).eval()(pixels)
    np.testing.assert_allclose(pooler.encode(samples), output.pooler_output, atol=1e-6)
    maps = output.last_hidden_state.numpy()
    np.testing.assert_allclose(mean.encode(samples), maps.reshape(*maps.shape[:2], -1).mean(2), atol=1e-6)
    with pytest.raises(DataError, match=r"--pooling cls.*has no class token"):
        make_encoder("image", model=models["convnext"], pooling="cls").encode(samples)
    # The image side of a model of two sides; SigLIP has no class token but a pooling head.
    siglip = make_encoder("image", model=models["siglip"])
    pixels = siglip.processor(images=pictures(3), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = SiglipModel.from_pretrained(models["siglip"]).eval().vision_model(pixels)
    np.testing.assert_allclose(siglip.encode(samples), output.pooler_output, atol=1e-6)
    assert make_encoder("image", model=models["clip"]).encode(samples).shape == (3, 32)


def test_a_pooler_without_weights_is_refused(models, tmp_path):
    from transformers import ViTModel

    bare = tmp_path / "bare"
    ViTModel.from_pretrained(models["vit"], add_pooling_layer=False).save_pretrained(bare)
    (bare / "preprocessor_config.json").write_bytes((models["vit"] / "preprocessor_config.json").read_bytes())
    samples = [Sample("a", image=pictures(1)[0])]
    np.testing.assert_allclose(make_encoder("image", model=bare).encode(samples),
                               vit_by_hand(models["vit"], "cls")[:1], atol=2e-6)
    with pytest.raises(DataError, match="lacks 2 weights of a ViTModel, first 'pooler"):
        make_encoder("image", model=bare, pooling="pooler").encode(samples)


def test_a_model_with_chance_in_it_is_refused(gallery, tmp_path):
    with pytest.raises(DataError, match="mae: gives another vector each time"):
        encode(gallery, "image", model=tiny_mae(tmp_path / "mae"))
    assert not list(gallery.glob("toy.image.*"))


def test_the_manifest_tells_the_pooling_in_use(models):
    for name, pooling in {"vit": "cls", "convnext": "pooler", "siglip": "pooler"}.items():
        assert make_encoder("image", model=models[name]).resolved() == {"pooling": pooling}
    assert make_encoder("image", model=models["vit"], pooling="mean").resolved() == {"pooling": "mean"}
    clip = make_encoder("clip-text", model=models["clip"])
    assert clip.describe()["pooling"] == "projection" and clip.resolved() == {"max_length": 16}


def test_the_text_encoder_reads_clip_as_its_text_side(models):
    samples = [Sample(str(n), text) for n, text in enumerate(SENTENCES)]    # some longer than it reads
    text, clip = (make_encoder(name, model=models["clip"]) for name in ("text", "clip-text"))
    assert max(clip.lengths(samples)) > text.resolved()["max_length"] == 16
    np.testing.assert_allclose(text.encode(samples), clip.encode(samples), atol=1e-6)


def test_a_special_token_in_a_text_ends_nothing(models):
    rows = make_encoder("clip-text", model=models["clip"]).encode(
        [Sample("a", "red [SEP] cat"), Sample("b", "red cat"), Sample("c", "red")])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    assert np.abs(rows[0] - rows[2]).max() > 1e-4


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_both_sides_of_clip_are_those_of_its_joint_forward_pass(models, gallery, tmp_path, name):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = models[name]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    texts = encode(sentences(tmp_path / "titles"), "clip-text", model=folder, batch_size=5).feature.matrix
    images = encode(gallery, "clip-image", model=folder, batch_size=4).feature.matrix
    padding = {"padding": "max_length"} if name == "siglip" else {}
    rows = zip(SENTENCES, texts, pictures(), images, strict=False)    # 12 texts, 9 pictures
    for text, of_text, picture, of_image in rows:
        inputs = tokenizer([text], truncation=True, max_length=16, return_tensors="pt", **padding)
        with torch.no_grad():
            output = model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"),
                           pixel_values=processor(images=[picture], return_tensors="pt")["pixel_values"])
        np.testing.assert_allclose(of_text / np.linalg.norm(of_text), output.text_embeds[0], atol=2e-6)
        np.testing.assert_allclose(of_image / np.linalg.norm(of_image), output.image_embeds[0], atol=2e-6)


def test_models_of_the_wrong_kind(models, gallery, tmp_path):
    bert = tiny_bert(tmp_path / "bert")
    with pytest.raises(DataError, match="no space that text and images share"):
        encode(gallery, "clip-text", model=bert)
    with pytest.raises(DataError, match="cannot be loaded"):
        encode(gallery, "image", model=bert)
    with pytest.raises(DataError, match=r"llava: cannot encode 'a/\d'.*is it a model for this encoder\?"):
        encode(gallery, "image", model=tiny_llava(tmp_path / "llava"))
    with pytest.raises(ConfigError, match="--fields: has no meaning"):
        encode(gallery, "image", model=models["vit"], fields=["title"])
    with pytest.raises(ConfigError, match="users have not"):
        encode(gallery, "image", model=models["vit"], entity="user")


def test_broken_images_are_left_out_and_counted(models, gallery, capsys):
    from dataset_prep.cli import main

    whole = (gallery / "images" / "a%2F3.png").read_bytes()
    (gallery / "images" / "a%2F3.png").write_bytes(whole[:len(whole) // 2])
    (gallery / "images" / "a%2F4.png").write_bytes(b"")
    bomb = bytearray(whole)
    bomb[16:24] = (60000).to_bytes(4, "big") * 2    # width and height in the header
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    (gallery / "images" / "a%2F5.png").write_bytes(bytes(bomb))
    main(["encode", "--data", str(gallery), "--encoder", "image", "--model", str(models["vit"])])
    told = capsys.readouterr().out
    left_out = json.loads((gallery / "toy.image.json").read_text())["left_out"]
    assert {reason: entry["first"] for reason, entry in left_out.items()} == {
        "no image": ["a/9"], "the image is truncated or corrupt": ["a/3"], "the image is empty": ["a/4"],
        "the image has too many pixels": ["a/5"]}
    assert (gallery / "toy.image.tokens").read_text().split() == [f"a/{n}" for n in (0, 1, 2, 6, 7, 8)]
    for reason in left_out:
        assert f"left out 1: {reason}" in told
    assert "6 of 10 items x 32 float32" in told


def test_the_posters(models, tmp_path):
    """The real posters through the command; some rows against the processor's own preparation."""
    if not (SHARED / "ml1m-posters").is_dir():
        pytest.skip("the real data are not beside the checkout")
    from transformers import ViTImageProcessorPil, ViTModel

    folder = tmp_path / "ml1m-action"
    folder.mkdir()
    (folder / "ml1m-action.item").write_bytes((SHARED / "ml1m-action" / "ml1m-action.item").read_bytes())
    feature = encode(folder, "image", model=models["vit"], images=SHARED / "ml1m-posters").feature
    posters = {path.stem for path in (SHARED / "ml1m-posters").glob("*.jpg")}
    items = [line.split("\t")[0] for line in
             (folder / "ml1m-action.item").read_text(encoding="utf-8").splitlines()[1:]]
    assert list(feature.tokens) == [item for item in items if item in posters]
    assert feature.manifest["left_out"]["no image"]["count"] == len(items) - len(feature.tokens) > 0
    processor = ViTImageProcessorPil.from_pretrained(models["vit"])
    model = ViTModel.from_pretrained(models["vit"]).eval()
    for row in (0, 100, len(feature.tokens) - 1):
        picture = open_image(SHARED / "ml1m-posters" / f"{feature.tokens[row]}.jpg")
        with torch.no_grad():
            output = model(processor(images=picture, return_tensors="pt")["pixel_values"])
        np.testing.assert_allclose(feature.matrix[row], output.last_hidden_state[0, 0], atol=2e-6)
