"""What the editions of the Amazon reviews call their files and fields, and where an item's image stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_mmdiff.errors import DataError

_COLUMNS = ("user_id", "item_id", "rating", "timestamp")


@dataclass(frozen=True)
class Edition:
    """One edition of the data.

    Attributes:
        core, full, csv, meta: the names of a category's files, ``{}`` standing for the category: reviews of
            the published 5-core (None where there is none), all reviews, ratings without texts, items.
        reviews: user_id, item_id, rating, timestamp and review -> the key in a line of reviews.
        ratings: the columns of the CSV file, which has no header unless ``header``.
        item, brand, categories: keys in a line of metadata.
        own: keys that a line of reviews, or of metadata of another edition, has not.
        images: the addresses of an item's images out of its line, the best first.
        literal: the lines of metadata are Python literals, not JSON.
    """

    core: str | None
    full: str
    csv: str
    meta: str
    reviews: Mapping[str, str]
    ratings: tuple[str, ...]
    item: str
    brand: str
    categories: str
    own: frozenset[str]
    images: Callable[[Mapping[str, Any]], Iterator[Any]]
    header: bool = False
    literal: bool = False


def _image_2014(line: Mapping[str, Any]) -> Iterator[Any]:
    yield line.get("imUrl")


def _images_2018(line: Mapping[str, Any]) -> Iterator[Any]:
    for key in ("imageURLHighRes", "imageURL", "image"):
        yield from _listed(line.get(key))


def _images_2023(line: Mapping[str, Any]) -> Iterator[Any]:
    """The sizes of the first image, then of the next, from a list of images or from lists of each size."""
    images, sizes = line.get("images"), ("hi_res", "large", "thumb")
    if isinstance(images, dict):
        lists = [_listed(images.get(size)) for size in sizes]
        images = [{size: urls[place] for size, urls in zip(sizes, lists, strict=True) if place < len(urls)}
                  for place in range(max(map(len, lists)))]
    for image in _listed(images):
        if isinstance(image, dict):
            yield from (image.get(size) for size in sizes)


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


_OLD_REVIEWS = {"user_id": "reviewerID", "item_id": "asin", "rating": "overall",
                "timestamp": "unixReviewTime", "review": "reviewText"}

EDITIONS = {
    "2014": Edition(
        core="reviews_{}_5.json", full="reviews_{}.json", csv="ratings_{}.csv", meta="meta_{}.json",
        reviews=_OLD_REVIEWS, ratings=_COLUMNS, item="asin", brand="brand", categories="categories",
        own=frozenset({"categories", "imUrl"}), images=_image_2014, literal=True),
    "2018": Edition(
        core="{}_5.json", full="{}.json", csv="{}.csv", meta="meta_{}.json",
        reviews=_OLD_REVIEWS, ratings=("item_id", "user_id", "rating", "timestamp"),
        item="asin", brand="brand", categories="category",
        own=frozenset({"category", "imageURL", "imageURLHighRes"}), images=_images_2018),
    "2023": Edition(
        core=None, full="{}.jsonl", csv="{}.csv", meta="meta_{}.jsonl",
        reviews={"user_id": "user_id", "item_id": "parent_asin", "rating": "rating", "timestamp": "timestamp",
                 "review": "text"},
        ratings=_COLUMNS, item="parent_asin", brand="store", categories="categories",
        own=frozenset({"categories", "store", "main_category"}), images=_images_2023, header=True),
}


def other_kind(edition: Edition, keys: Set[str]) -> str | None:
    """What lines with these keys are; None if they are metadata of this edition, or nothing known."""
    if keys & edition.own:
        return None
    if edition.reviews["user_id"] in keys:
        return "reviews"
    return next((f"metadata of {name}" for name, other in EDITIONS.items() if keys & other.own), None)


def ratings_columns(edition: Edition, path: Path, line: str) -> tuple[tuple[str, ...], bool]:
    """The columns of a ratings file whose first line is ``line``, and whether that line is a header.

    Raises:
        DataError: the header lacks a column, or there is none where the edition has one.
    """
    words = [{"parent_asin": "item_id"}.get(word, word) for word in line.replace('"', "").split(",")]
    if "rating" in words or edition.header:
        absent = [column for column in _COLUMNS if column not in words]
        if absent:
            raise DataError(f"{path}, line 1: the header {line[:80]!r} lacks {absent[0]!r}; a ratings file "
                            "of 2023 starts with 'user_id,parent_asin,rating,timestamp', one of 2014 or 2018 "
                            "with a rating: choose its --edition")
        return tuple(words), True
    return edition.ratings, False


def find_reviews(edition: Edition, folder: Path, category: str, text: bool) -> tuple[Path, bool]:
    """A category's review file: the published 5-core, else all reviews, else (where no texts are needed) the
    ratings file; and whether it is the 5-core.

    Raises:
        DataError: the folder has none of them; names those that were looked for and what it holds.
    """
    names = [name for name in (edition.core, edition.full, None if text else edition.csv) if name]
    path = _find(folder, [name.format(category) for name in names])
    if path is None:
        raise _absent(folder, [name.format(category) for name in names], f"reviews of {category}")
    return path, edition.core is not None and path.name.startswith(edition.core.format(category))


def find_metadata(edition: Edition, folder: Path, category: str, required: bool) -> Path | None:
    """A category's metadata file; None where there is none and it is not ``required``, else a DataError."""
    name = edition.meta.format(category)
    path = _find(folder, [name])
    if path is None and required:
        raise _absent(folder, [name], f"metadata of {category}")
    return path


def _find(folder: Path, names: list[str]) -> Path | None:
    paths = [folder / f"{name}{end}" for name in names for end in ("", ".gz")]
    return next((path for path in paths if path.is_file()), None)


def _absent(folder: Path, names: list[str], what: str) -> DataError:
    held = sorted(path.name for path in folder.iterdir())[:20] if folder.is_dir() else ["no such folder"]
    return DataError(f"{folder}: holds no {what}; looked for {', '.join(names)} (or with .gz), found "
                     f"{', '.join(held) or 'nothing'}; download one of them into it")
