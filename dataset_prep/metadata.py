"""Reading the metadata of items: titles, brands, categories, descriptions, prices and image addresses."""

from __future__ import annotations

import ast
import html
import re
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import polars as pl

from dataset_prep.editions import Edition, other_kind
from dataset_prep.output import clean
from dataset_prep.raw import RawFile, parse_json, reason
from recbole_mmdiff.errors import DataError

FIELDS = {"title": pl.String, "brand": pl.String, "categories": pl.String, "description": pl.String,
          "price": pl.Float64, "image_url": pl.String}
LITERAL_LIMIT = 1 << 22     # bytes; Python's parser needs a hundred times the memory of its input
_BATCH = 20_000
# Of HTML alone: titles have '<Live>' and the like.
_TAGS = ("a|abbr|address|article|b|big|blockquote|body|br|caption|center|cite|code|col|colgroup|dd|del|dfn|"
         "div|dl|dt|em|embed|figure|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|kbd|label|"
         "li|link|meta|object|ol|option|p|param|pre|q|s|samp|script|section|select|small|span|strike|strong|"
         "style|sub|sup|table|tbody|td|tfoot|th|thead|tr|tt|u|ul|video|wbr")
_TAG = re.compile(rf"<!--.*?-->|</?(?:{_TAGS})(?:\s[^<>]*)?/?>", re.IGNORECASE | re.DOTALL)
_PRICE = re.compile(r"\s*(?:from\s+)?\$?\s*(\d[\d,]*(?:\.\d+)?)\s*(?:-.*)?")


def read_items(raw: RawFile, edition: Edition,
               needed: Collection[str]) -> tuple[pl.DataFrame, dict[str, int]]:
    """The items among ``needed`` that the file has: item_id and `FIELDS`, null where a field is missing.

    Of an item with several lines, each field is the first that is not missing. Titles that are the code
    of a web page, and images that say that there is none, are taken as missing.

    Returns:
        the items in the order of the file, and how many of what were mended.

    Raises:
        DataError: as `RawFile` does; the file has none of the items, or is no metadata of this edition.
    """
    mended = {"duplicate lines merged": 0, "titles of page code": 0, "placeholder images": 0}
    schema = {"item_id": pl.String, **FIELDS}
    batches = [pl.DataFrame(schema=schema)]
    rows: list[tuple] = []
    keys: set[str] = set()
    for line in _lines(raw, edition, needed):
        keys.update(line)
        rows.append(_item(line, edition, mended))
        if len(rows) == _BATCH:
            batches.append(_cleaned(pl.DataFrame(rows, schema=schema, orient="row")))
            rows = []
    batches.append(_cleaned(pl.DataFrame(rows, schema=schema, orient="row")))
    raw.check_share()
    items = pl.concat(batches)
    _check_kind(raw, edition, items, keys, len(needed))
    merged = items.group_by("item_id", maintain_order=True).agg(pl.all().drop_nulls().first())
    mended["duplicate lines merged"] = items.height - merged.height
    return merged, {what: count for what, count in mended.items() if count}


def _check_kind(raw: RawFile, edition: Edition, items: pl.DataFrame, keys: set[str], needed: int) -> None:
    """Refuse a file that is no metadata of the rated items; ``keys`` are those of its lines."""
    if not items.height:
        raise DataError(f"{raw.path}: its {raw.lines:,} lines hold none of the {needed:,} items that "
                        "were rated; is it the metadata of this category and edition?")
    other = other_kind(edition, keys)
    if other or items.select(pl.all_horizontal(pl.col(*FIELDS).is_null()).all()).item():
        raise DataError(f"{raw.path}: looks like {other or 'something else'}, not like metadata of this "
                        f"edition: of the rated items it has none of {', '.join(sorted(edition.own))}; give "
                        "the right --edition and --meta")


def _lines(raw: RawFile, edition: Edition, needed: Collection[str]) -> Iterator[dict[str, Any]]:
    """The parsed lines of the needed items; others are told by their id alone and not parsed."""
    # No quote before the key: a pattern that starts with plain letters is found several times faster.
    pattern = re.compile(rb"""%b["']\s*:\s*["']([^"'\\]+)["']""" % edition.item.encode())
    parse = _parse_literal if edition.literal else parse_json
    wanted = {item.encode() for item in needed}
    for chunk in raw.chunks():
        for number, line in enumerate(chunk.text.split(b"\n")[:-1], chunk.first):
            ids = set(pattern.findall(line))
            if ids and ids.isdisjoint(wanted) and number != raw.unended:
                raw.not_needed += 1
                continue
            if not line.strip():
                continue
            try:
                value = _checked(parse(line), edition.item)
            except (ValueError, RecursionError, MemoryError) as error:
                raw.bad(number, reason(error))
            else:
                raw.good += 1
                if value[edition.item] in needed:
                    yield value


def _parse_literal(line: bytes) -> Any:
    """The value of a Python literal or of JSON; nothing in it is ever run."""
    try:
        return parse_json(line)
    except ValueError:
        if len(line) > LITERAL_LIMIT:
            raise ValueError(f"longer than {LITERAL_LIMIT >> 20} MiB") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # at odd escapes in texts
            return ast.literal_eval(line.decode("utf-8-sig").strip())
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError("neither JSON nor a Python literal") from error


def _checked(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not an object")
    if not isinstance(value.get(key), str) or not value[key]:
        raise ValueError(f"no {key}")
    return value


def _item(line: dict[str, Any], edition: Edition, mended: dict[str, int]) -> tuple:
    title = " ".join(_strings(line.get("title")))
    if "getTime" in title:
        title = None
        mended["titles of page code"] += 1
    urls = [url.strip() for url in edition.images(line) if isinstance(url, str)]
    images = [url for url in urls if re.match(r"https?://\S+$", url)]
    real = [url for url in images if "/no-img" not in url]
    mended["placeholder images"] += bool(images and not real)
    categories = dict.fromkeys(_strings(line.get(edition.categories)))
    brand, description = _strings(line.get(edition.brand)), _strings(line.get("description"))
    texts = (title, " ".join(brand), ", ".join(categories), " ".join(description))
    return (line[edition.item], *map(_plain, texts), _price(line.get("price")), real[0] if real else None)


def _strings(value: Any) -> Iterator[str]:
    """The texts in nested lists, from left to right."""
    if isinstance(value, str) and value.strip():
        yield value.strip()
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _plain(text: str | None) -> str | None:
    """Without tags, entities and halves of surrogate pairs; what only looks like a tag is text."""
    return text and html.unescape(_TAG.sub(" ", text)).encode("utf-8", "replace").decode("utf-8")


def _price(value: Any) -> float | None:
    """Dollars; of a range the lower end, and None of anything that is no price."""
    if isinstance(value, str):
        found = _PRICE.fullmatch(value)
        value = float(found[1].replace(",", "")) if found else None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and 0 <= value < 10**9 else None


def _cleaned(items: pl.DataFrame) -> pl.DataFrame:
    texts = [name for name, dtype in FIELDS.items() if dtype == pl.String]
    return items.with_columns(clean(name).alias(name) for name in texts)
