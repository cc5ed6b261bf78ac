"""Top-K recommendations of a trained run."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType
from torch import Tensor
from tqdm import tqdm

from recbole_mmdiff.data.ids import id_mask
from recbole_mmdiff.data.new_items import NewItems, read_new_items
from recbole_mmdiff.errors import ConfigError, DataError, at_least, one_of
from recbole_mmdiff.evaluator.evaluator import repeatable
from recbole_mmdiff.evaluator.ranking import Requests, best, scored_chunks
from recbole_mmdiff.model.base import StagedRecommender
from recbole_mmdiff.negatives import KnownItems
from recbole_mmdiff.quick_start import Run, load_run
from recbole_mmdiff.recommend.new_users import read_new_users
from recbole_mmdiff.recommend.scoring import Scorer
from recbole_mmdiff.recommend.table import Recommendations

#: what counts as seen: rows of training; also of validation, as a test leaves them out; also of the test
SEEN = {"train": (), "valid": ("valid",), "all": ("valid", "test")}
_SHOWN = 5


class Recommender:
    """The target items that a trained model recommends, as the evaluation ranks them.

    Args:
        run: a finished run, as ``run`` and ``load_run`` give it.

    Raises:
        ConfigError: the model ranks for sequences, not for users.
    """

    def __init__(self, run: Run):
        if run.config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            raise ConfigError(f"recommend: {run.config['model']} ranks what follows a sequence, not what a "
                              f"user would like; use a model of another kind")
        self.run, self.model, self.parts, self.config = run, run.model, run.parts, run.config
        self.uid, self.iid = self.parts.test.uid_field, self.parts.test.iid_field
        self.added: NewItems | None = None

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None) -> "Recommender":
        """The model of a run folder, which may be a copy; nothing in it is run.

        Args:
            folder: of the run.
            device: ``cpu``, ``cuda`` or ``cuda:N``; None as the run's configuration says.

        Raises:
            ConfigError, DataError, CheckpointError: as ``load_run``.
        """
        return cls(load_run(folder, overrides=_device_keys(device)))

    @property
    def users(self) -> np.ndarray:
        """The tokens of all users of the target domain."""
        return self.parts.test.field2id_token[self.uid][1:].astype(str)

    @property
    def cold_users(self) -> np.ndarray:
        """The tokens of those without a target training row."""
        return self.users[self._without_rows(self.uid, len(self.users))]

    @property
    def known_items(self) -> np.ndarray:
        """The tokens of all items of the target domain."""
        test = self.parts.test
        return test.field2id_token[self.iid][1:test.num_candidates].astype(str)

    @property
    def new_items(self) -> np.ndarray:
        """The tokens of the items that ``add_items`` added."""
        return self.added.tokens if self.added is not None else np.array([], dtype=str)

    @property
    def items(self) -> np.ndarray:
        """The tokens of all items that are ranked: known ones, then new ones."""
        return np.concatenate([self.known_items, self.new_items])

    @property
    def cold_items(self) -> np.ndarray:
        """The tokens of those without a training row, new ones among them."""
        known = self.known_items
        return np.concatenate([known[self._without_rows(self.iid, len(known))], self.new_items])

    def _without_rows(self, field: str, count: int) -> np.ndarray:
        """(count,) bool: which of the ids from 1 on stand in no training row."""
        return ~id_mask(self.parts.observed.inter_feat[field], count + 1)[1:].numpy()

    def add_items(self, folder: str | Path) -> None:
        """From now on also rank items outside of the data, by their features alone.

        Args:
            folder: of their features, as ``read_new_items`` reads it. Items that were added before go.

        Raises:
            ConfigError: the model cannot (the message says why).
            DataError: as ``read_new_items``.
        """
        if not isinstance(self.model, StagedRecommender):
            raise ConfigError(f"new items: {self.config['model']} is RecBole's, and knows the items of its "
                              f"training alone; train it with them, or use a model that reads features")
        read = self.parts.observed.features_read
        names = [name for name, field in read.items() if field == self.iid]
        if not names:
            raise ConfigError(f"new items: {self.config['model']} read no features of items in this run, so "
                              f"there is nothing that new ones could be known by; train it with them")
        added = read_new_items(Path(folder), self.parts.train, names, self.config["modality_policy"])
        Scorer(self.model, self.uid, None, added)       # Refused now, if at all.
        self.added = added

    def recommend(self, users: Sequence[str] | None = None, k: int = 10, seen: str = "train",
                  skip_unknown: bool = False, progress: bool = False,
                  items: Sequence[str] | None = None) -> Recommendations:
        """The best ``k`` items of each user that were not seen; fewer where there are no more.

        Args:
            users: tokens; None takes all users of the target domain. Nobody is listed twice.
            seen: what is left out: the user's rows of training (``train``), also those of validation
                (``valid``, what the test's ranking leaves out), or also those of the test (``all``).
            skip_unknown: leave out unknown tokens.
            progress: show a progress bar.
            items: tokens of what alone is ranked; None takes ``self.items``.

        Raises:
            ConfigError: ``k`` or ``seen`` that is not accepted.
            DataError: an unknown user or item.
        """
        others = SEEN[one_of("seen", seen, SEEN)]
        tokens = _distinct("users", self.users if users is None else users, self.users, skip_unknown,
                           "--new-users with what they rated in the source domain")
        known = self.parts.test.field2token_id[self.uid]
        rows = self.parts.test.join(Interaction({self.uid: torch.tensor([known[token] for token in tokens])}))
        model = self.model if self.added is None else Scorer(self.model, self.uid, None, self.added)
        return self._ranked(model, rows, tokens, k, self.parts.seen_items(*others),
                            self._places(items, skip_unknown), progress)

    def recommend_new(self, path: str | Path, k: int = 10, skip_unknown: bool = False,
                      progress: bool = False, items: Sequence[str] | None = None) -> Recommendations:
        """The best ``k`` items of users who were not in training, from what they rated in the source domain.

        Args:
            path: the file of their ratings, as ``read_new_users`` reads it.
            skip_unknown: leave out users who rated no item of the source domain, and unknown ``items``.
            progress: show a progress bar.
            items: as in ``recommend``.

        Raises:
            ConfigError: ``k`` that is not accepted, or a model that cannot (the message says why).
            DataError: as ``read_new_users``; an unknown item.
        """
        if not self.config.cross_domain:
            raise ConfigError(f"new users: {self.config['model']} was trained on one domain, so there is no "
                              f"source domain that they could be known by; train it with them")
        if not isinstance(self.model, StagedRecommender):
            raise ConfigError(f"new users: {self.config['model']} is RecBole's, and knows the users of its "
                              f"training alone; train it with them, or use a model that transfers")
        places = self._places(items, skip_unknown)
        tokens, rows = read_new_users(Path(path), self.parts.observed.source, skip_unknown)
        requests = Interaction({self.uid: torch.arange(len(tokens))})
        return self._ranked(Scorer(self.model, self.uid, rows, self.added), requests, tokens, k, None, places,
                            progress)

    def _places(self, items: Sequence[str] | None, skip_unknown: bool) -> Tensor | None:
        """Columns of scores (n,), in order, of item tokens; None for all."""
        if items is None:
            return None
        ranked = self.items
        tokens = _distinct("items", items, ranked, skip_unknown, "--new-items with their features")
        # Ids begin behind [PAD], new ones behind all that the model scores.
        ids = np.arange(1, len(ranked) + 1)
        ids[len(self.known_items):] += self.parts.test.item_num - 1 - len(self.known_items)
        return torch.from_numpy(ids[np.isin(ranked, tokens)])

    def _ranked(self, model, rows: Interaction, tokens: np.ndarray, k: int, seen: KnownItems | None,
                places: Tensor | None, progress: bool) -> Recommendations:
        """The table of the users ``tokens`` (n,), whose ``rows`` the model scores, of the items at ``places``
        (m,)."""
        at_least("k", k, 1)
        test = self.parts.test
        added = len(self.new_items)
        requests = Requests(rows, None, seen and seen.to(model.device), self.uid, test.item_num + added,
                            test.item_num + added if added else test.num_candidates,
                            test.get_item_feature().to(model.device))

        def head(_numbers, _rows, scores: Tensor) -> tuple[Tensor, Tensor]:
            if places is not None:
                scores = scores[:, places.to(scores.device)]
            values, columns = best(scores, min(k, scores.shape[1]))
            return values.float().cpu(), columns.cpu()

        heads = []
        with torch.no_grad(), repeatable(model, self.config["seed"]), \
                tqdm(total=len(tokens), unit="user", disable=not progress) as bar:
            for numbers, found in scored_chunks(model, requests, self.config["eval_chunk_elements"], head):
                heads.append(found)
                bar.update(len(numbers))
        values, columns = (torch.cat(parts) for parts in zip(*heads, strict=True))
        return self._table(tokens, columns if places is None else places[columns], values)

    def _table(self, tokens: np.ndarray, items: Tensor, scores: Tensor) -> Recommendations:
        """Of the heads (n, k) of the users ``tokens`` (n,); what is left out has no finite score."""
        user, place = (scores > -torch.inf).nonzero(as_tuple=True)
        names = np.concatenate([self.parts.test.field2id_token[self.iid].astype(str), self.new_items])
        return Recommendations(tokens[user.numpy()], names[items[user, place].numpy()],
                               scores[user, place].numpy(), place.numpy() + 1)


def _distinct(what: str, tokens: Sequence[str], known: np.ndarray, skip: bool, instead: str) -> np.ndarray:
    """Tokens (n,) in their order, each once.

    Raises:
        DataError: one is not ``known``, unless such are skipped; or none is left.
    """
    tokens = list(dict.fromkeys(map(str, tokens)))
    accepted = set(known.tolist())
    unknown = [token for token in tokens if token not in accepted]
    if unknown and not skip:
        raise DataError(f"{what}: {unknown[:_SHOWN]} are not in the target domain ({len(unknown)} of "
                        f"{len(tokens)} are not); leave them out (--skip-unknown), or use {instead}")
    if len(unknown) == len(tokens):
        raise DataError(f"{what}: nobody is left to recommend to" if what == "users" else
                        f"{what}: nothing is left to recommend")
    return np.array([token for token in tokens if token in accepted])


def _device_keys(device: str | None) -> dict:
    """The keys that put a model on a device.

    Raises:
        ConfigError: no such device.
    """
    if device is None:
        return {}
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", device):
        raise ConfigError(f"--device: {device!r} is not known, use cpu, cuda or cuda:N")
    kind, _, number = device.partition(":")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device: there is no {device} here; use cpu, or one of the "
                          f"{torch.cuda.device_count()} GPUs that are visible")
    return {"use_gpu": kind == "cuda", "gpu_id": number or "0"}
