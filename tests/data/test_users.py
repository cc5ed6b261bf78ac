"""Linking users, unlinking them, and the id space of both domains."""

import numpy as np
import pytest

from recbole_mmdiff.data.users import UserVocabulary, keep_links, link_users
from recbole_mmdiff.errors import ConfigError, DataError

SOURCE = np.array(["a", "b", "c", "d"])
TARGET = np.array(["b", "c", "d", "e"])


@pytest.fixture
def link_file(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "links.tsv"
        path.write_bytes(text.encode(encoding))
        return str(path)

    return write


def test_equal_tokens_are_linked():
    assert link_users(SOURCE, TARGET, None).tolist() == [["b", "b"], ["c", "c"], ["d", "d"]]


def test_nobody_in_both_domains():
    with pytest.raises(DataError, match=r"no user is in both.*'a'.*'x'.*user_link_file_path"):
        link_users(np.array(["a"]), np.array(["x"]), None)


def test_a_link_file_is_sorted_by_target_token_and_links_nobody_else(link_file):
    path = link_file("source\ttarget\nc\te\na\tb\n")
    assert link_users(SOURCE, TARGET, path).tolist() == [["a", "b"], ["c", "e"]]


def test_a_link_file_with_windows_lines_and_no_last_newline(link_file):
    path = link_file("source\ttarget\r\nc\te\r\na\tb")
    assert link_users(SOURCE, TARGET, path).tolist() == [["a", "b"], ["c", "e"]]


@pytest.mark.parametrize(("text", "message"), [
    ("s\tt\na\tb\nq\tc\n", "line 3: the user 'q' is not in the source domain"),
    ("s\tt\na\tq\n", "line 2: the user 'q' is not in the target domain"),
    ("s\tt\na\tb\na\tc\n", "line 3: the source user 'a' is linked a second time"),
    ("s\tt\na\tb\nc\tb\n", "line 3: the target user 'b' is linked a second time"),
    ("s\tt\na b\n", "line 2: 'a b' is not 'source user<tab>target user'"),
    ("s\tt\na\tb\tc\n", "line 2: .* is not 'source user<tab>target user'"),
    ("s\tt\n", "holds no links"),
    ("", "holds no links"),
    ("a\tb\nc\te\n", "line 1: .*header"),
])
def test_faults_of_a_link_file_are_named(link_file, text, message):
    with pytest.raises(DataError, match=rf"links\.tsv.*{message}"):
        link_users(SOURCE, TARGET, link_file(text))


def test_a_link_file_that_is_missing_or_not_utf8(link_file, tmp_path):
    with pytest.raises(DataError, match=r"user_link_file_path: .*none\.tsv cannot be read"):
        link_users(SOURCE, TARGET, str(tmp_path / "none.tsv"))
    with pytest.raises(DataError, match=r"links\.tsv.*UTF-8"):
        link_users(SOURCE, TARGET, link_file("s\tt\na\tbé\n", "latin-1"))


def many_links(count=101):
    return np.array([[f"s{n:03}", f"t{n:03}"] for n in range(count)])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 1.0])
def test_unlinking_keeps_a_rounded_share_and_no_row_goes(ratio):
    links, source_goes, target_goes = keep_links(many_links(), ratio, "unlink", 3)
    assert len(links) == round(ratio * 101)
    assert len(source_goes) == len(target_goes) == 0
    assert set(map(tuple, links)) <= set(map(tuple, many_links()))


def test_splitting_takes_one_domain_from_each_unlinked_user():
    links, source_goes, target_goes = keep_links(many_links(), 0.4, "split", 3)
    lost = set(map(tuple, many_links())) - set(map(tuple, links))
    assert len(lost) == len(source_goes) + len(target_goes) == 101 - 40
    assert abs(len(source_goes) - len(target_goes)) <= 1
    for source, target in lost:
        assert (source in source_goes) != (target in target_goes)


def test_fewer_links_are_part_of_more_and_follow_the_seed():
    kept = {ratio: set(map(tuple, keep_links(many_links(), ratio, "unlink", 3)[0]))
            for ratio in (0.2, 0.5, 0.9)}
    assert kept[0.2] < kept[0.5] < kept[0.9]
    assert kept[0.5] != set(map(tuple, keep_links(many_links(), 0.5, "unlink", 4)[0]))


@pytest.mark.parametrize(("ratio", "mode", "error", "message"), [
    (0, "unlink", DataError, "overlap_ratio: 0 must be above 0"),
    (1.5, "unlink", DataError, "overlap_ratio: 1.5 must be above 0 and at most 1"),
    (0.001, "unlink", DataError, "overlap_ratio: 0.001 of 101 links keeps no user"),
    (0.5, "splt", ConfigError, "overlap_mode: 'splt'.*did you mean 'split'"),
])
def test_overlap_keys_that_cannot_be_used(ratio, mode, error, message):
    with pytest.raises(error, match=message):
        keep_links(many_links(), ratio, mode, 0)


def test_ids_follow_overlap_target_only_source_only():
    links = np.array([["c", "b"], ["a", "d"]])
    vocabulary = UserVocabulary.build(SOURCE, TARGET, links)
    assert vocabulary.num_overlap == 2
    assert vocabulary.target.tolist() == ["[PAD]", "b", "d", "c", "e"]
    assert vocabulary.source.tolist() == ["[PAD]", "c", "a", "", "", "b", "d"]
