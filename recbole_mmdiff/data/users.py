"""One id space for the users of two domains."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recbole_mmdiff.data.features import PAD_TOKEN
from recbole_mmdiff.data.splits import choose
from recbole_mmdiff.errors import DataError, one_of


@dataclass(frozen=True)
class UserVocabulary:
    """Ids: 0 is [PAD], then the overlapping users, then target-only, then source-only ones.

    Attributes:
        target: tokens of the target domain's ids, (1 + overlap + target-only,).
        source: tokens of all ids in the source domain; '' at the target-only ones.
        num_overlap: how many users are linked: ids 1 .. num_overlap.
    """

    target: np.ndarray
    source: np.ndarray
    num_overlap: int

    @classmethod
    def build(cls, source: np.ndarray, target: np.ndarray, links: np.ndarray) -> "UserVocabulary":
        """From the sorted tokens of both domains and the links (m, 2), source token first."""
        target_only = np.setdiff1d(target, links[:, 1])
        source_only = np.setdiff1d(source, links[:, 0])
        return cls(
            target=np.concatenate([[PAD_TOKEN], links[:, 1], target_only]),
            source=np.concatenate([[PAD_TOKEN], links[:, 0], np.full(len(target_only), ""),
                                   source_only]),
            num_overlap=len(links))


def link_users(source: np.ndarray, target: np.ndarray, link_file: str | None) -> np.ndarray:
    """The links (m, 2), source token then target token, sorted by target token.

    Without a file, equal tokens are the same person.

    Raises:
        DataError: nobody is in both domains; the file names an unknown user or one user twice.
    """
    if link_file is None:
        both = np.intersect1d(source, target)
        if not len(both):
            raise DataError(
                f"no user is in both domains: source users look like {source[:3].tolist()}, target "
                f"users like {target[:3].tolist()}; set user_link_file_path if tokens differ")
        return np.stack([both, both], axis=1)
    links = _read_links(Path(link_file), source, target)
    return links[np.argsort(links[:, 1])]


def _read_links(path: Path, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    try:
        # Not str.splitlines: it also cuts at characters that tokens may hold, such as U+2028.
        header, *lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise DataError(f"user_link_file_path: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"user_link_file_path: {path} is not UTF-8 text ({error.reason})") from error
    known = (("source", set(source.tolist())), ("target", set(target.tolist())))
    first = header.split("\t")
    if len(first) == 2 and first[0] in known[0][1] and first[1] in known[1][1]:
        raise DataError(f"{path}, line 1: {header!r} is a link, but the first line is the header; "
                        f"put a line such as 'source<tab>target' before it")
    seen: tuple[set, set] = (set(), set())
    links = []
    for number, line in enumerate(lines, start=2):
        pair = line.split("\t")
        if len(pair) != 2:
            raise DataError(f"{path}, line {number}: {line!r} is not 'source user<tab>target user'")
        for token, (domain, users), before in zip(pair, known, seen, strict=True):
            if token not in users:
                raise DataError(f"{path}, line {number}: the user {token!r} is not in the "
                                f"{domain} domain")
            if token in before:
                raise DataError(f"{path}, line {number}: the {domain} user {token!r} is linked "
                                f"a second time")
            before.add(token)
        links.append(pair)
    if not links:
        raise DataError(f"{path}: holds no links, so no user is in both domains")
    return np.array(links)


def keep_links(links: np.ndarray, ratio: float, mode: str,
               seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Apply ``overlap_ratio``.

    Returns:
        the links that stay (m', 2); the source tokens and the target tokens whose rows go (both
        empty with ``overlap_mode: unlink``, where an unlinked user becomes two users).

    Raises:
        DataError: a ratio outside of (0, 1], or one that keeps nobody.
    """
    one_of("overlap_mode", mode, ("unlink", "split"))
    if not 0 < ratio <= 1:
        raise DataError(f"overlap_ratio: {ratio} must be above 0 and at most 1")
    count = round(ratio * len(links))
    if not count:
        raise DataError(f"overlap_ratio: {ratio} of {len(links)} links keeps no user linked")
    kept = choose(links[:, 1], count, seed, "links")
    lost = links[~kept]
    if mode == "unlink":
        return links[kept], lost[:0, 0], lost[:0, 1]
    target_goes = choose(lost[:, 1], len(lost) // 2, seed, "sides")
    return links[kept], lost[~target_goes, 0], lost[target_goes, 1]
