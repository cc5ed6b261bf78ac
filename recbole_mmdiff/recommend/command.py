"""``recbole-mmdiff recommend RUN``: a file of recommendations."""

import sys
from argparse import Namespace
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
    progress = sys.stderr.isatty()
    if options.new_users is not None:
        found = recommender.recommend_new(Path(options.new_users), options.k, options.skip_unknown, progress)
    else:
        users = _users(recommender, options.users)
        found = recommender.recommend(users, options.k, options.seen, options.skip_unknown, progress)
    if not options.output:
        print(found.frame().to_csv(index=False), end="")
        return
    found.save(options.output)
    print(f"{len(found):,} recommendations for {len(set(found.user.tolist())):,} users: {options.output}")


def _users(recommender: Recommender, words: str) -> list[str]:
    """The tokens that ``--users`` stands for.

    Raises:
        DataError: nobody, or a file that is no text.
    """
    if words in ("cold", "all"):
        found = recommender.cold_users if words == "cold" else recommender.users
    elif Path(words).is_file():
        try:
            found = Path(words).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"--users: {words} is not UTF-8 text ({error.reason})") from error
    else:
        found = words.split(",")
    users = [user for user in map(str, found) if user]
    if not users:
        raise DataError(f"--users: {words} names nobody")
    return users
