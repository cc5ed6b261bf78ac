"""Top-K recommendations of a trained run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType
from torch import Tensor
from tqdm import tqdm

from recbole_mmdiff.data.ids import id_mask
from recbole_mmdiff.errors import ConfigError, DataError, at_least, one_of
from recbole_mmdiff.evaluator.evaluator import repeatable
from recbole_mmdiff.evaluator.ranking import Requests, scored_chunks
from recbole_mmdiff.model.base import StagedRecommender
from recbole_mmdiff.quick_start import Run, load_run
from recbole_mmdiff.recommend.new_users import NewUsersView, read_new_users
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
        warm = id_mask(self.parts.observed.inter_feat[self.uid], len(self.users) + 1)
        return self.users[~warm[1:].numpy()]

    def recommend(self, users: Sequence[str] | None = None, k: int = 10, seen: str = "train",
                  skip_unknown: bool = False, progress: bool = False) -> Recommendations:
        """The best ``k`` items of each user that were not seen; fewer where there are no more.

        Args:
            users: tokens, each once; None takes all users of the target domain.
            seen: what is left out: the user's rows of training (``train``), also those of validation
                (``valid``, what the test's ranking leaves out), or also those of the test (``all``).
            skip_unknown: leave out unknown tokens.
            progress: show a progress bar.

        Raises:
            ConfigError: ``k`` or ``seen`` that is not accepted.
            DataError: an unknown user.
        """
        others = SEEN[one_of("seen", seen, SEEN)]
        ids, tokens = self._ids(self.users if users is None else users, skip_unknown)
        rows = self.parts.test.join(Interaction({self.uid: ids}))
        return self._ranked(self.model, rows, tokens, k, self.parts.seen_items(*others), progress)

    def recommend_new(self, path: str | Path, k: int = 10, skip_unknown: bool = False,
                      progress: bool = False) -> Recommendations:
        """The best ``k`` items of users who were not in training, from what they rated in the source domain.

        Args:
            path: the file of their ratings, as ``read_new_users`` reads it.
            skip_unknown: leave out users who rated no item of the source domain.
            progress: show a progress bar.

        Raises:
            ConfigError: ``k`` that is not accepted, or a model that cannot (the message says why).
            DataError: as ``read_new_users``.
        """
        if not self.config.cross_domain:
            raise ConfigError(f"new users: {self.config['model']} was trained on one domain, so there is no "
                              f"source domain that they could be known by; train it with them")
        if not isinstance(self.model, StagedRecommender):
            raise ConfigError(f"new users: {self.config['model']} is RecBole's, and knows the users of its "
                              f"training alone; train it with them, or use a model that transfers")
        tokens, rows = read_new_users(Path(path), self.parts.observed.source, skip_unknown)
        view = NewUsersView(self.model, rows, self.uid)
        places = Interaction({self.uid: torch.arange(len(tokens))})
        return self._ranked(view, places, tokens, k, None, progress)

    def _ids(self, users: Sequence[str], skip_unknown: bool) -> tuple[Tensor, np.ndarray]:
        """Ids (n,) and tokens (n,) of distinct users."""
        known = self.parts.test.field2token_id[self.uid]
        tokens = list(dict.fromkeys(map(str, users)))
        found = [token for token in tokens if 0 < known.get(token, 0) <= len(self.users)]
        unknown = [token for token in tokens if token not in set(found)]
        if unknown and not skip_unknown:
            raise DataError(f"users: {unknown[:_SHOWN]} are not in the target domain ({len(unknown)} of "
                            f"{len(tokens)} are not); leave them out (--skip-unknown), or give what they "
                            f"rated in the source domain (--new-users)")
        if not found:
            raise DataError("users: nobody is left to recommend to")
        return torch.tensor([known[token] for token in found]), np.array(found)

    def _ranked(self, model, rows: Interaction, tokens: np.ndarray, k: int, seen,
                progress: bool) -> Recommendations:
        """The table of the users ``tokens`` (n,), whose ``rows`` the model scores."""
        at_least("k", k, 1)
        test = self.parts.test
        requests = Requests(rows, None, seen and seen.to(model.device), self.uid, test.item_num,
                            test.num_candidates, test.get_item_feature().to(model.device))
        k = min(k, test.num_candidates - 1)
        scores, items = [], []
        with torch.no_grad(), repeatable(model, self.config["seed"]), \
                tqdm(total=len(tokens), unit="user", disable=not progress) as bar:
            for numbers, _, found in scored_chunks(model, requests, self.config["eval_chunk_elements"]):
                head = found.topk(k, dim=-1)
                scores.append(head.values.float().cpu())
                items.append(head.indices.cpu())
                bar.update(len(numbers))
        return self._table(tokens, torch.cat(items).numpy(), torch.cat(scores).numpy())

    def _table(self, tokens: np.ndarray, items: np.ndarray, scores: np.ndarray) -> Recommendations:
        """Of the heads (n, k) of the users ``tokens`` (n,); what is left out has no finite score."""
        kept = scores > -np.inf
        user, place = kept.nonzero()
        names = self.parts.test.field2id_token[self.iid]
        return Recommendations(tokens[user], names[items[kept]].astype(str), scores[kept], place + 1)


def _device_keys(device: str | None) -> dict:
    """The keys that put a model on a device.

    Raises:
        ConfigError: no such device.
    """
    if device is None:
        return {}
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ConfigError(f"--device: {device!r} is not known, use cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device: there is no {device} here; use cpu, or one of the "
                          f"{torch.cuda.device_count()} GPUs that are visible")
    return {"use_gpu": kind == "cuda", "gpu_id": number or "0"}
