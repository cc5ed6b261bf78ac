"""Every preset, from small raw files under their own names to atomic files, against the papers' rules as
plain loops."""

import json
from collections import Counter

import pytest
from amazon_files import dense_category, meta_line, review_line, write_lines, write_preset

from dataset_prep.cli import main
from dataset_prep.editions import EDITIONS
from dataset_prep.presets import PRESETS
from recbole_mmdiff.check import check
from recbole_mmdiff.data.atomic import read_atomic
from recbole_mmdiff.errors import DataError


def last_ratings(ratings):
    """(user, item) -> (rating, time) of the last review."""
    ordered = sorted(ratings, key=lambda rating: rating.time)
    return {(rating.user, rating.item): (rating.rating, rating.time) for rating in ordered}


def as_it_is(domains):
    return [last_ratings(ratings) for ratings, _ in domains]


def with_image(domains):
    kept = []
    for ratings, items in domains:
        seen = {item.id for item in items if item.image}
        kept.append({key: value for key, value in last_ratings(ratings).items() if key[1] in seen})
    return kept


def music_rules(domains):
    kept = []
    for ratings, items in domains:
        whole = {item.id for item in items if item.image and item.description}
        rows = last_ratings([rating for rating in ratings if len(rating.text.split()) >= 10])
        rows = {key: value for key, value in rows.items() if key[1] in whole}
        counts = Counter(user for user, _ in rows)
        kept.append({key: value for key, value in rows.items() if counts[key[0]] >= 20})
    return kept


def sieoug_rules(domains):
    kept = [{key: (1.0, time) for key, (rating, time) in last_ratings(ratings).items() if rating >= 4}
            for ratings, _ in domains]
    before = None
    while before != [len(rows) for rows in kept]:
        before = [len(rows) for rows in kept]
        for place, rows in enumerate(kept):
            users, items = Counter(key[0] for key in rows), Counter(key[1] for key in rows)
            others = {key[0] for key in kept[1 - place]}
            kept[place] = {key: value for key, value in rows.items()
                           if users[key[0]] >= 10 and items[key[1]] >= 10 and key[0] in others}
    return kept


RULES = {"diffcdr": as_it_is, "ccdrec": as_it_is, "mmdcdr": with_image, "music": music_rules,
         "sieoug": sieoug_rules}


def written(folder):
    rows = read_atomic(folder / f"{folder.name}.inter", None, {"user_id", "item_id", "rating", "timestamp"})
    return {(row.user_id, row.item_id): (row.rating, row.timestamp) for row in rows.itertuples()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_follows_its_paper(tmp_path, capsys, name):
    """The rules are our reading of the papers, whose own files are not to be had, as plain loops."""
    preset, raw, output = PRESETS[name], tmp_path / "raw", tmp_path / "dataset"
    domains = write_preset(raw, preset)
    expected = RULES[name.partition("-")[0]](domains)
    main(["amazon", "--preset", name, "--raw", str(raw), "--output", str(output)])
    printed = capsys.readouterr().out
    for domain, rows, (ratings, items) in zip(preset.domains, expected, domains, strict=True):
        folder = output / domain.name
        assert written(folder) == rows
        if name.startswith(("sieoug", "music", "mmdcdr")):
            assert 0 < len(rows) < len(last_ratings(ratings))
        described = read_atomic(folder / f"{domain.name}.item", None, {"item_id"})
        titles = {item.id: item.title for item in items}
        assert dict(zip(described.item_id, described.title.fillna(""), strict=True)) == {
            item: titles.get(item, "") for _, item in rows}
        record = json.loads((folder / f"{domain.name}.prep.json").read_text())
        counts = {"users": len({user for user, _ in rows}), "items": len(described), "ratings": len(rows)}
        assert record["counts"] == counts
        told = {row["what"]: row for row in record["presets"][name]["comparison"]}
        for what, ours in counts.items():
            paper = domain.published[what]
            assert told[f"{domain.name} {what}"] == {"what": f"{domain.name} {what}", "ours": ours,
                                                     "paper": paper, "difference": ours / paper - 1}
            assert f"{paper:,}" in printed
        if domain.sparsity is not None:
            row = told[f"{domain.name} sparsity"]
            assert row["ours"] == pytest.approx(1 - len(rows) / (counts["users"] * counts["items"]))
            assert row["difference"] == pytest.approx(row["ours"] - domain.sparsity)
            assert f"{domain.sparsity:.2%}" in printed
        if len(preset.domains) == 2:
            both = set.intersection(*({user for user, _ in rows} for rows in expected))
            assert told["users in both"]["ours"] == len(both)
            assert told["users in both"]["paper"] == preset.overlap
        assert (folder / f"{domain.name}.reviews.parquet").exists() == preset.texts
        assert record["presets"][name]["own_filters"] is True
    assert preset.note in printed and "other filters than the preset's" not in printed


@pytest.mark.parametrize("domain", {domain.name: domain for preset in PRESETS.values()
                                    for domain in preset.domains if domain.sparsity}.values(),
                         ids=lambda domain: domain.name)
def test_the_sparsity_of_a_paper_is_that_of_its_counts(domain):
    counts = domain.published
    sparsity = 1 - counts["ratings"] / (counts["users"] * counts["items"])
    assert sparsity == pytest.approx(domain.sparsity, abs=1e-4)     # some are cut off and not rounded


def test_the_notes_of_sieoug_are_true():
    """Each speaks of the domains that the filter at 10 cannot give, and of no others."""
    for name, preset in PRESETS.items():
        if name.startswith("sieoug"):
            assert ("contradicts itself" in preset.note) == (name != "sieoug-food-kitchen")
            for domain in preset.domains:
                users, items, ratings = domain.published.values()
                a_user, an_item = ratings / users, ratings / items
                few = f"{domain.category} has {a_user:.1f} ratings a user and {an_item:.1f} an item"
                assert (few in preset.note) == (a_user < 10 or an_item < 10)


def test_the_tasks_of_a_paper_share_their_data_sets(tmp_path, capsys):
    raw, output = tmp_path / "raw", tmp_path / "dataset"
    for task in (1, 2):
        write_preset(raw, PRESETS[f"diffcdr-task{task}"])
    options = ["--raw", str(raw), "--output", str(output)]
    main(["amazon", "--preset", "diffcdr-task1", *options])
    movies = output / "amazon2014-movies" / "amazon2014-movies.inter"
    before = movies.stat().st_mtime_ns
    capsys.readouterr()
    main(["amazon", "--preset", "diffcdr-task2", *options])
    assert f"{movies.parent}: there already" in capsys.readouterr().out
    assert movies.stat().st_mtime_ns == before
    record = json.loads(movies.with_name("amazon2014-movies.prep.json").read_text())
    assert list(record["presets"]) == ["diffcdr-task1", "diffcdr-task2"]
    with pytest.raises(DataError, match=r"amazon2014-movies: another data set is there.*--overwrite"):
        main(["amazon", "--preset", "diffcdr-task1", "--k-core", "7", *options])
    assert movies.stat().st_mtime_ns == before
    main(["amazon", "--preset", "diffcdr-task1", "--k-core", "7", "--overwrite", *options])
    record = json.loads(movies.with_name("amazon2014-movies.prep.json").read_text())
    assert record["recipe"]["filters"]["k_core"] == 7 and list(record["presets"]) == ["diffcdr-task1"]


def test_without_the_published_core_it_is_computed(tmp_path):
    """From all reviews, or from the ratings alone where no texts are needed."""
    preset, made = PRESETS["ccdrec-baby"], []
    ratings, items = dense_category(1, range(30))
    rare = [rating for rating in ratings if rating.user < "A0000000000020"]
    ratings = rare + [rating for rating in ratings if rating not in rare][:20]
    meta = [meta_line("2014", item) for item in items]
    files = {"reviews_Baby.json": [review_line("2014", rating) for rating in ratings],
             "ratings_Baby.csv": [f"{r.user},{r.item},{r.rating},{r.time}" for r in ratings]}
    for name, lines in files.items():
        raw, output = tmp_path / name, tmp_path / f"{name} out"
        write_lines(raw / name, lines)
        write_lines(raw / "meta_Baby.json", meta)
        main(["amazon", "--preset", "ccdrec-baby", "--raw", str(raw), "--output", str(output)])
        made.append(written(output / preset.domains[0].name))
    rows = last_ratings(ratings)
    while True:
        users, found = Counter(user for user, _ in rows), Counter(item for _, item in rows)
        kept = {key: value for key, value in rows.items() if users[key[0]] >= 5 and found[key[1]] >= 5}
        if len(kept) == len(rows):
            break
        rows = kept
    assert made == [rows, rows] and len(rows) < len(last_ratings(ratings))


def test_a_preset_takes_other_filters_too(tmp_path, capsys):
    """Common users of a pair of which one published core is missing: the core is taken in both."""
    raw, output, preset = tmp_path / "raw", tmp_path / "dataset", PRESETS["mmdcdr-movie2music"]
    write_preset(raw, preset)
    (raw / "CDs_and_Vinyl_5.json.gz").rename(raw / "CDs_and_Vinyl.json.gz")
    main(["amazon", "--preset", "mmdcdr-movie2music", "--raw", str(raw), "--output", str(output),
          "--common-users", "--require", "title"])
    users = []
    for domain in preset.domains:
        record = json.loads((output / domain.name / f"{domain.name}.prep.json").read_text())
        filters = record["recipe"]["filters"]
        assert (filters["first_core"], filters["require"], filters["common_users"]) == (5, ["title"], True)
        assert record["presets"]["mmdcdr-movie2music"]["own_filters"] is False
        users.append({user for user, _ in written(output / domain.name)})
    assert "Made with other filters than the preset's own, of which this note" in capsys.readouterr().out
    assert users[0] == users[1] and len(users[0]) == 30


def test_ids_alone_need_no_metadata(tmp_path):
    raw, output = tmp_path / "raw", tmp_path / "dataset"
    write_preset(raw, PRESETS["diffcdr-task1"])
    for path in raw.glob("meta_*"):
        path.unlink()
    main(["amazon", "--preset", "diffcdr-task1", "--raw", str(raw), "--output", str(output)])
    assert sorted(path.name for path in (output / "amazon2014-cds").iterdir()) == [
        "amazon2014-cds.inter", "amazon2014-cds.prep.json"]


def test_missing_raw_files_are_named(tmp_path):
    (tmp_path / "reviews_Movies_and_TV.txt").touch()
    with pytest.raises(DataError, match=r"holds no reviews of Movies_and_TV; looked for "
                                        r"reviews_Movies_and_TV_5\.json, reviews_Movies_and_TV\.json, "
                                        r"ratings_Movies_and_TV\.csv \(or with \.gz\), found "
                                        r"reviews_Movies_and_TV\.txt; download"):
        main(["amazon", "--preset", "diffcdr-task1", "--raw", str(tmp_path)])
    with pytest.raises(DataError, match="no such folder"):
        main(["amazon", "--preset", "music-task1", "--raw", str(tmp_path / "none")])
    write_lines(tmp_path / "Movies_and_TV.jsonl", ["{}"])
    with pytest.raises(DataError, match=r"holds no metadata of Movies_and_TV; looked for meta_Movies_and"):
        main(["amazon", "--preset", "music-task1", "--raw", str(tmp_path)])


def test_a_prepared_pair_passes_check(tmp_path):
    preset = PRESETS["diffcdr-task1"]
    domains = write_preset(tmp_path / "raw", preset)
    main(["amazon", "--preset", "diffcdr-task1", "--raw", str(tmp_path / "raw"), "--output", str(tmp_path)])
    source, target = (domain.name for domain in preset.domains)
    text = check(overrides={"data_path": str(tmp_path), "source_domain": {"dataset": source},
                            "target_domain": {"dataset": target}})
    for rows in as_it_is(domains):
        assert f"{len({user for user, _ in rows})} users, {len({item for _, item in rows})} items, " \
               f"{len(rows):,} interactions" in text
    assert "overlap: 30 linked users" in text


def test_the_list_shows_every_preset_and_its_files(capsys):
    main(["amazon", "--list"])
    text = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.table}, edition {preset.edition}; " in text
        for domain in preset.domains:
            assert f"{domain.name} from " in text
            assert EDITIONS[preset.edition].full.format(domain.category) in text


def test_a_lost_file_is_made_again(tmp_path, capsys):
    raw, output = tmp_path / "raw", tmp_path / "g[2014]"     # a pattern for those who look for one
    write_preset(raw, PRESETS["diffcdr-task1"])
    words = ["amazon", "--preset", "diffcdr-task1", "--raw", str(raw), "--output", str(output)]
    main(words)
    path = output / "amazon2014-cds" / "amazon2014-cds.inter"
    content = path.read_bytes()
    path.unlink()
    main(words)
    assert path.read_bytes() == content
    path.with_suffix(".item").unlink()
    capsys.readouterr()
    main(words)
    assert f"{path.parent}: there already" not in capsys.readouterr().out
    assert path.with_suffix(".item").exists()
