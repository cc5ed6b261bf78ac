"""The law of degree-sensitive edge keeping against exact probabilities and torch.multinomial."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import scipy.stats
import torch

from recbole_mmdiff.graph import keep_by_degree

USERS, ITEMS = torch.tensor([(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 3)]).T
SIZES = (3, 4)
COUNT = len(USERS)
DRAWS, KEPT, SHARE = 20_000, 3, 0.5


def weights():
    """1 / sqrt(d_user d_item), counted in the list of edges."""
    users, items = USERS.tolist(), ITEMS.tolist()
    return np.array([(users.count(user) * items.count(item)) ** -0.5
                     for user, item in zip(users, items, strict=True)])


def exact_law():
    """The probability of every sequence of KEPT edges, one drawn after the other."""
    law, weight = {}, weights()
    for sequence in permutations(range(COUNT), KEPT):
        left, probability = weight.sum(), 1.0
        for edge in sequence:
            probability *= weight[edge] / left
            left -= weight[edge]
        law[sequence] = probability
    return law


@pytest.fixture(scope="module")
def sequences():
    generator = torch.Generator().manual_seed(11)
    uniforms = torch.rand(DRAWS, COUNT, generator=generator)
    return [tuple(keep_by_degree(USERS, ITEMS, *SIZES, SHARE, row).tolist()) for row in uniforms]


def test_sequences_have_their_exact_law(sequences):
    law, counts = exact_law(), Counter(sequences)
    assert sum(law.values()) == pytest.approx(1)
    observed = [counts[sequence] for sequence in law]
    assert sum(observed) == DRAWS
    expected = [DRAWS * probability for probability in law.values()]
    assert min(expected) > 5
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3
    uniform = [DRAWS / len(law)] * len(law)
    assert scipy.stats.chisquare(observed, uniform).pvalue < 1e-12       # The test can tell laws apart.


def test_sequences_as_of_torch_multinomial(sequences):
    table = torch.tensor(weights()).expand(DRAWS, COUNT)
    drawn = torch.multinomial(table, KEPT, generator=torch.Generator().manual_seed(12))
    ours, theirs = Counter(sequences), Counter(map(tuple, drawn.tolist()))
    both = np.array([[counts[sequence] for sequence in exact_law()] for counts in (ours, theirs)])
    assert scipy.stats.chi2_contingency(both).pvalue > 1e-3


def test_inclusion_frequencies(sequences):
    expected = np.zeros(COUNT)
    for sequence, probability in exact_law().items():
        expected[list(sequence)] += probability
    found = np.bincount(np.concatenate(sequences), minlength=COUNT) / DRAWS
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(found - expected) < 4 * deviation).all()


@pytest.mark.parametrize("share, kept", [(0, 0), (0.1, 0), (0.2, 1), (0.99, 5), (1, 6)])
def test_number_of_edges_kept(share, kept):
    found = keep_by_degree(USERS, ITEMS, *SIZES, share, torch.rand(COUNT))
    assert found.dtype == torch.int64 and len(found) == len(found.unique()) == kept


def test_the_uniforms_alone_decide():
    uniforms = torch.tensor([0.5, 0.5, 0.9, 0.0, 0.5, 0.5])
    first, again = (keep_by_degree(USERS, ITEMS, *SIZES, 1.0, uniforms).tolist() for _ in range(2))
    times = [np.inf if not u else -np.log(u) / w for u, w in zip(uniforms.tolist(), weights(), strict=True)]
    assert first == again == sorted(range(COUNT), key=lambda edge: (times[edge], edge))
    assert first[-1] == 3           # The uniform number 0 comes last.


@pytest.mark.parametrize("share, uniforms, message", [
    (1.5, torch.rand(COUNT), "share: 1.5 is no share; use a number from 0 to 1"),
    (0.5, torch.rand(2), r"uniforms has the shape \(2,\); accepted: \(6,\), one an edge"),
])
def test_errors_of_keep_by_degree(share, uniforms, message):
    with pytest.raises(ValueError, match=message):
        keep_by_degree(USERS, ITEMS, *SIZES, share, uniforms)
