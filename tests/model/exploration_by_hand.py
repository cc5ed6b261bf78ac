"""SIEOUG's item exploration by slow loops, item by item and group by group."""

import numpy as np

#: of the module, on the tiny pair whose items tell what their users like
EXPLORED = {"item_exploration": True, "exploration_layers": 2, "modalities": ["text", "image"], "knn_k": 4,
            "num_clusters": 3}


def joined_by_hand(exploration, items: np.ndarray) -> np.ndarray:
    """V (n_items, d) out of a model's own vectors of items (Eqs. 12 to 15)."""
    graph, gamma = exploration.item_graph.to_dense().numpy(), exploration.gamma.numpy()
    similar, grouped = [items], [items]
    for layer in exploration.weights:
        similar.append(np.stack([sum(weight * similar[-1][other] for other, weight in enumerate(row))
                                 for row in graph]))
        grouped.append(told_by_groups(gamma, grouped[-1]) @ layer.weight.detach().numpy().T)
    parts = np.stack([items, np.mean(similar, 0), np.mean(grouped, 0)])
    joined = []
    for item in range(len(items)):
        logits = [part @ weight for part, weight
                  in zip(parts[:, item], exploration.attention.detach().numpy(), strict=True)]
        shares = np.exp(logits) / np.exp(logits).sum()
        joined.append(sum(share * part for share, part in zip(shares, parts[:, item], strict=True)))
    return np.stack(joined)


def told_by_groups(gamma: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Items tell their groups, groups their items; an item in no group hears nothing (Eq. 13)."""
    told, size = np.zeros_like(vectors), np.sqrt(gamma.sum(1))
    members = [item for item in range(len(vectors)) if size[item]]
    for group in gamma.T:
        mean = sum(group[item] / size[item] * vectors[item] for item in members) / group.sum()
        for item in members:
            told[item] += group[item] / size[item] * mean
    return told
