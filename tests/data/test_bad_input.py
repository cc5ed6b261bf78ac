"""Mistakes of users at the command line: one clear line, exit status 2, and nothing left behind."""

import os

import pytest

from recbole_mmdiff.cli import main
from recbole_mmdiff.errors import ConfigError, DataError


@pytest.fixture
def pair(tiny_pair, atomic, tmp_path, monkeypatch):
    """A pair of its own that a test may spoil, in an otherwise empty working folder."""

    class Pair:
        folder, rows = tmp_path / "data", tiny_pair.target_rows
        source_rows = tiny_pair.source_rows
        source, target = folder / "src" / "src.inter", folder / "tgt" / "tgt.inter"

        def write(self, rows=None, source_rows=None, header=atomic.header):
            atomic.write(self.folder, "src", self.source_rows if source_rows is None
                         else source_rows)
            atomic.write(self.folder, "tgt", self.rows if rows is None else rows, header)

    pair = Pair()
    pair.write()
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return pair


@pytest.fixture
def run_words(pair, capsys, tmp_path):
    """Run the command line; returns (status, standard error)."""

    def run(*words, model="MF", domains=True):
        base = [f"--data_path={pair.folder}", "--epochs=1", "--use_gpu=False",
                "--log_tensorboard=False", "--show_progress=False",
                f"--checkpoint_dir={tmp_path / 'saved'}"]
        base += ["--source_domain.dataset=src", "--target_domain.dataset=tgt"] if domains else []
        given = {word.split("=")[0] for word in words}
        base = [word for word in base if word.split("=")[0] not in given]
        status = main([f"--model={model}", f"--output={tmp_path / 'run'}", *base, *words])
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def refused(run_words, tmp_path):
    """Run, check that it is refused cleanly, and return the one line of the error."""

    def run(*words, **options):
        status, text = run_words(*words, **options)
        assert status == 2, text
        assert "Traceback" not in text
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert not (tmp_path / "run").exists()
        assert os.listdir() == []
        return text[text.index("error: "):]

    return run


def test_both_kinds_of_error_are_value_errors():
    assert issubclass(ConfigError, ValueError) and issubclass(DataError, ValueError)


def test_the_fixture_is_a_run_that_succeeds(run_words, tmp_path):
    status, text = run_words()
    assert status == 0, text
    assert (tmp_path / "run" / "metrics.json").is_file()


# ---- data ---------------------------------------------------------------------------------------


def test_no_overlapping_user(refused, pair):
    pair.write(source_rows=[(f"x{row[0]}", *row[1:]) for row in pair.source_rows])
    text = refused()
    assert "no user is in both domains" in text and "user_link_file_path" in text
    assert "np.str_" not in text


def test_a_missing_folder(refused):
    text = refused("--target_domain.dataset=absent")
    assert "'absent'" in text and "there is no folder" in text and "data_path" in text


def test_a_missing_file(refused, pair):
    pair.target.unlink()
    text = refused()
    assert str(pair.target) in text and "there is no file" in text


def spoil(pair, change):
    """Apply ``change`` to the list of lines of the target file."""
    lines = pair.target.read_text().splitlines()
    change(lines)
    pair.target.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("line", "make", "expected"), [
    (1, lambda cells: ["user_id", *cells[1:]], "'user_id' is not 'name:type'"),
    (9, lambda cells: cells[:3], "has 3 fields, the header has 4"),
    (9, lambda cells: [*cells, "x"], "has 5 fields, the header has 4"),
    (7, lambda cells: [*cells[:2], "five", cells[3]], "rating is 'five', which is not a number"),
    (7, lambda cells: [*cells[:2], "", cells[3]], "rating is empty"),
    (7, lambda cells: [*cells[:2], "inf", cells[3]], "rating is inf"),
    (7, lambda cells: [*cells[:2], "nan", cells[3]], "rating is 'nan', which is not a number"),
    (4, lambda cells: ["", *cells[1:]], "user_id is empty"),
    (4, lambda cells: [*cells[:3], "yesterday"], "timestamp is 'yesterday'"),
])
def test_a_faulty_line_is_named(refused, pair, line, make, expected):
    def change(lines):
        lines[line - 1] = "\t".join(make(lines[line - 1].split("\t")))

    spoil(pair, change)
    assert f"{pair.target}, line {line}: {expected}" in " ".join(refused().split("\n")) \
        or f"{pair.target}, line {line}: the header field {expected}" in refused()


def test_a_duplicate_interaction_and_its_remedy(refused, run_words, pair):
    pair.write(rows=[*pair.rows, (*pair.rows[3][:2], "1", "2000000")])
    text = refused()
    user, item = pair.rows[3][:2]
    assert f"tgt.inter, line {len(pair.rows) + 2}: user '{user}' and item '{item}'" in text
    assert "rm_dup_inter" in text
    status, text = run_words("--rm_dup_inter=last")
    assert status == 0, text


def test_removing_duplicates_keeps_the_last_in_time(pair, tiny_config):
    from recbole_mmdiff.config import Config
    from recbole_mmdiff.data.cross_domain import CrossDomainDataset

    user, item = pair.rows[3][:2]
    pair.write(rows=[(user, item, "1", "2000000"), *pair.rows])
    config = Config(config_dict=tiny_config("MF", data_path=pair.folder, rm_dup_inter="last"))
    dataset = CrossDomainDataset(config)
    inter = dataset.inter_feat
    row = inter[(inter["user_id"] == dataset.token2id("user_id", user))
                & (inter["item_id"] == dataset.token2id("item_id", item))]
    assert len(row) == 1 and row["rating"].item() == 1


@pytest.mark.parametrize(("lines", "expected"), [
    (["s\tt", "u000\tstranger"], "line 2: the user 'stranger' is not in the target domain"),
    (["s\tt", "{a}\t{a}", "{a}\t{b}"], "line 3: the source user '{a}' is linked a second time"),
    (["{a}\t{a}", "{b}\t{b}"], "line 1: '{a}\\t{a}' is a link, but the first line is the header"),
])
def test_faults_of_the_link_file(refused, pair, tiny_pair, tmp_path, lines, expected):
    names = {"a": tiny_pair.overlap[0], "b": tiny_pair.overlap[1]}
    lines = [line.format(**names).replace("u000", names["a"]) for line in lines]
    (tmp_path / "links.tsv").write_text("\n".join(lines))
    assert expected.format(**names) in refused(f"--user_link_file_path={tmp_path / 'links.tsv'}")


@pytest.mark.parametrize(("words", "expected"), [
    (["--test_user_ratio=0.001"], "test_user_ratio: 0.001 of 60 is 0"),
    (["--test_user_ratio=1.5"], "test_user_ratio: 1.5 must lie between 0 and 1"),
    (["--valid_user_ratio=0.001"], "valid_user_ratio: 0.001 of 48 is 0"),
    (["--split_protocol=cold_start_items", "--test_item_ratio=0.001"], "test_item_ratio: 0.001"),
    (["--split_protocol=ratio", "--eval_args.split={RS: [1.0, 0.0, 0.0]}"], "eval_args.split"),
    (["--split_protocol=ratio", "--eval_args.split={RS: [0.8, 0.2]}"], "eval_args.split"),
    (["--split_protocol=ratio", "--eval_args.split={XX: 1}"], "eval_args"),
    (["--split_protocol=ratio", "--eval_args.order=XX"], "eval_args"),
    (["--overlap_ratio=0.001"], "overlap_ratio: 0.001 of 60 links keeps no user"),
    (["--overlap_mode=cut"], "overlap_mode: 'cut' is not known"),
    (["--split_protocol=cold_start_user"], "did you mean 'cold_start_users'"),
    (["--domain_view=both"], "domain_view: 'both'"),
    (["--split_file=none.npz"], "split_file: there is no file"),
    (["--encoding=klingon"], "klingon"),
])
def test_keys_that_the_data_cannot_meet(refused, words, expected):
    assert expected in refused(*words)


@pytest.mark.parametrize(("header", "rows", "expected"), [
    ("user_id:token\tage:token", ["u000\t3"], None),
    ("id:token\tage:token", ["u000\t3"], "tgt.user: the column 'user_id' is not loaded"),
    ("user_id:token\tage:float_seq", ["u000\t3 4", "u001\t3 x4"], "tgt.user, line 3: age: could not convert"),
])
def test_faults_of_a_file_of_users(refused, run_words, pair, header, rows, expected):
    (pair.target.parent / "tgt.user").write_text("\n".join([header, *rows]) + "\n")
    words = ["--target_domain.load_col={inter: [user_id, item_id, rating, timestamp], user: [user_id, age]}",
             "--target_domain.filter_inter_by_user_or_item=False"]
    if expected is None:
        status, text = run_words(*words)
        assert status == 0, text
    else:
        assert expected in refused(*words)


def test_a_file_that_is_not_utf8(refused, run_words, pair):
    text = pair.target.read_text().replace(pair.rows[0][1], "café")
    pair.target.write_bytes(text.encode("latin-1"))
    error = refused()
    assert "tgt.inter: is not utf-8 text" in error and "encoding" in error
    status, error = run_words("--encoding=latin-1")
    assert status == 0, error


def test_windows_line_ends_work(run_words, pair):
    for path in (pair.source, pair.target):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    status, text = run_words()
    assert status == 0, text


def test_words_that_pandas_takes_for_missing_are_tokens(pair, tiny_config):
    from recbole_mmdiff.config import Config
    from recbole_mmdiff.data.cross_domain import CrossDomainDataset

    words = ["NA", "null", "NaN", "None", "nan", "N/A", "#N/A", "-nan", "1.0", "001"]
    users = dict(zip(sorted({row[0] for row in pair.rows})[::8], words, strict=True))
    items = dict(zip(sorted({row[1] for row in pair.rows})[::5], words, strict=True))
    for part in ("rows", "source_rows"):
        renamed = [(users.get(row[0], row[0]), items.get(row[1], row[1]), *row[2:])
                   for row in getattr(pair, part)]
        setattr(pair, part, renamed)
    pair.write()
    titles = {item: f"film {item}" for item in {row[1] for row in pair.rows}}
    titles |= {"NA": '"quoted" title', "null": "it's \"half", "nan": "null"}
    (pair.folder / "tgt" / "tgt.item").write_text("item_id:token\ttitle:token\n" + "".join(
        f"{item}\t{title}\n" for item, title in titles.items()))
    config = tiny_config("MF", data_path=pair.folder)
    config["target_domain"] = {"dataset": "tgt", "load_col": {
        "inter": ["user_id", "item_id", "rating", "timestamp"], "item": ["item_id", "title"]}}
    dataset = CrossDomainDataset(Config(config_dict=config))
    assert set(words) <= set(dataset.field2id_token["user_id"])
    assert set(words) <= set(dataset.field2id_token["item_id"])
    for token, title in titles.items():
        place = dataset.token2id("item_id", token)
        assert dataset.field2id_token["title"][dataset.item_feat["title"][place]] == title


# ---- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "expected"), [
    (["--embedding_sice=8"], "the key 'embedding_sice' is unknown to MF; did you mean "
                             "'embedding_size'?"),
    (["--source_domain.load_cols=x"], "source_domain: the key 'load_cols' is unknown to MF; did "
                                      "you mean 'load_col'?"),
    (["--eval_args.modes=full"], "eval_args: the key 'modes' is unknown to MF; did you mean 'mode'"),
    (["--train_neg_sample_args.number=2"], "train_neg_sample_args: the key 'number' is unknown"),
    (["--embedding_size=wide"], "embedding_size: 'wide' is a str, expected int (default: 16)"),
    (["--embedding_size=8.5"], "embedding_size: 8.5 is a float, expected int"),
    (["--embedding_size=True"], "embedding_size: True is a bool, expected int"),
    (["--biases=3"], "biases: 3 is a int, expected bool"),
    (["--learning_rate=fast"], "learning_rate: 'fast' is a str, expected float or int"),
    (["--epochs", "--seed=3"], "--epochs has no value, write --epochs=value"),
    (["--seed"], "--seed has no value"),
    (["--seed=1", "--seed=2"], "--seed is given twice, '1' and '2'"),
    (["stray"], "'stray' is not of the form --key=value"),
    (["--"], "'--' is not of the form --key=value"),
    (["--topk=-5"], "topk"),
    (["--topk=many"], "topk"),
    (["--metrics=[NDGC]"], "metrics: 'NDGC' is no metric of RecBole's"),
    (["--metrics=5"], "metrics: 5"),
    (["--rating_metrics=[NDCG]"], "rating_metrics: 'NDCG'"),
    (["--rating_metrics=[MSE]"], "rating_metrics: 'MSE'"),
    (["--eval_passes=[ranking]"], "eval_passes: 'ranking' is not known"),
    (["--valid_metric=NDGC@10"], "valid_metric: 'NDGC@10'"),
    (["--valid_metric=NDCG@ten"], "valid_metric: 'NDCG@ten'"),
    (["--valid_metric=NDCG"], "valid_metric: 'NDCG'"),
    (["--valid_metric=rating.NDCG@10"], "valid_metric: 'rating.NDCG@10'"),
    (["--valid_metric=ranking_labeled.Hit@10"], "valid_metric: 'ranking_labeled.Hit@10'"),
    (["--labeled_gain=square"], "labeled_gain: 'square' is not known"),
    (["--source_domain=src"], "source_domain: needs a mapping with the key 'dataset', not 'src'"),
    (["--load_col=3"], "load_col: 3 names no columns"),
    (["--load_col.inter=3"], "load_col: {'inter': 3} names no columns"),
    (["--load_col.item=[1]"], "names no columns"),
    (["--source_domain.load_col={item: [item_id]}"], "source_domain: load_col: {'item': ['item_id']} "),
    (["--discretization=[a]"], "discretization: ['a'] is a list, expected dict"),
    (["--eval_passes=True"], "eval_passes: True is a bool, expected str or list"),
    (["--eval_args=RO"], "eval_args: 'RO' is a str, expected dict"),
    (["--topk={1}"], "topk: {1: None} is no length of a ranking"),
    (["--learner=null"], "learner: has no value (default: 'adam')"),
    (["--train_neg_sample_args.distribution=[a]"],
     "RecBole refuses the configuration: The distribution [['a']] of train_neg_sample_args should in "
     "['uniform', 'popularity'] (set in: command line)"),
    (["--transform=mask"], "transform: There is no transform named 'mask'"),
    ([f"--dataset={'x' * 300}"], "is no name of a folder"),
    (["--source_domain=5"], "source_domain: needs a mapping with the key 'dataset', not 5"),
    (["--config=none.yaml"], "--config: there is no file none.yaml"),
    (["--worker=-1"], "worker: -1 is too small, use 0 or more"),
])
def test_keys_and_values_that_are_refused(refused, words, expected):
    assert expected in refused(*words)


@pytest.mark.parametrize(("name", "expected"), [
    ("DifCDR", "there is no model 'DifCDR'; did you mean 'DiffCDR'?"),
    ("lightgcn", "there is no model 'lightgcn'; did you mean 'LightGCN'?"),
    ("zzz", "there is no model 'zzz'"),
])
def test_unknown_models(refused, name, expected):
    assert expected in refused(model=name)


def test_no_model(capsys):
    assert main(["--epochs=1"]) == 2
    assert "--model=NAME" in capsys.readouterr().err


def test_an_unknown_command(capsys):
    assert main(["train", "--model=MF"]) == 2
    assert "'train' is no command" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "expected"), [
    (b"epochs: [1\n", "bad.yaml: is not valid YAML"),
    (b"- epochs\n- 3\n", "bad.yaml: must hold 'key: value' lines, not a list"),
    (b"just words\n", "bad.yaml: must hold 'key: value' lines, not a str"),
    (b"epochs: 2014-13-45\n", "bad.yaml: is not valid YAML"),
    ("model: MÜ\n".encode("latin-1"), "bad.yaml: is not UTF-8 text"),
    (b"epochs: !!python/object/apply:os.system ['touch ran']\n", "bad.yaml: is not valid YAML"),
    (b"epoch: 3\n", "bad.yaml: the key 'epoch' is unknown to MF; did you mean 'epochs'?"),
    (b"embedding_size: lots\n", "bad.yaml: embedding_size: 'lots' is a str"),
    (b"embedding_size:\n", "bad.yaml: embedding_size: has no value (default: 16)"),
])
def test_configuration_files_that_are_refused(refused, tmp_path, content, expected):
    (tmp_path / "bad.yaml").write_bytes(content)
    assert expected in refused(f"--config={tmp_path / 'bad.yaml'}")


def test_one_domain_block_only(refused):
    assert "source_domain: is missing" in refused("--target_domain.dataset=tgt", domains=False)
    assert "target_domain: is missing" in refused("--source_domain.dataset=src", domains=False)


def test_a_cross_domain_model_on_one_data_set(refused):
    text = refused("--dataset=tgt", model="EMCDR", domains=False)
    assert "EMCDR transfers between two domains" in text and "ml100k-pair" in text


def test_a_sequential_model_on_two_domains(refused):
    assert "SASRec: sequential models run on one domain" in refused(model="SASRec")


def test_an_output_folder_that_is_in_use(run_words, pair, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    status, text = run_words()
    assert status == 2 and "exists and is not empty; choose another folder" in text and "--resume" not in text
    assert os.listdir(tmp_path / "run") == ["notes.txt"]


def test_values_are_never_run(run_words, tmp_path):
    trap = tmp_path / "ran"
    for key in ("--dataset", "--epochs", "--eval_args.mode", "--topk"):
        run_words(f"""{key}=__import__("os").system("touch {trap}")""")
        run_words(f"""{key}=!!python/object/apply:os.system ["touch {trap}"]""")
    assert not trap.exists()
