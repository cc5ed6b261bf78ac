"""The command: what it makes, records, prints and refuses; users and their splits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_inputs import by_hand, reviews, split_file, write_reviews
from tiny_models import SENTENCES, WORDS, sentences, tiny_bert, tiny_clip, tiny_llama, write_items

from dataset_prep import cli
from dataset_prep.encode import encode
from dataset_prep.prompt import PROMPTS
from recbole_mmdiff.data.features import FeatureFile
from recbole_mmdiff.errors import ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"bert": tiny_bert(folder / "bert"), "llama": tiny_llama(folder / "llama", positions=512),
            "clip": tiny_clip(folder / "clip")}


def command(*words):
    cli.main(["encode", *map(str, words)])


def test_the_command_and_its_record(models, tmp_path, capsys):
    folder = write_items(tmp_path / "toy", [(f"i{n}", text, "") for n, text in enumerate(SENTENCES)]
                         + [("none", "", "")])
    words = ("--data", folder, "--encoder", "text", "--model", models["bert"], "--fields",
             "title,description", "--modality", "words", "--store", "float16", "--max-length", "9",
             "--normalize", "--pooling", "cls")
    command(*words)
    told = capsys.readouterr().out
    assert f"{folder / 'toy.words.npy'}: 12 of 13 items x 32 float16" in told
    assert "left out 1: no text (first: none)" in told
    assert f"cut to the encoder's maximum length: {sum(len(s.split()) > 7 for s in SENTENCES)}" in told
    assert "encoded 13 in " in told and "a second" in told
    manifest = json.loads((folder / "toy.words.json").read_text())
    for key, value in {"encoder": "text", "model": "bert", "compute_dtype": "float32", "pooling": "cls",
                       "max_length": 9, "entity": "item", "fields": ["title", "description"],
                       "separator": ". ", "normalize": True, "inputs": 13, "rows": 12, "dim": 32,
                       "torch": torch.__version__, "transformers": transformers.__version__}.items():
        assert manifest[key] == value, key
    assert len(manifest["model_sha256"]) == len(manifest["inputs_sha256"]) == 64
    assert str(tmp_path) not in json.dumps(manifest)
    command(*words)
    assert "it was finished already" in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    command(*words, "--restart")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def pictured(folder):
    """The sentences, and images of all but one item."""
    (sentences(folder) / "images").mkdir()
    for n in range(1, 12):
        Image.new("RGB", (40, 30), (20 * n, 255 - 20 * n, 90)).save(folder / "images" / f"i{n}.png")
    return folder


def test_both_sides_of_clip_by_one_command(models, tmp_path, capsys):
    folder = pictured(tmp_path / "toy")
    command("--data", folder, "--encoder", "clip", "--model", models["clip"], "--fields", "title", "--images",
            folder / "images", "--store", "float16", "--modality", "M")
    told = capsys.readouterr().out
    assert "toy.M-text.npy: 12 of 12 items x 24" in told and "toy.M-image.npy: 11 of 12 items x 24" in told
    text, image = (FeatureFile.open(folder, "toy", f"M-{side}") for side in ("text", "image"))
    for feature, side, options in ((text, "clip-text", {"fields": ["title"]}), (image, "clip-image", {})):
        alone = encode(folder, side, model=models["clip"], store="float16", **options).feature
        np.testing.assert_array_equal(feature.matrix, alone.matrix)
        assert {**feature.manifest, "modality": ""} == {**alone.manifest, "modality": ""}
    assert text.manifest["fields"] == ["title"]
    assert not {"fields", "separator", "max_characters"} & set(image.manifest)
    with pytest.raises(DataError, match=r"'clip-text' exists, .*fields was \['title'\] and is"):
        command("--data", folder, "--encoder", "clip", "--model", models["clip"])


@pytest.mark.parametrize("words, message", [
    (["--entity", "user"], "--entity user: clip reads images"),
    (["--split", "x"], "--split: has no meaning for items"),
    (["--pooling", "mean"], "--pooling: the encoder 'clip-text' has no such option"),
])
def test_options_that_do_not_fit_clip(models, tmp_path, words, message):
    folder = pictured(tmp_path / "toy")
    with pytest.raises(ConfigError, match=message):
        command("--data", folder, "--encoder", "clip", "--model", models["clip"], *words)
    assert not list(folder.glob("*.npy"))


def test_a_link_has_a_name_of_its_own(tmp_path):
    folder, link = sentences(tmp_path / "v2"), tmp_path / "toy"
    (folder / "v2.item").rename(folder / "toy.item")
    link.symlink_to(folder)
    assert encode(link, "lsa", dim=2).feature.path == link / "toy.lsa.npy"
    other, second = sentences(tmp_path / "v3"), tmp_path / "more"
    (other / "v3.item").rename(other / "more.item")
    second.symlink_to(other)
    joint = encode(link, "lsa", dim=2, fit_on=[second], modality="joint").feature
    assert sorted(joint.manifest["fitted_on"]) == ["more", "toy"]
    with pytest.raises(DataError, match="--fit-on: there is no folder"):
        encode(link, "lsa", dim=2, fit_on=[tmp_path / "none"])


def test_another_model_in_the_same_folder_is_noticed(models, tmp_path):
    model = shutil.copytree(models["bert"], tmp_path / "bert")
    folder = sentences(tmp_path / "toy")
    assert encode(folder, "text", model=model).inputs == 12
    assert encode(folder, "text", model=models["bert"]).inputs == 0    # the same files elsewhere
    config = model / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(DataError, match="--restart"):
        encode(folder, "text", model=model)


def test_the_numbers_of_computation(models, tmp_path):
    folder = sentences(tmp_path / "toy")
    exact = encode(folder, "text", model=models["bert"]).feature
    rough = encode(folder, "text", model=models["bert"], dtype="bfloat16", modality="rough").feature
    assert rough.matrix.dtype == np.float32 and rough.manifest["compute_dtype"] == "bfloat16"
    difference = np.abs(rough.matrix - exact.matrix).max()
    assert 0 < difference < 0.1
    with pytest.raises(ConfigError, match="--dtype: 'half' is not known"):
        encode(folder, "text", model=models["bert"], dtype="half")
    with pytest.raises(ConfigError, match="--device: 'tpu9' cannot be used"):
        encode(folder, "text", model=models["bert"], device="tpu9")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_vectors(models, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    folder = sentences(tmp_path / "toy")
    for name, model, entity in (("text", "bert", None), ("llm", "llama", "item")):
        exact = encode(folder, name, model=models[model], entity=entity, device="cpu").feature.matrix
        same = encode(folder, name, model=models[model], entity=entity, dtype="float32", modality="a").feature
        half = encode(folder, name, model=models[model], entity=entity, modality="b").feature
        np.testing.assert_allclose(same.matrix, exact, atol=1e-3)
        np.testing.assert_allclose(half.matrix, exact, atol=0.1)
        assert half.manifest["compute_dtype"] in ("bfloat16", "float16")


@pytest.mark.parametrize("options, message", [
    ({"encoder": "txt"}, "--encoder: 'txt' is not known.*did you mean 'text'"),
    ({"encoder": "text"}, "--model: the encoder 'text' needs it"),
    ({"encoder": "lsa", "model": "x"}, "--model: the encoder 'lsa' has no such option"),
    ({"encoder": "lsa", "entity": "users"}, "--entity: 'users' is not known"),
    ({"encoder": "lsa", "reviews_per_user": 3}, "--reviews-per-user: has no meaning for items"),
    ({"encoder": "lsa", "split": "x", "domain": "target"}, "--split: has no meaning for items"),
    ({"encoder": "lsa", "shard_size": 0}, "--shard-size: 0 must be at least 1"),
    ({"encoder": "lsa", "batch_tokens": -1}, "--batch-tokens: -1 must be at least 1"),
    ({"encoder": "text", "model": "x", "fit_on": ["y"]}, "--fit-on: this encoder is not fitted"),
])
def test_options_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        encode(sentences(tmp_path / "toy"), **options)


def test_a_missing_folder_and_a_bad_modality(tmp_path):
    with pytest.raises(DataError, match="--data: there is no folder"):
        encode(tmp_path / "none", "lsa")
    with pytest.raises(DataError, match="modality 'a/b' is not a usable name"):
        encode(sentences(tmp_path / "toy"), "lsa", modality="a/b", dim=2)


def test_help_needs_no_heavy_package():
    script = ("import sys; from dataset_prep.cli import main\ntry: main(['encode', '--help'])\n"
              "except SystemExit: pass\n"
              "heavy = {'torch', 'transformers', 'polars', 'sklearn', 'PIL', 'pandas'} & set(sys.modules)\n"
              "sys.exit(f'imported {heavy}' if heavy else 0)")
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--fit-on" in done.stdout


def test_no_code_of_a_model_is_run_unasked(models, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({
        "model_type": "nothing_known", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Config: pass\n")
    folder = sentences(tmp_path / "toy")
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images" / "i0.png")
    for name in ("text", "llm", "clip-text", "clip-image", "image", "mllm"):
        with pytest.raises(DataError, match="cannot be loaded"):
            encode(folder, name, model=model, entity="item")
    assert not (tmp_path / "ran").exists()


# Users


def test_users_through_a_language_model(models, tmp_path):
    """The default prompt, a split, and one user at a time by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = reviews(users=12)
    held_out = {row[:2] for row in rows if row[0] in ("u03", "u07")}
    split = split_file(tmp_path / "split.npz", sorted(held_out))
    folder = write_reviews(tmp_path / "toy", rows)
    command("--data", folder, "--encoder", "llm", "--model", models["llama"], "--split", split,
            "--domain", "target", "--reviews-per-user", "2")
    feature = FeatureFile.open(folder, "toy", "llm")
    texts = {user: text for user, text in by_hand(rows, 2, 1000, held_out).items() if text}
    assert feature.tokens == tuple(texts) and not {"u03", "u07"} & set(texts)
    template = (PROMPTS / "user.txt").read_text(encoding="utf-8").strip()
    assert feature.manifest["prompt"] == template and feature.manifest["entity"] == "user"
    assert feature.manifest["domain"] == "target" and feature.manifest["reviews_held_out"] == len(held_out)
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    model = AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    for row, text in zip(feature.matrix, texts.values(), strict=True):
        ids = torch.tensor([tokenizer(template.replace("{reviews}", text))["input_ids"]])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        np.testing.assert_allclose(row, ((states[1] + states[-1]) / 2)[0].mean(0), atol=1e-5)


def test_what_users_are_told_about_splits(tmp_path, capsys):
    rows = varied(reviews(), 0)
    folder = write_reviews(tmp_path / "toy", rows)
    words = ("--data", folder, "--encoder", "lsa", "--dim", "3", "--entity", "user")
    command(*words, "--fit-on", write_reviews(tmp_path / "other", rows))
    assert capsys.readouterr().out.count("do not use them for a domain that is validated or tested") == 1
    for name, pairs in (("all", [rows[0][:2], rows[9][:2]]), ("some", [rows[0][:2], ("u00", "unseen")])):
        split = split_file(tmp_path / name, pairs)
        command(*words, "--split", split, "--domain", "target", "--modality", name)
        told = capsys.readouterr().out
        assert "do not use" not in told
        assert ("--split: 1 of the 2 interactions held out have a review here" in told) == (name == "some")
        assert FeatureFile.open(folder, "toy", name).manifest["held_out_pairs"] == 2


def varied(rows, seed):
    draw = np.random.default_rng(seed)
    return [(*row[:4], " ".join(draw.choice(WORDS, size=6))) for row in rows]


def test_held_out_reviews_reach_no_vector_of_a_fitted_encoder(tmp_path):
    """Replace what the reviews held out say, in both domains: no bit changes."""
    target, source = varied(reviews(0), 0), varied(reviews(1), 1)
    held_out = {row[:2] for row in target if row[0] < "u08"}, {row[:2] for row in source[::5]}
    split = split_file(tmp_path / "split.npz", *map(sorted, held_out))
    matrices = []
    for secret in ("one secret", "another mystery"):
        folders = []
        for name, rows, out in (("target", target, held_out[0]), ("source", source, held_out[1])):
            told = [(*row[:4], secret) if row[:2] in out else row for row in rows]
            folders.append(write_reviews(tmp_path / secret / name, told))
        feature = encode(folders[0], "lsa", entity="user", dim=5, split=split, domain="target",
                         fit_on=[folders[1]]).feature
        matrices.append(feature.matrix.tobytes())
        assert feature.tokens == tuple(sorted({row[0] for row in target if row[0] >= "u08"}))
    assert matrices[0] == matrices[1]
    leaking = encode(folders[0], "lsa", entity="user", dim=5, fit_on=[folders[1]], modality="leak").feature
    assert leaking.tokens != feature.tokens


def torchrun(*words):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
         "recbole_mmdiff.cli", "prepare", "encode", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.slow
def test_torchrun_of_both_sides(models, tmp_path):
    folder = pictured(tmp_path / "toy")
    done = torchrun("--data", folder, "--encoder", "clip", "--model", models["clip"], "--shard-size", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 12 items") == 2
    for side in ("clip-text", "clip-image"):
        alone = encode(folder, side, model=models["clip"], modality=f"{side}-alone", shard_size=3).feature
        np.testing.assert_array_equal(FeatureFile.open(folder, "toy", side).matrix, alone.matrix)


@pytest.mark.slow
def test_torchrun(models, tmp_path):
    folder, alone = (write_items(tmp_path / name / "toy", [(f"i{n}", f"{SENTENCES[n % 12]} cat", "")
                                                           for n in range(60)]) for name in ("a", "b"))
    options = ["--encoder", "text", "--model", str(models["bert"]), "--shard-size", "7"]
    done = torchrun("--data", folder, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("60 of 60 items") == 1
    command("--data", alone, *options)
    one, two = (FeatureFile.open(path, "toy", "text") for path in (alone, folder))
    np.testing.assert_array_equal(one.matrix, two.matrix)
    assert one.manifest == two.manifest


def test_a_repository_of_the_hub_is_recorded_with_its_commit(models, tmp_path):
    """Offline, out of a cache as the Hub's client lays it out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--tiny-bert"
    shutil.copytree(models["bert"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    folder = sentences(tmp_path / "toy")
    done = subprocess.run(
        [sys.executable, "-m", "recbole_mmdiff.cli", "prepare", "encode", "--data", str(folder),
         "--encoder", "text", "--model", "someone/tiny-bert"], cwd=REPOSITORY, text=True, capture_output=True,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "toy.text.json").read_text())
    assert (manifest["model"], manifest["revision"]) == ("someone/tiny-bert", commit)
    local = encode(folder, "text", model=models["bert"], modality="local").feature
    np.testing.assert_array_equal(FeatureFile.open(folder, "toy", "text").matrix, local.matrix)
