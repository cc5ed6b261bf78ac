"""Files of a run folder with flipped bytes or a lost end: told by name, never taken for good."""

import json
import shutil

import numpy as np
import pytest
import torch
from injecting import flipped
from running import run_keys, without_times

from recbole_mmdiff import cli
from recbole_mmdiff.data.keeping import check_kept
from recbole_mmdiff.data.splits import SavedSplit
from recbole_mmdiff.errors import CheckpointError, ConfigError, DataError
from recbole_mmdiff.quick_start import load_run, run
from recbole_mmdiff.report.results import read_table
from recbole_mmdiff.storage import load_plain, save_plain


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    return run_keys(tiny_config("MF", save_per_user=True), tmp_path_factory.mktemp("damaged") / "run")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the run, killed before its results were written."""
    shutil.copytree(finished.folder, tmp_path / "copied")
    (tmp_path / "copied" / "metrics.json").unlink()
    return tmp_path / "copied"


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


CHANGES = {"cut": lambda content: content[:len(content) * 2 // 3], "empty": lambda content: b"",
           "flipped": lambda content: flipped(content, len(content) // 2)}


def outcomes_of_flips(path, read, same, errors):
    """What becomes of reading ``path`` with one of its bytes flipped, for every fifth of them."""
    good = path.read_bytes()
    for place in range(0, len(good), 5):
        path.write_bytes(flipped(good, place))
        try:
            found = read(path)
        except errors as error:
            assert str(path) in str(error)
            yield "told"
        else:
            assert same(found), f"byte {place} is taken for good"
            yield "same"


def test_no_flipped_byte_of_a_checkpoint_is_read(tmp_path):
    """Torch itself reads most of them: it does not look at its checksums."""
    state = {"weights": torch.arange(40.0), "plain": {"epoch": 1, "scores": [1.5]}, "array": np.arange(5)}
    path = tmp_path / "state.pth"
    save_plain(state, path)

    def same(found):
        return torch.equal(found["weights"], state["weights"]) and found["plain"] == state["plain"] \
            and np.array_equal(found["array"], state["array"])

    outcomes = list(outcomes_of_flips(path, load_plain, same, CheckpointError))
    assert outcomes.count("told") > len(outcomes) / 2


def test_no_flipped_byte_of_a_split_is_read(tmp_path):
    names = np.array(["a", "b"])
    split = SavedSplit("ratio", names, names, names, np.array([1, 2]))
    split.save(tmp_path / "split.npz")
    outcomes = list(outcomes_of_flips(tmp_path / "split.npz", SavedSplit.load, split.equals, DataError))
    assert outcomes.count("told") > len(outcomes) / 2


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_checkpoint_is_named_before_data_are_read(copied, monkeypatch, change):
    def read(*_):
        raise AssertionError("the data are read")

    damage(copied / "checkpoint.pth", CHANGES[change])
    with monkeypatch.context() as patch:
        patch.setattr("recbole_mmdiff.quick_start.prepare_data", read)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pth: cannot be read .*anew with --resume"):
            run(resume=copied)


def test_without_its_checkpoint_a_run_starts_anew(finished, copied):
    """As the message says."""
    (copied / "checkpoint.pth").unlink()
    assert without_times(run(resume=copied).metrics) == without_times(finished.metrics)


def test_the_checkpoint_of_a_finished_run(copied, finished):
    shutil.copy(finished.folder / "metrics.json", copied)
    damage(copied / "checkpoint.pth", CHANGES["flipped"])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth: cannot be read"):
        load_run(copied)


def test_a_configuration_that_was_changed_in_between(finished, copied):
    """A digit that flipped gives YAML that is as good as before; the checkpoint knows better."""
    path = copied / "config.yaml"
    path.write_text(path.read_text().replace("seed: 2020", "seed: 2021"))
    assert "seed: 2021" in path.read_text()
    with pytest.raises(ConfigError, match=r"--resume: .*: seed was 2020 and cannot change"):
        run(resume=copied)
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "seed" not in line))
    with pytest.raises(ConfigError, match=r"--resume: .*: seed was 2020 and cannot change"):
        run(resume=copied, overrides={"seed": 2021})
    again = run(resume=copied, overrides={"seed": 2020})
    assert without_times(again.metrics) == without_times(finished.metrics)


@pytest.mark.parametrize(("change", "message"), [
    (lambda content: content[:200] + b"\xff" + content[201:], r"config\.yaml: is not UTF-8 text"),
    (lambda content: b"a: [1\n" + content, r"config\.yaml: is not valid YAML"),
    (lambda content: content.replace(b"\nepochs", b"\nepochz"), "'epochz' is unknown to MF; did you mean"),
    (lambda content: b"", "model")])
def test_a_configuration_that_cannot_be_read(copied, capsys, change, message):
    damage(copied / "config.yaml", change)
    with pytest.raises(ConfigError, match=message):
        run(resume=copied)
    assert cli.main([f"--resume={copied}"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_split(finished, copied, change):
    damage(copied / "split.npz", CHANGES[change])
    with pytest.raises(DataError, match=r"--resume: .*split\.npz is damaged .*remove it if files and keys"):
        run(resume=copied)
    (copied / "split.npz").unlink()
    assert without_times(run(resume=copied).metrics) == without_times(finished.metrics)


@pytest.mark.parametrize("change", ["cut", "empty"])
def test_damaged_results(finished, copied, change):
    """Removed, they are computed again from the checkpoint, as the message says."""
    shutil.copy(finished.folder / "metrics.json", copied)
    damage(copied / "metrics.json", CHANGES[change])
    with pytest.raises(DataError, match=r"metrics\.json: is not JSON .*--resume=.*copied evaluates again"):
        load_run(copied)
    (copied / "metrics.json").unlink()
    assert without_times(run(resume=copied).metrics) == without_times(finished.metrics)


@pytest.mark.parametrize("change", CHANGES)
def test_damaged_values_of_users(copied, change):
    damage(copied / "per_user.npz", CHANGES[change])
    with pytest.raises(DataError, match=r"per_user\.npz cannot be read"):
        read_table(copied / "per_user.npz")


@pytest.mark.parametrize("name", ["target/tgt/tgt.inter", "source/src/src.inter", "kept.json"])
@pytest.mark.parametrize("change", [*CHANGES, "gone", "digit"])
def test_damaged_data(finished, copied, name, change):
    """A rating that became another one, too; without the copy the original data are read."""
    shutil.copy(finished.folder / "metrics.json", copied)
    path = copied / "data" / name
    if change == "gone":
        path.unlink()
    elif change == "digit":
        damage(path, lambda content: content.replace(b"4", b"2", 1))
    else:
        damage(path, CHANGES[change])
    if (name, change) == ("kept.json", "gone"):     # Then the rest is unfinished, and the original is read.
        assert load_run(copied).metrics == json.loads((copied / "metrics.json").read_text())
        return
    if (name, change) == ("kept.json", "flipped"):
        damage(path, lambda content: flipped(content, 0))
    with pytest.raises(DataError, match=r"data.*(is not as the run wrote it|cannot be read).*copy the run"):
        load_run(copied)
    shutil.rmtree(copied / "data")
    assert load_run(copied).metrics["model"] == "MF"


@pytest.mark.parametrize("content", ['{"bytes": 3}', '{"bytes": {}, "sha256": 1.5}', "[" * 10**5])
def test_a_record_of_kept_data_in_another_form(copied, content):
    (copied / "data" / "kept.json").write_text(content)
    with pytest.raises(DataError, match=r"kept\.json: cannot be read .*copy the run again"):
        check_kept(copied)
