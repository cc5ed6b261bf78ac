"""t-SNE pictures of embeddings: generated vectors beside true ones, items beside their users."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recbole_mmdiff.errors import DataError
from recbole_mmdiff.report.figures import GREY, MARKERS, colours, legend, new_figure, save, shorten, styled
from recbole_mmdiff.report.results import read_table

EMBEDDINGS = "embeddings.npz"
TRUTH, SOURCE = "truth", "source"
#: "user", or "user <name>": the vector of one; "items of user <name>" has the same colour
USER, ITEMS_OF = "user", "items of "
POINTS_A_KIND = 1000
LEAST_POINTS = 4
PANELS_IN_A_ROW = 3


@dataclass(frozen=True)
class Embeddings:
    """Vectors to draw: ``vectors`` (n, d), and for each its ``kind`` (n,) and ``panel`` (n,)."""

    vectors: np.ndarray
    kind: np.ndarray
    panel: np.ndarray

    @classmethod
    def load(cls, path: Path) -> "Embeddings":
        """Raises DataError if the file cannot be read or its arrays do not fit together."""
        arrays = read_table(path)
        for name in ("vectors", "kind", "panel"):
            if name not in arrays:
                raise DataError(f"{path}: {name}: is missing")
        vectors, kind, panel = arrays["vectors"], arrays["kind"], arrays["panel"]
        if vectors.ndim != 2 or vectors.dtype.kind not in "fiu" or not vectors.size:
            raise DataError(f"{path}: vectors: must be rows of numbers, not {vectors.dtype} of shape "
                            f"{vectors.shape}")
        for name, labels in (("kind", kind), ("panel", panel)):
            if labels.shape != vectors.shape[:1] or labels.dtype.kind != "U":
                raise DataError(f"{path}: {name}: must be one text for each of the {len(vectors)} vectors")
        if not np.isfinite(vectors).all():
            raise DataError(f"{path}: vectors: holds values that are not finite")
        return cls(vectors.astype(np.float64), kind, panel)


def project(vectors: np.ndarray) -> np.ndarray | None:
    """(m, d) vectors to (m, 2) by t-SNE, the same at every call; None if nothing can be told apart."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(vectors) < LEAST_POINTS or not np.ptp(vectors, axis=0).any():
        return None
    # The start in principal components takes two of them.
    vectors = np.hstack([vectors, np.zeros((len(vectors), 1))]) if vectors.shape[1] == 1 else vectors
    perplexity = min(30, (len(vectors) - 1) / 3)
    # One thread: sums in a fixed order, and no waiting for threads on a busy machine.
    with threadpool_limits(1):
        return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(vectors)


def choose_points(kind: np.ndarray, most: int = POINTS_A_KIND) -> np.ndarray:
    """Indices, ascending, of at most ``most`` points of each kind, the same at every call."""
    draw = np.random.default_rng(0)
    chosen = [np.flatnonzero(kind == name) for name in dict.fromkeys(kind.tolist())]
    return np.sort(np.concatenate([draw.choice(rows, most, replace=False) if len(rows) > most else rows
                                   for rows in chosen]))


@styled
def embedding_plot(path_in: Path, path: Path, pdf: bool = False) -> list[Path]:
    """A t-SNE panel for each ``panel`` of the file, in the order of their first appearance.

    ``truth`` is drawn as black triangles, ``source`` as grey dots, every other kind in colour. A user
    (``user``, black, or ``user <name>``) is a star, in the colour of ``items of user <name>``.

    Args:
        path_in: the ``.npz``.
        path: of the picture, without suffix.

    Raises:
        DataError: see ``Embeddings.load``.
    """
    found = Embeddings.load(path_in)
    panels, kinds = (list(dict.fromkeys(labels.tolist())) for labels in (found.panel, found.kind))
    styles, handles = _styles(kinds), {}
    columns = 2 if len(panels) == 4 else min(len(panels), PANELS_IN_A_ROW)
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(2.2 + 3.4 * columns, 0.3 + 3.4 * lines)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, number + 1)
        axes.set(title=shorten(panel, 36), xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color="#cccccc")
        rows = np.flatnonzero(found.panel == panel)
        rows = rows[choose_points(found.kind[rows])]
        points = project(found.vectors[rows])
        if points is None:
            axes.text(0.5, 0.5, "too few different points", ha="center", transform=axes.transAxes)
            continue
        # Grey below, the truth and users on top, so that nothing hides what is compared.
        for kind in sorted(set(found.kind[rows]),
                           key=lambda name: (_is_user(name), name == TRUTH, name != SOURCE, name)):
            part = points[found.kind[rows] == kind]
            handles[kind] = axes.scatter(*part.T, linewidths=0, **styles[kind])
    shown = [kind for kind in kinds if kind in handles]
    legend(figure, [handles[kind] for kind in shown], shown, markerscale=1.8)
    return save(figure, path, pdf)


def _is_user(kind: str) -> bool:
    return kind.split(" ")[0] == USER


def _styles(kinds: list[str]) -> dict[str, dict]:
    styles = {SOURCE: {"color": GREY, "marker": "o", "s": 9, "alpha": 0.6},
              TRUTH: {"color": "black", "marker": "^", "s": 14, "alpha": 0.8},
              USER: {"color": "black", "marker": "*", "s": 80}}
    others = [kind for kind in kinds if kind not in styles]
    owners = list(dict.fromkeys(kind.removeprefix(ITEMS_OF) for kind in others))
    markers = MARKERS.replace("*", "")
    for number, (owner, colour) in enumerate(zip(owners, colours(len(owners)), strict=True)):
        dot = {"color": [colour], "marker": markers[number % len(markers)], "s": 14, "alpha": 0.8}
        styles[ITEMS_OF + owner] = dot
        styles[owner] = {**styles[USER], "color": [colour]} if _is_user(owner) else dot
    return styles
