"""``recbole-mmdiff prepare amazon``: Amazon reviews to atomic files, by a paper's preset or by options."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import polars as pl

from dataset_prep.editions import EDITIONS, find_metadata, find_reviews
from dataset_prep.filters import DUPLICATES, REQUIRABLE, Filters
from dataset_prep.output import checked_name, is_made, read_record, record_path
from dataset_prep.pipeline import Source, clean_up, prepare, recipe
from dataset_prep.presets import PRESETS, Domain, Preset
from dataset_prep.raw import MAX_BAD
from recbole_mmdiff.errors import ConfigError, DataError, one_of
from recbole_mmdiff.files import remove_leftovers, write_json

Job = tuple[list[Source], Filters]      # the data sets that are made together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A preset or files, the filters, and where the data sets go."""
    add = parser.add_argument
    add("--list", action="store_true", help="show the presets and the raw files that they need")
    add("--preset", metavar="NAME", help="the data of a paper's task; filters beside it replace its own")
    add("--raw", type=Path, metavar="DIR", help="the folder of the raw files of a preset")
    add("--edition", metavar="YEAR", help=f"{', '.join(EDITIONS)}: the edition of the files below")
    add("--reviews", type=Path, nargs="+", metavar="FILE", help="reviews; two files make a pair")
    add("--ratings", type=Path, nargs="+", metavar="FILE", help="the same as CSV without texts")
    add("--meta", type=Path, nargs="+", metavar="FILE", help="metadata, a file for each of these")
    add("--name", nargs="+", metavar="NAME", help="a name for each data set")
    add("--reviews-text", action="store_true", help="keep the reviews, as NAME.reviews.parquet")
    add("--output", type=Path, default=Path("dataset"), metavar="DIR", help="where the folders NAME go")
    add("--overwrite", action="store_true", help="replace data sets that are there")
    add("--max-bad", type=float, default=MAX_BAD, metavar="SHARE",
        help="of the lines of a file that may be bad")
    _add_filters(parser.add_argument_group("filters, in the order in which they run"))


def _add_filters(group: argparse._ArgumentGroup) -> None:
    def add(option: str, text: str, **kind: Any) -> None:
        # Without a default, so that a preset's filters stay unless others are given.
        group.add_argument(option, help=text, default=argparse.SUPPRESS, **kind)

    add("--min-words", "leave out reviews of fewer words", type=int, metavar="N")
    add("--duplicates", "which rating of a user for an item stays; error: none may", choices=DUPLICATES)
    add("--first-core", "leave out users and items with fewer ratings, repeatedly", type=int, metavar="N")
    add("--positive", "leave out ratings below R", type=float, metavar="R")
    add("--binarize", "ratings from R on become 1, others 0", type=float, metavar="R")
    add("--require", f"leave out items without one of {','.join(REQUIRABLE)}", type=_listed, metavar="A,B")
    add("--min-item-ratings", "leave out items with fewer ratings, once", type=int, metavar="N")
    add("--min-user-ratings", "leave out users with fewer ratings, once", type=int, metavar="N")
    add("--k-core", "as --first-core, after all filters above", type=int, metavar="N")
    add("--common-users", "of a pair, keep only the users of both", action="store_true")


def _listed(words: str) -> tuple[str, ...]:
    return tuple(filter(None, words.split(",")))


def main(options: argparse.Namespace) -> None:
    """Prepare what the options ask for, and print what was left out, what is left, and the paper's table.

    Raises:
        ConfigError: options that do not fit together.
        DataError: as the readers and the filters do.
    """
    if options.list:
        print("\n\n".join(_described(name, preset) for name, preset in PRESETS.items()))
    elif options.preset:
        _prepare_preset(options)
    else:
        filters = Filters(**_given(options))
        jobs = [([source], filters) for source in _sources(options)]
        _make(_joined(jobs) if filters.common_users else jobs, options, options.reviews_text)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in fields(Filters) if field.name in options}


def _sources(options: argparse.Namespace) -> list[Source]:
    """The data sets of the options --edition, --reviews or --ratings, --meta and --name."""
    if (options.reviews is None) == (options.ratings is None):
        raise ConfigError("prepare amazon: give --preset (--list shows them), or --reviews or --ratings")
    one_of("--edition", options.edition, EDITIONS)
    files = options.reviews or options.ratings
    for option in ("name", "meta"):
        values = getattr(options, option)
        if (values is not None or option == "name") and len(values or ()) != len(files):
            raise ConfigError(f"--{option}: {len(values or ())} given for {len(files)} files of ratings; "
                              "give one for each")
    if len({checked_name(name, "--name") for name in options.name}) < len(files):
        raise ConfigError(f"--name: {' '.join(options.name)} has a name twice; give each data set its own")
    _check_pair(options, len(files))
    absent = [path for path in (*files, *(options.meta or ())) if not path.is_file()]
    if absent:
        raise DataError(f"{absent[0]}: no such file")
    return [Source(name, options.edition, path, options.ratings is not None, meta) for name, path, meta in
            zip(options.name, files, options.meta or [None] * len(files), strict=True)]


def _check_pair(options: argparse.Namespace, count: int) -> None:
    if "common_users" in options and count < 2:
        raise ConfigError("--common-users: needs two files, --reviews A B --name a b")
    if getattr(options, "require", ()) and not options.meta:
        raise ConfigError("--require: needs the metadata of the items, --meta FILE")


def _prepare_preset(options: argparse.Namespace) -> None:
    preset = PRESETS[one_of("--preset", options.preset, PRESETS)]
    if options.raw is None:
        raise ConfigError("--preset: needs --raw DIR, the folder of the raw files")
    unused = [name for name in ("edition", "reviews", "ratings", "meta", "name") if getattr(options, name)]
    if unused:
        raise ConfigError(f"--{unused[0]}: does not go with --preset, which finds its files in --raw")
    filters = replace(preset.filters, **_given(options))
    if filters.common_users and len(preset.domains) < 2:
        raise ConfigError(f"--common-users: {options.preset} is no pair of domains")
    jobs = [_job(domain, preset, filters, options) for domain in preset.domains]
    _make(_joined(jobs) if filters.common_users else jobs, options, preset.texts or options.reviews_text)
    rows = list(_comparison(preset, options.output))
    table = _table((preset.table, "ours", "paper", "difference"), map(_cells, rows))
    own = filters in (preset.filters, replace(preset.filters, first_core=preset.core))
    other = "" if own else "Made with other filters than the preset's own, of which this note speaks: "
    print(f"\n{table}\n{other}{preset.note}")
    for domain in preset.domains:
        folder = options.output / domain.name
        record = read_record(folder)
        record["presets"] = record.get("presets", {}) | {options.preset: {
            "table": preset.table, "own_filters": own, "note": preset.note, "comparison": rows}}
        remove_leftovers(folder, {record_path(folder).name})
        write_json(record, record_path(folder))


def _job(domain: Domain, preset: Preset, filters: Filters, options: argparse.Namespace) -> Job:
    """A domain's files and filters; the first core is our task where the published one is not there."""
    edition = EDITIONS[preset.edition]
    texts = preset.texts or options.reviews_text or filters.min_words > 0
    path, is_core = find_reviews(edition, options.raw, domain.category, texts)
    meta = find_metadata(edition, options.raw, domain.category, preset.metadata or bool(filters.require))
    if preset.core and not is_core and "first_core" not in options:
        filters = replace(filters, first_core=preset.core)
    csv = path.name.removesuffix(".gz").endswith(".csv")
    return [Source(domain.name, preset.edition, path, csv, meta)], filters


def _joined(jobs: Sequence[Job]) -> list[Job]:
    """One job for domains that must agree on their users; a core that is due in one is taken in all."""
    first_core = max(filters.first_core for _, filters in jobs)
    return [([source for sources, _ in jobs for source in sources],
             replace(jobs[0][1], first_core=first_core))]


def _make(jobs: Sequence[Job], options: argparse.Namespace, texts: bool) -> None:
    """Prepare each job unless its data sets are there, made from these very files, and print how.

    Data sets of others are refused before any work is done.
    """
    if not 0 <= options.max_bad < 1:
        raise ConfigError(f"--max-bad: {options.max_bad} is not a share from 0 to below 1")
    recipes = [recipe(sources, filters, texts, options.max_bad) for sources, filters in jobs]
    made = [[is_made(options.output / source.name, decided, options.overwrite) for source in sources]
            for (sources, _), decided in zip(jobs, recipes, strict=True)]
    for (sources, filters), there in zip(jobs, made, strict=True):
        if all(there):
            clean_up(options.output, [source.name for source in sources])
            names = ", ".join(str(options.output / source.name) for source in sources)
            print(f"{names}: there already, made from the same files by the same filters")
            continue
        for source, record in zip(sources, prepare(sources, filters, options.output, texts, options.max_bad),
                                  strict=True):
            print(_summary(options.output / source.name, record))


def _summary(folder: Path, record: Mapping[str, Any]) -> str:
    lines = [f"{folder}:"]
    for raw in record["raw"]:
        left_out = sum(reason["count"] for reason in raw["left_out"].values())
        lines.append(f"  {raw['name']}: {raw['lines']:,} lines, {left_out:,} left out")
        if raw["not_needed"]:
            lines.append(f"    {raw['not_needed']:,} lines of items not needed were not parsed")
        lines += [f"    {reason['count']:,} {name} (first: {reason['first']})"
                  for name, reason in raw["left_out"].items()]
    lines += [f"  {what}: {count:,}" for what, count in record["mended"].items()]
    steps = [[f"  {step['name']}", *(f"{step[key]:,}" for key in ("rows", "users", "items"))]
             for step in record["steps"]]
    lines.append(_table(("  after", "ratings", "users", "items"), steps))
    without = ", ".join(f"{name} {count:,}" for name, count in record["items_without"].items())
    return "\n".join(lines + ([f"  items without: {without}"] if without else []))


def _comparison(preset: Preset, output: Path) -> Iterable[dict[str, Any]]:
    """What, ours, the paper's, and the difference: a share of the paper's count, or between sparsities."""
    for domain in preset.domains:
        counts = read_record(output / domain.name)["counts"]
        for what, paper in domain.published.items():
            yield _compared(f"{domain.name} {what}", counts[what], paper)
        if domain.sparsity is not None:
            sparsity = 1 - counts["ratings"] / (counts["users"] * counts["items"])
            yield {"what": f"{domain.name} sparsity", "ours": sparsity, "paper": domain.sparsity,
                   "difference": sparsity - domain.sparsity}
    if preset.overlap is not None:
        users = [_users(output / domain.name) for domain in preset.domains]
        yield _compared("users in both", len(set.intersection(*users)), preset.overlap)


def _users(folder: Path) -> set[str]:
    column = "user_id:token"
    return set(pl.read_csv(folder / f"{folder.name}.inter", separator="\t", quote_char=None, glob=False,
                           columns=[column], schema_overrides={column: pl.String})[column].unique())


def _compared(what: str, ours: int, paper: int) -> dict[str, Any]:
    return {"what": what, "ours": ours, "paper": paper, "difference": ours / paper - 1}


def _cells(row: Mapping[str, Any]) -> list[str]:
    if isinstance(row["paper"], float):
        return [row["what"], f"{row['ours']:.2%}", f"{row['paper']:.2%}", f"{row['difference']:+.2%}"]
    return [row["what"], f"{row['ours']:,}", f"{row['paper']:,}", f"{row['difference']:+.1%}"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, numbers to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
                     for line in lines)


def _described(name: str, preset: Preset) -> str:
    plain = asdict(Filters())
    chosen = [f"{name.replace('_', ' ')} {_value(value)}" for name, value in asdict(preset.filters).items()
              if value != plain[name]]
    core = [f"{preset.core}-core"] if preset.core else []
    lines = [f"  {domain.name} from {_files(domain, preset)}" for domain in preset.domains]
    head = f"{name}: {preset.table}, edition {preset.edition}; {', '.join(core + chosen) or 'all ratings'}"
    return "\n".join([head, *lines, f"  {preset.note}"])


def _value(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else f"{value}"


def _files(domain: Domain, preset: Preset) -> str:
    edition = EDITIONS[preset.edition]
    reviews = [edition.core, edition.full, None if preset.texts else edition.csv]
    names = " or ".join(name.format(domain.category) for name in reviews if name)
    return f"{names}{', and' if preset.metadata else ', and if there'} {edition.meta.format(domain.category)}"
