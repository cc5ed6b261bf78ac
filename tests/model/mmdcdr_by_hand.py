"""MMDCDR written out in numpy, one user and one item at a time."""

import math

import numpy as np
import torch

from recbole_mmdiff.data.features import FeatureFile
from recbole_mmdiff.diffusion import dpm_solver, fold_in, keyed_normal

SMALL = {"embedding_size": 8, "id_embedding_size": 4, "hidden_size": 16, "time_embedding_size": 8,
         "num_evaluations": 6}
STEPS, NOISE, DROP, START = range(4)    # What numbers are drawn for, in the model's order.
SEED, EPOCH = 11, 2                     # of the models that are compared


def silu(values):
    return values / (1 + np.exp(-values))


def grouped(keys, values):
    found = {}
    for key, value in zip(keys, values, strict=True):
        found.setdefault(key, []).append(value)
    return found


def shrunken(values, damping):
    return sum(values) / (len(values) + damping)


class ByHand:
    """One user and one item at a time, in numpy, out of the files and copied weights."""

    def __init__(self, model, config, train):
        self.weights = {name: value.detach().double().numpy() for name, value
                        in model.named_parameters()}
        self.model, self.config, self.names = model, config, model.names
        self.features, self.profiles, self.means, self.biases = {}, {}, {}, {}
        users, domains = train.overlap_users().tolist(), {"target": train, "source": train.source}
        self.content = {modality: projected(modality, domains) for modality in self.names if modality != "id"}
        for name, domain in domains.items():
            raw = self.raw_profiles(name, domain)
            self.profiles[name] = {modality: columns_standardised(rows, users)
                                   if config["standardize"] else rows for modality, rows in raw.items()}

    def raw_profiles(self, name, domain):
        """modality -> {user: mean of what the user has rated, and two statistics of the ratings}."""
        users, items, ratings = (domain.inter_feat[f].tolist() for f in ("user_id", "item_id", "rating"))
        self.means[name] = np.mean(ratings)
        deviations = np.array(ratings) - self.means[name]
        self.biases[name] = {item: shrunken(given, 10) for item, given in grouped(items, deviations).items()}
        left = [value - self.biases[name][item] for value, item in zip(deviations, items, strict=True)]
        statistics = {user: [np.log1p(len(given)), shrunken(given, 5)]
                      for user, given in grouped(users, left).items()}
        self.features[name] = {modality: self.item_features(name, domain, modality)
                               for modality in self.names}
        found = {modality: {} for modality in self.names}
        for modality, features in self.features[name].items():
            for user, rated in grouped(users, items).items():
                rows = [features[item] for item in rated if item in features]
                if rows and user < self.model.n_users:
                    found[modality][user] = np.concatenate(
                        [*self.own_vector(name, modality, user), np.mean(rows, 0), statistics[user]])
        return found

    def item_features(self, name, domain, modality):
        if modality != "id":
            return self.content[modality][name]
        vectors = self.weights[f"domains.{name}.factorization.item_embedding.weight"]
        seen = sorted(set(domain.inter_feat["item_id"].tolist()))
        scale = np.sqrt(np.mean(vectors[seen]**2))
        return {item: vectors[item] / scale for item in seen}

    def own_vector(self, name, modality, user):
        tables = ("user_embedding", *["user_bias"] * self.config["biases"]) if modality == "id" else ()
        return [self.weights[f"domains.{name}.factorization.{table}.weight"][user] for table in tables]

    def linear(self, name, vector):
        return self.weights[f"{name}.weight"] @ vector + self.weights[f"{name}.bias"]

    def perceptron(self, name, vector):
        """Linear layers at the places 0, 2, 4 of a sequence."""
        vector = self.linear(f"{name}.0", vector)
        for place in range(2, 20, 2):
            if f"{name}.{place}.weight" in self.weights:
                vector = self.linear(f"{name}.{place}", silu(vector))
        return vector

    def noise(self, number, x, time, condition):
        """What the network of a modality predicts."""
        name = f"denoisers.{number}"
        half = self.weights[f"{name}.time_linear.weight"].shape[1] // 2
        angles = [time * 10000**(-i / (half - 1)) for i in range(half)]
        sinusoid = np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        hidden = x + self.linear(f"{name}.time_linear", sinusoid) \
            + self.linear(f"{name}.condition_linear", condition)
        for layer in range(len(self.model.denoisers[number].layers)):
            hidden = self.linear(f"{name}.layers.{layer}", silu(hidden) if layer else hidden)
        return x + hidden if self.config["residual"] else hidden

    def generated(self, number, condition, start):
        """Eq. 6 by two forwards, and the solver."""
        scale, steps = self.config["guidance_scale"], self.config["num_steps"]

        def denoise(x, t):
            time = (max(t * steps, 1) - 1) * 1000 / steps
            guided, free = (self.noise(number, x, time, c) for c in (condition, 0 * condition))
            return free + scale * (guided - free)

        return dpm_solver(denoise, start, self.model.schedule, self.config["num_evaluations"],
                          self.config["solver_order"])

    def starts(self, number, user, seed):
        """One for each sample; the mean of all of them without noise."""
        size = self.weights[f"denoisers.{number}.time_linear.weight"].shape[0]
        if not self.config["sampling_noise"]:
            return [np.zeros(size)]
        return [keyed_normal(torch.tensor([user]), size, fold_in(seed, sample))[0].double().numpy()
                for sample in range(self.config["num_samples"])]

    def modal_user(self, number, user, learning):
        """Eq. 8; None for a user who knows no item of the modality."""
        seed = fold_in(SEED, EPOCH, START, number) if learning \
            else fold_in(self.config["seed"], START, number)
        source, target = (self.profiles[name][self.names[number]] for name in ("source", "target"))
        if not self.model.in_source[user]:
            profile = target.get(user)
        elif user in source:
            profile = np.mean([self.generated(number, source[user], start)
                               for start in self.starts(number, user, seed)], 0)
        else:
            profile = None
        return None if profile is None else self.perceptron(f"alignments.{number}", profile)

    def modal_item(self, number, item):
        row = self.features["target"][self.names[number]].get(item)
        return None if row is None else self.linear(f"item_layers.{number}", row)

    def fused(self, side, vectors):
        """Eq. 11."""
        size = self.config["embedding_size"]
        filled = [np.zeros(size) if vector is None else vector for vector in vectors]
        return self.linear(f"{side}_fusion", np.concatenate(filled))

    def user_side(self, user, learning):
        return [self.modal_user(number, user, learning) for number in range(len(self.names))]

    def item_side(self, item, cold=False):
        """Without ids for an item that counts as cold."""
        return [None if cold and name == "id" else self.modal_item(number, item)
                for number, name in enumerate(self.names)]

    def rating(self, user_side, item_side, item, cold=False):
        """Eq. 12, and biases where there are any; without the item's if it counts as cold."""
        z, v = self.fused("user", user_side), self.fused("item", item_side)
        if not self.config["biases"]:
            return z @ v
        start = z @ v + self.weights["head.user_bias.weight"][0] @ z + self.means["target"]
        own = self.biases["target"].get(item, 0) + self.weights["head.item_bias.weight"][item, 0]
        return start if cold else start + own


def columns_standardised(rows, users):
    """Profiles centred and scaled by those of the given users."""
    table = np.stack([rows[user] for user in users if user in rows])
    return {user: (row - table.mean(0)) / table.std(0) for user, row in rows.items()}


def projected(modality, domains):
    """domain -> {item: W_m of its features} (Eq. 1), W_m by a singular value decomposition of those of all
    items of training rows."""
    features, seen = {}, []
    for name, domain in domains.items():
        tokens = domain.field2id_token["item_id"].tolist()
        file = FeatureFile.open(domain.dataset_path, domain.dataset_name, modality)
        features[name] = {tokens.index(token): row.astype(np.float64)
                          for token, row in zip(file.tokens, file.matrix, strict=True)}
        trained = set(domain.inter_feat["item_id"].tolist())
        seen += [row for item, row in features[name].items() if item in trained]
    mean = np.mean(seen, 0)
    _, lengths, axes = np.linalg.svd(seen - mean)
    axes *= np.array([np.sign(axis[np.abs(axis).argmax()]) for axis in axes])[:, None]
    scale = np.sqrt(np.mean(lengths**2 / len(seen)))
    return {name: {item: axes @ (row - mean) / scale for item, row in rows.items()}
            for name, rows in features.items()}
