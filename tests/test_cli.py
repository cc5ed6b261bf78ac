"""The command line: what it takes, what it prints, how it fails."""

import shutil
import subprocess
import sys

import pytest
import yaml
from running import SINGLE, run_keys

from recbole_mmdiff import cli
from recbole_mmdiff.errors import ConfigError


@pytest.fixture
def call(tiny_config, tmp_path, capsys):
    """``call(*words)`` with the tiny configuration: exit code, standard output, error output."""
    file = tmp_path / "tiny.yaml"
    keys = {key: value for key, value in tiny_config("MF").items() if key != "model"}
    file.write_text(yaml.safe_dump(keys), encoding="utf-8")

    def main(*words):
        code = cli.main([*words, "--config", str(file)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return main


def test_run_prints_results_and_folder(call, tmp_path):
    code, out, _ = call("--model=MF", f"--output={tmp_path / 'run'}", "--epochs=1")
    assert code == 0
    assert "MF on src-tgt, test:" in out and "rmse" in out and f"run folder: {tmp_path / 'run'}" in out
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_nested_keys_and_the_last_file_wins(call, tmp_path, tiny_pair):
    shutil.copytree(tiny_pair.folder / "src", tmp_path / "elsewhere" / "src")
    first = tmp_path / "first.yaml"
    first.write_text("epochs: 9\nembedding_size: 3\nvalid_metric: RMSE\n", encoding="utf-8")
    code, _, err = call("run", "--config", str(first), "--model", "MF", "--seed", "5",
                        f"--source_domain.data_path={tmp_path / 'elsewhere'}",
                        f"--output={tmp_path / 'run'}")
    assert code == 0, err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert config["epochs"] == 2, "the file of the fixture stands last"
    assert config["embedding_size"] == 3 and config["seed"] == 5
    assert config["source_domain"]["data_path"] == str(tmp_path / "elsewhere")


def test_check_describes_the_data(call):
    code, out, _ = call("check", "--model=MF")
    assert code == 0 and "overlap" in out.lower()


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("run", "check", "doctor", "--resume"))


@pytest.mark.parametrize(("words", "message"), [
    (["train", "--model=MF"], "'train' is no command"),
    (["--model=DiffCDRR"], "no model 'DiffCDRR'; did you mean 'DiffCDR'"),
    (["--model=MF", "--embeding_size=4"], "'embeding_size' is unknown to MF; did you mean 'embedding_size'"),
    (["--model=MF", "--embedding_size=four"], "embedding_size: 'four' is a str, expected int"),
    (["--model=MF", "--epochs"], "--epochs has no value"),
    (["--model=MF", "epochs=3"], "'epochs=3' is not of the form --key=value"),
    (["--model=MF", "--config=nowhere.yaml"], "there is no file nowhere.yaml"),
    (["--model=MF", "--split_protocol=warmstart"], "did you mean 'warm_start'"),
    (["--model=MF", "--valid_metric=NDGC@5"], "valid_metric"),
    (["--model=MF", "--data_path=nowhere"], "nowhere"),
    (["--model=MF", "--overlap_ratio=0.001"], "overlap_ratio"),
    (["--model=DiffCDR", "--x_T=nose"], "x_T: 'nose' is not known"),
    (["--resume=nowhere"], "no config.yaml in nowhere"),
])
def test_mistakes_are_one_line_and_exit_code_2(call, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_damaged_checkpoint_is_exit_code_2(tiny_config, tmp_path, capsys):
    folder = run_keys(tiny_config("MF"), tmp_path / "run").folder
    (folder / "metrics.json").unlink()
    (folder / "checkpoint.pth").write_bytes(b"PK\x03\x04 cut off")
    capsys.readouterr()
    assert cli.main([f"--resume={folder}"]) == 2
    error = capsys.readouterr().err
    assert "checkpoint.pth: cannot be read" in error and "Traceback" not in error


def test_interrupted(call, monkeypatch):
    def interrupted(**arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("recbole_mmdiff.quick_start.run", interrupted)
    code, _, err = call("--model=MF")
    assert code == 130 and "--resume" in err


def test_words_are_keys_unless_they_are_options():
    options, rest = cli.parse(["--model=MF", "--config", "a.yaml", "--config=b.yaml", "--seed=1"])
    assert (options.command, options.model, options.config) == ("run", "MF", ["a.yaml", "b.yaml"])
    assert rest == ["--seed=1"]
    with pytest.raises(ConfigError):
        cli.parse(["nonsense"])


def test_help_waits_for_neither_torch_nor_recbole():
    code = ("import sys\nfrom recbole_mmdiff.cli import main\n"
            "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
            "assert not {'torch', 'recbole', 'pandas'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_keys_of_recboles_caches_are_named_as_without_effect(tiny_config, tmp_path):
    keys = {**tiny_config("BPR", epochs=1), **SINGLE, "save_dataset": True, "eval_batch_size": 7}
    run_keys(keys, tmp_path / "run")
    log = (tmp_path / "run" / "train.log").read_text()
    assert "save_dataset has no effect" in log and "eval_batch_size has no effect" in log
    assert not list(tmp_path.rglob("*Dataset.pth"))
