"""The default data: two domains cut out of the MovieLens-100K that ships inside RecBole's wheel.

``python -m dataset_prep.ml100k [root]`` writes ``<root>/ml100k-drama`` (source) and
``<root>/ml100k-action`` (target): ``.inter``, ``.item``, the features ``text`` and ``genre`` and a
``.prep.json`` that records where they came from. Nothing is downloaded.

Rules, all of them deterministic:

- Films. Each domain owns a family of genres (`GENRES`). A film belongs to the family that holds
  more of its genres; at a tie, to the family of its first listed genre. A film without a known
  genre is left out, and so is one that keeps no rating. No film is in both domains.
- Users. In order of the sha256 of their token, the first 15% keep only their drama rows, the next
  15% only their action rows, the rest all of them.
- Order. Ratings by user token, time and item token; films by item token (tokens as strings).
- Features. ``text``: TF-IDF of the title's words and character 3-5-grams, fitted on the films of
  both domains so that they share one space, then a truncated SVD to 64 dimensions, rounded to
  5 decimals, scaled to unit length (a title outside that space stays zero). ``genre``: multi-hot
  over the 18 genres in the order of `GENRES`.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from dataset_prep.encoders.lsa import DECIMALS, Lsa
from dataset_prep.folders import HIDDEN
from recbole_mmdiff.data.features import FeatureError, FeatureFile, write_features
from recbole_mmdiff.files import make_folder, read_json, sha256, telling_of_disk

SOURCE = "ml100k-drama"
TARGET = "ml100k-action"
# fmt: off
GENRES = {
    SOURCE: ("Drama", "Comedy", "Romance", "Children's", "Musical", "Animation", "Documentary",
             "Fantasy"),
    TARGET: ("Action", "Sci-Fi", "Thriller", "Adventure", "Crime", "War", "Horror", "Western",
             "Film-Noir", "Mystery"),
}
# fmt: on
MODALITIES = ("text", "genre")
TEXT_DIM = 64
SINGLE_DOMAIN_PERCENT = 15  # of all users, in each domain
VERSION = 1  # raise it when a rule above changes: `ensure` then builds anew

_FAMILY = {genre: domain for domain, genres in GENRES.items() for genre in genres}
_INTER_HEAD = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
_ITEM_HEAD = ("item_id:token", "title:token_seq", "year:token", "genres:token_seq")
_RAW_ITEM_HEAD = ("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq")

Row = tuple[str, ...]


def raw_folder() -> Path:
    """The ml-100k folder inside the installed recbole (located, not imported).

    Raises FileNotFoundError when recbole or the folder is absent.
    """
    spec = importlib.util.find_spec("recbole")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "dataset_example" / "ml-100k"
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        "recbole/dataset_example/ml-100k was not found; install the recbole wheel (pip install "
        "recbole==1.2.1), which carries it"
    )


def family(genres: Sequence[str]) -> str | None:
    """The domain of a film with these genres; None when none of them is known."""
    known = [_FAMILY[genre] for genre in genres if genre in _FAMILY]
    # max returns the first of equals: at a tie, the family of the first listed genre.
    return max(known, key=known.count) if known else None


def user_domains(users: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The domains whose rows each user keeps."""
    ordered = sorted(set(users), key=lambda user: hashlib.sha256(user.encode()).hexdigest())
    share = len(ordered) * SINGLE_DOMAIN_PERCENT // 100
    kept = dict.fromkeys(ordered, (SOURCE, TARGET))
    kept.update((user, (SOURCE,)) for user in ordered[:share])
    kept.update((user, (TARGET,)) for user in ordered[share : 2 * share])
    return kept


def make(root: str | Path) -> None:
    """Build both domains under ``root``, replacing earlier builds of them.

    Everything is built in a hidden folder under ``root`` and then renamed, so a run killed at any
    moment leaves no half-written domain; the next build removes what it leaves there. Takes seconds.

    Raises FileExistsError when a domain's folder holds files that this module did not write.
    """
    _build_and_install(Path(root), replace=True)


def ensure(root: str | Path) -> None:
    """`make`, unless both domains are complete already. Of several processes one builds, the others wait."""
    root = Path(root)
    if not _all_complete(root) or _workspace(root).exists():    # The latter is of a killed build, or at work.
        _build_and_install(root, replace=False)


def _all_complete(root: Path) -> bool:
    return all(_complete(root / name) for name in GENRES)


def _workspace(root: Path) -> Path:
    return root / HIDDEN / "ml100k"


def _build_and_install(root: Path, replace: bool) -> None:
    for name in GENRES:
        _refuse_foreign_files(root / name)
    workspace = _workspace(root)
    make_folder(workspace.parent)
    with telling_of_disk(root), FileLock(workspace.with_suffix(".lock")):
        shutil.rmtree(workspace, ignore_errors=True)
        if not replace and _all_complete(root):
            return    # Another process came first.
        workspace.mkdir()
        try:
            _build(workspace)
            for name in GENRES:
                _install(workspace / name, root / name, replace)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)


def _install(built: Path, final: Path, replace: bool) -> None:
    """Rename a built folder into place; a complete one stays unless ``replace``."""
    if final.exists():
        if not replace and _complete(final):
            return
        os.replace(final, built.with_name(f"{built.name}.old"))
    os.rename(built, final)


def _files(name: str) -> list[str]:
    features = [f"{name}.{m}.{end}" for m in MODALITIES for end in ("npy", "tokens", "json")]
    return [f"{name}.inter", f"{name}.item", f"{name}.prep.json", *features]


def _refuse_foreign_files(folder: Path) -> None:
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(present - set(_files(folder.name)))
    if foreign:
        raise FileExistsError(
            f"{folder} holds files that dataset_prep.ml100k did not write ({', '.join(foreign)}) "
            "and would be replaced; move them away or choose another root"
        )


def _complete(folder: Path) -> bool:
    """Whether the folder holds every file, by the present rules, with features that open."""
    if not all((folder / name).is_file() for name in _files(folder.name)):
        return False
    try:
        record = read_json(folder / f"{folder.name}.prep.json")
        for modality in MODALITIES:
            FeatureFile.open(folder, folder.name, modality)
    except (FeatureError, ValueError):
        return False
    return isinstance(record, dict) and record.get("version") == VERSION


def _build(workspace: Path) -> None:
    raw = raw_folder()
    ratings = _read(raw / "ml-100k.inter", _INTER_HEAD)
    films = _read(raw / "ml-100k.item", _RAW_ITEM_HEAD)
    inter = _split_ratings(ratings, films)
    items = {name: _kept_films(films, inter[name]) for name in GENRES}
    vectors = _title_vectors([film[1] for name in GENRES for film in items[name]])
    split = len(items[SOURCE])
    text = {SOURCE: vectors[:split], TARGET: vectors[split:]}
    for name in GENRES:
        folder = workspace / name
        folder.mkdir()
        _write(folder / f"{name}.inter", _INTER_HEAD, inter[name])
        _write(folder / f"{name}.item", _ITEM_HEAD, items[name])
        _write_features(folder, items[name], text[name])
        _write_record(folder, raw, inter[name], items[name])


def _read(path: Path, head: Row) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        found = tuple(next(rows, ()))
        if found != head:
            raise ValueError(f"{path}: its columns are {found}, but {head} were expected")
        return [tuple(row) for row in rows]


def _write(path: Path, head: Row, rows: Sequence[Row]) -> None:
    lines = "".join("\t".join(row) + "\n" for row in (head, *rows))
    path.write_bytes(lines.encode("utf-8"))


def _split_ratings(ratings: Sequence[Row], films: Sequence[Row]) -> dict[str, list[Row]]:
    domain_of = {film[0]: family(film[3].split()) for film in films}
    keeps = user_domains([row[0] for row in ratings])
    inter: dict[str, list[Row]] = {name: [] for name in GENRES}
    for row in ratings:
        domain = domain_of[row[1]]
        if domain in keeps[row[0]]:
            inter[domain].append(row)
    for rows in inter.values():
        rows.sort(key=lambda row: (row[0], int(row[3]), row[1]))
    return inter


def _kept_films(films: Sequence[Row], ratings: Sequence[Row]) -> list[Row]:
    rated = {row[1] for row in ratings}
    return sorted(film for film in films if film[0] in rated)


def _title_vectors(titles: Sequence[str]) -> np.ndarray:
    """TF-IDF and SVD of the titles: float32 (titles, TEXT_DIM), rows of unit length or zero."""
    return Lsa(TEXT_DIM, ngrams=(3, 5)).fit(titles)


def _multi_hot(genres: Sequence[str]) -> np.ndarray:
    """Space-separated genres of each film to float32 (films, 18)."""
    columns = {genre: column for column, genre in enumerate(_FAMILY)}
    matrix = np.zeros((len(genres), len(columns)), dtype=np.float32)
    for row, listed in enumerate(genres):
        matrix[row, [columns[genre] for genre in listed.split() if genre in columns]] = 1
    return matrix


def _write_features(folder: Path, items: Sequence[Row], text: np.ndarray) -> None:
    from sklearn import __version__ as sklearn_version

    name = folder.name
    tokens = [film[0] for film in items]
    write_features(
        folder,
        name,
        "text",
        tokens,
        text,
        encoder="TF-IDF (words, character 3-5-grams) + truncated SVD (arpack, random_state 0)",
        fields=["title"],
        fitted_on=list(GENRES),
        normalized=True,
        decimals=DECIMALS,
        sklearn=sklearn_version,
    )
    write_features(
        folder,
        name,
        "genre",
        tokens,
        _multi_hot([film[3] for film in items]),
        encoder="multi-hot",
        fields=["genres"],
        columns=list(_FAMILY),
    )


def _write_record(folder: Path, raw: Path, inter: Sequence[Row], items: Sequence[Row]) -> None:
    """The manifest of the prepared files: source, checksums and counts."""
    name = folder.name
    record = {
        "version": VERSION,
        "source": "MovieLens-100K as bundled in recbole",
        "source_sha256": {file: sha256(raw / file) for file in ("ml-100k.inter", "ml-100k.item")},
        "rules": "the docstring of dataset_prep.ml100k",
        "users": len({row[0] for row in inter}),
        "items": len(items),
        "interactions": len(inter),
        "sha256": {file: sha256(folder / file) for file in (f"{name}.inter", f"{name}.item")},
    }
    text = json.dumps(record, indent=1) + "\n"
    (folder / f"{name}.prep.json").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    """Build into the root given, ``dataset`` by default."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        raise SystemExit("usage: python -m dataset_prep.ml100k [root]")
    root = Path(arguments[0] if arguments else "dataset")
    make(root)
    for name in GENRES:
        print(root / name)


if __name__ == "__main__":
    main(sys.argv[1:])
