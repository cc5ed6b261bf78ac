"""A folder that cannot be written: told before any data are read, in one line."""

import os

import pytest
import yaml
from injecting import closed_folder

from recbole_mmdiff import cli
from recbole_mmdiff.config import Config
from recbole_mmdiff.errors import ConfigError, WriteError
from recbole_mmdiff.quick_start import run
from recbole_mmdiff.run_folder import open_run_folder


@pytest.fixture
def unread(monkeypatch):
    """Data that must not be read."""
    def read(*_):
        raise AssertionError("the data are read")

    monkeypatch.setattr("recbole_mmdiff.quick_start.prepare_data", read)


def test_a_folder_without_rights(tiny_config):
    config = Config(config_dict=tiny_config("MF"))      # Before: the package may lie where rights are needed.
    with closed_folder() as folder:
        for place, message in ((folder / "below" / "run", "Permission denied.*check that its folder"),
                               (folder, "Permission denied")):
            with pytest.raises(WriteError, match=f"cannot be written .*{message}"), \
                    open_run_folder(config, place, None):
                pass
        assert not os.listdir(folder)


def test_a_file_where_a_folder_should_be(tiny_config, unread, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match=r"run: cannot be written \(Not a directory\)"):
        run(config_dict=tiny_config("MF"), output=tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match=r"--output: .*file exists and is not empty"):
        run(config_dict=tiny_config("MF"), output=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine" and os.listdir(tmp_path) == ["file"]


def test_runs_is_a_file(tiny_config, unread, tmp_path, monkeypatch):
    """The folder of runs that are given no name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(WriteError, match=r"^runs.MF-src-tgt-\d+-\d+: cannot be written"):
        run(config_dict=tiny_config("MF"))


def test_what_was_there_stays(tiny_config, tmp_path):
    """A mistake in the data removes what was made for the run, and nothing else."""
    (tmp_path / "mine").mkdir()
    for output, left in ((tmp_path / "mine", ["mine"]), (tmp_path / "new" / "run", ["mine"])):
        with pytest.raises(ValueError, match="overlap"):
            run(config_dict=tiny_config("MF", overlap_ratio=0.001), output=output)
        assert os.listdir(tmp_path) == left and not os.listdir(tmp_path / "mine")


def test_the_command_line_tells_it_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["--model=MF", f"--output={tmp_path / 'file' / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "cannot be written" in error and error.count("\n") == 1


def test_a_store_that_cannot_be_written(tiny_config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    keys = {key: value for key, value in tiny_config("MF").items() if key != "model"}
    comparison = {"name": "small", "models": {"MF": {}}, "seeds": [1], "keys": keys,
                  "tables": {"rating": {"metrics": ["rating.mae"]}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(comparison))
    assert cli.main(["compare", f"--config={tmp_path / 'small.yaml'}", "--no-plots",
                     f"--output={tmp_path / 'file' / 'store'}"]) == 2
    assert "store: cannot be written (Not a directory)" in capsys.readouterr().err
