"""``recbole-mmdiff recommend RUN``: a file of recommendations."""

import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from recbole_mmdiff.errors import ConfigError, DataError, at_least, one_of
from recbole_mmdiff.recommend.recommender import SEEN, Recommender
from recbole_mmdiff.recommend.table import check_output


def main(options: Namespace) -> None:
    """Write the recommendations that the options ask for, or print them as CSV.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is written.
    """
    if (options.users is None) == (options.new_users is None):
        raise ConfigError("recommend: give either --users=WHO or --new-users=FILE")
    at_least("-k", options.k, 1)
    one_of("--seen", options.seen, SEEN)
    if options.output:
        check_output(options.output)
    recommender = Recommender.load(options.run, options.device)
    if options.new_items is not None:
        recommender.add_items(options.new_items)
    sets = {"all": recommender.items, "cold": recommender.cold_items, "new": recommender.new_items}
    shared = {"k": options.k, "skip_unknown": options.skip_unknown, "progress": sys.stderr.isatty(),
              "items": None if options.items == "all" else _tokens("--items", options.items, sets)}
    if options.new_users is not None:
        found = recommender.recommend_new(Path(options.new_users), **shared)
    else:
        sets = {"all": recommender.users, "cold": recommender.cold_users}
        found = recommender.recommend(_tokens("--users", options.users, sets), seen=options.seen, **shared)
    if not options.output:
        print(found.frame().to_csv(index=False), end="")
        return
    found.save(options.output)
    print(f"{len(found):,} recommendations for {len(set(found.user.tolist())):,} users: {options.output}")


def _tokens(option: str, words: str, sets: Mapping[str, Sequence[str]]) -> list[str]:
    """The tokens that an option stands for: a set by its name, the lines of a file, or what stands there.

    Raises:
        DataError: nothing, or a file that is no text.
    """
    if words in sets:
        found = sets[words]
    elif os.path.isfile(words):     # A long list of tokens is no path at all, which pathlib does not take.
        try:
            found = Path(words).read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{option}: {words} is not UTF-8 text ({error.reason})") from error
    else:
        found = words.split(",")
    tokens = [token for token in map(str, found) if token]
    if not tokens:
        raise DataError(f"{option}: {words} names {'nobody' if option == '--users' else 'nothing'}")
    return tokens
