"""MuSiC written out in numpy float64, one user and one item at a time."""

import math
from functools import cache

import numpy as np
import torch

from recbole_mmdiff.diffusion import fold_in, keyed_normal, keyed_uniform, posterior

STEPS, NOISE, CHAIN, USER_DROP, ITEM_DROP = range(5)    # What numbers are drawn for, in the model's order.
COLD_ITEMS = -1
ACTIVATIONS = {"tanh": np.tanh, "relu": lambda v: np.maximum(v, 0),
               "softmax": lambda v: np.exp(v) / np.exp(v).sum(),
               "silu": lambda v: v / (1 + np.exp(-v)), "none": lambda v: v}


@cache
def uniforms(key, size, seed):
    """(size,): the uniform numbers of a user or an item."""
    return keyed_uniform(torch.tensor([key]), size, seed, torch.float64)[0].numpy()


@cache
def normals(key, size, seed):
    return keyed_normal(torch.tensor([key]), size, seed)[0].double().numpy()


class ByHand:
    """The model of a configuration with copied weights; what a test changes in ``weights`` counts
    everywhere but in x_0, which takes no gradient."""

    def __init__(self, model, config):
        self.model, self.config = model, config
        self.weights = {name: value.detach().double().numpy().copy()
                        for name, value in model.named_parameters()}
        self.fixed = {name: value.copy() for name, value in self.weights.items()}
        self.betas = np.array(model.schedule.betas)
        self.profile, self.item_parts = cache(self._profile), cache(self._item_parts)

    def linear(self, name, vector, weights):
        return weights[f"{name}.weight"] @ vector + weights.get(f"{name}.bias", 0)

    def seed(self, purpose):
        return fold_in(self.model.seed, self.model.epoch, purpose)

    # ---- features -------------------------------------------------------------------------------

    def extracted(self, name, vector, key, purpose, learning, weights):
        """f: two layers, dropout between them."""
        act, rate = ACTIVATIONS[self.config["activation"]], self.config["dropout_prob"]
        hidden = act(self.linear(f"{name}.hidden", vector, weights))
        if learning:
            kept = uniforms(key, len(hidden), self.seed(purpose)) >= rate
            hidden = np.where(kept, hidden / (1 - rate), 0)
        return act(self.linear(f"{name}.output", hidden, weights))

    def _profile(self, domain, user):
        profiles = self.model.domains[domain]
        return np.concatenate([profiles.profiles(name, torch.tensor([user]))[0][0].double().numpy()
                               for name in profiles.profile_sizes])

    def _item_parts(self, item):
        target = self.model.domains["target"]
        return {name: target.items(name)[0][item].double().numpy() for name in target.item_sizes}

    def user_features(self, domain, user, learning=False, weights=None):
        number = 0 if domain == "target" or self.config["shared_user_extractor"] else 1
        return self.extracted(f"user_extractors.{number}", self.profile(domain, user), user, USER_DROP,
                              learning, self.weights if weights is None else weights)

    def as_cold(self, item):
        return uniforms(item, 1, self.seed(COLD_ITEMS))[0] < self.config["cold_item_rate"]

    def item_vector(self, item, learning=False):
        parts = [values * (0 if learning and name == "id" and self.as_cold(item) else 1)
                 for name, values in self.item_parts(item).items()]
        return self.extracted("item_extractor", np.concatenate(parts), item, ITEM_DROP, learning,
                              self.weights)

    # ---- diffusion ------------------------------------------------------------------------------

    def unet(self, x, step, condition):
        """Section 3.3.3: widths down, a middle, and up again with the outputs of the way down."""
        act, weights = ACTIVATIONS[self.config["unet_activation"]], self.weights
        half = self.config["time_embedding_size"] // 2
        time = (step - 1) * 1000 / len(self.betas)
        angles = [time * 10000**(-i / (half - 1)) for i in range(half)]
        shifts = weights["denoiser.time_linear.weight"] @ [*map(math.sin, angles), *map(math.cos, angles)]
        if condition is not None:
            x = x + condition
            shifts = shifts + weights["denoiser.condition_linear.weight"] @ condition

        def block(name, vector):
            nonlocal shifts
            found = self.linear(f"denoiser.{name}", vector, weights)
            own, shifts = shifts[:len(found)], shifts[len(found):]
            return act(found + own)

        levels, outputs = len(self.config["unet_sizes"]), []
        for level in range(levels):
            x = block(f"down.{level}", x)
            outputs.append(x)
        x = block("middle", x)
        for level in range(levels):
            x = block(f"up.{level}", np.concatenate([x, outputs.pop()]))
        return self.linear("denoiser.output", x, weights)

    def noise(self, key, seed):
        return normals(key, self.config["embedding_size"], seed)

    def step_of(self, user):
        """Users 2k and 2k + 1 have mirrored steps."""
        step = 1 + int(uniforms(user // 2, 1, self.seed(STEPS))[0] * len(self.betas))
        return step if user % 2 == 0 else len(self.betas) + 1 - step

    def diffusion_error(self, user, condition):
        """Eqs. 4, 10 and 11 of one user."""
        x0, step = self.user_features("target", user, weights=self.fixed), self.step_of(user)
        kept = np.prod(1 - self.betas[:step])
        x_t = math.sqrt(kept) * x0 + math.sqrt(1 - kept) * self.noise(user, self.seed(NOISE))
        return np.mean((x0 - self.unet(x_t, step, condition))**2)

    def generated(self, user, condition, learning=False, sample=0):
        """One reverse chain; ``one_step`` stops at its first prediction."""
        seed = self.seed(CHAIN) if learning else fold_in(self.config["seed"], CHAIN)
        key = user + sample * self.model.n_users

        def noise(number):
            drawn = self.noise(key, fold_in(seed, number))
            return drawn if self.config["sampling_noise"] else 0 * drawn

        steps = len(self.betas)
        x = noise(-1)
        for number, step in enumerate(range(steps, 0, -1)):
            x0 = self.unet(x, step, condition)
            if learning and self.config["rating_vector"] == "one_step":
                return x0
            mean, variance = posterior(torch.tensor(x0)[None], torch.tensor(x)[None], step,
                                       self.model.schedule)
            x = mean[0].numpy() + math.sqrt(variance) * noise(number)
        return x

    def user_vector(self, user, learning=False):
        if not self.model.in_source[user]:
            return self.user_features("target", user, learning)
        condition = self.user_features("source", user, learning)
        if not self.config["use_diffusion"]:
            return condition
        count = 1 if learning else self.config["num_samples"]
        return np.mean([self.generated(user, condition, learning, sample) for sample in range(count)], 0)

    # ---- ratings and losses ---------------------------------------------------------------------

    def rating(self, vector, item, learning=False):
        """<z, v>, and with biases mu + b_i + <w, z>."""
        score = vector @ self.item_vector(item, learning)
        if not self.config["biases"]:
            return score
        head = self.model.head
        bias = head.item_mean[item].item() + self.weights["head.item_bias.weight"][item, 0]
        if learning and self.as_cold(item):
            bias = 0
        return score + head.mean.item() + bias + self.weights["head.user_bias.weight"][0] @ vector

    def rating_error(self, rows, vector_of):
        vectors = {user: vector_of(user) for user, _, _ in rows}
        return np.mean([(self.rating(vectors[user], item, True) - rating)**2 for user, item, rating in rows])

    def feature_loss(self, rows):
        return self.rating_error(rows, lambda user: self.user_features("target", user, True))

    def side_loss(self, users):
        return np.mean([self.diffusion_error(user, None) for user in users])

    def joint_loss(self, rows, joint=False):
        """Eqs. 10, 12 and 13, and with ``joint`` Eq. 14."""
        users = {user for user, _, _ in rows}
        overlapping = {user for user in users if self.model.in_source[user]}
        if joint and self.config["rating_users"] == "overlapping":
            rows = [row for row in rows if row[0] in overlapping]
        error = self.rating_error(rows, lambda user: self.user_vector(user, True))
        if not self.config["use_diffusion"]:
            return error
        share = self.config["diffusion_weight"]
        loss = (1 - share) * error + share * np.mean([
            self.diffusion_error(user, self.user_features("source", user, True)) for user in overlapping])
        side = users - overlapping
        return loss + self.side_loss(side) if joint and side else loss
