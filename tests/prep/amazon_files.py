"""Small raw Amazon files in the layouts of 2014, 2018 and 2023, and what they hold in plain Python."""

import gzip
import json
import random
from dataclasses import dataclass

from dataset_prep.editions import EDITIONS


@dataclass(frozen=True)
class Rating:
    """One review as it was before any layout."""

    user: str
    item: str
    rating: float
    time: int
    text: str


@dataclass(frozen=True)
class Item:
    """One item; an empty field is left out of the file, or written empty as the edition does."""

    id: str
    title: str = ""
    brand: str = ""
    categories: tuple[str, ...] = ()
    description: str = ""
    price: float | None = None
    image: str = ""


def write_lines(path, lines, zipped=False):
    data = "".join(f"{line}\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if zipped else data)
    return path


def review_line(edition, rating):
    if edition == "2023":
        return json.dumps({"rating": rating.rating, "title": "t", "text": rating.text, "images": [],
                           "asin": f"{rating.item}X", "parent_asin": rating.item, "user_id": rating.user,
                           "timestamp": rating.time * 1000 + 7, "helpful_vote": 0, "verified_purchase": True})
    line = {"reviewerID": rating.user, "asin": rating.item, "reviewerName": "a \"b\"", "helpful": [0, 1],
            "reviewText": rating.text, "overall": rating.rating, "unixReviewTime": rating.time}
    if edition == "2018":
        line |= {"vote": "2", "verified": True, "style": {"Size:": " S"}}
    return json.dumps(line)


def meta_line(edition, item):
    filled = {key: value for key, value in {"title": item.title, "description": item.description,
                                            "price": item.price}.items() if value}
    if edition == "2014":
        return repr({"asin": item.id, **filled, "brand": item.brand, "categories": [list(item.categories)],
                     **({"imUrl": item.image} if item.image else {}), "related": {"also_bought": ["B0X"]}})
    filled["description"] = [item.description] if item.description else []
    if edition == "2018":
        filled["price"] = f"${item.price:,.2f}" if item.price else ".a-box{color:#fff}"
        return json.dumps({"asin": item.id, **filled, "brand": item.brand, "category": list(item.categories),
                           "imageURL": [], "imageURLHighRes": [item.image] if item.image else []})
    images = [{"thumb": "http://x/t.jpg", "large": item.image, "variant": "MAIN", "hi_res": None}] \
        if item.image else []
    return json.dumps({"parent_asin": item.id, **filled, "store": item.brand or None, "images": images,
                       "categories": list(item.categories), "features": [], "details": {"asin": "other"}})


def dense_category(seed, users, items=30):
    """Ratings of users who have many, and items of which some lack an image, a text or all metadata."""
    draw = random.Random(seed)
    names = [f"B{seed:04}{number:05}" for number in range(items)]
    ratings = [Rating(f"A{user:013}", name, float(draw.choice((2, 3, 4, 4, 5, 5, 5, 5))),
                      draw.randrange(10**9, 14 * 10**8), " ".join(["word"] * draw.randrange(9, 21)))
               for user in users for name in draw.sample(names, draw.randrange(items - 9, items))]
    # Some users rate something once more.
    ratings += [Rating(r.user, r.item, 6 - r.rating, r.time + 5, r.text) for r in draw.sample(ratings, 9)]
    draw.shuffle(ratings)
    metadata = [Item(name, title=f"Title {name}", brand="Brand", categories=("Cat", name[-1]),
                     description="" if number == 2 else f"Text of {name}", price=9.5,
                     image="" if number == 3 else f"https://x/{name}.jpg")
                for number, name in enumerate(names) if number != 4]
    return ratings, metadata


def write_preset(folder, preset):
    """The raw files of a preset; returns ratings and metadata of each domain. Thirty users are in both."""
    edition, made = EDITIONS[preset.edition], []
    for place, domain in enumerate(preset.domains):
        seed = sum(map(ord, domain.category)) % 10000
        ratings, items = dense_category(seed, range(10 * place, 40 + 10 * place))
        name = (edition.core if preset.core else edition.full).format(domain.category)
        write_lines(folder / f"{name}.gz", [review_line(preset.edition, rating) for rating in ratings], True)
        write_lines(folder / edition.meta.format(domain.category),
                    [meta_line(preset.edition, item) for item in items])
        made.append((ratings, items))
    return made
