"""LACDR: low-dimensional alignment for cross-domain recommendation."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.diffusion import fold_in, keyed_uniform
from recbole_mmdiff.errors import ConfigError, one_of
from recbole_mmdiff.model.base import Stage
from recbole_mmdiff.model.mapping import MappingRecommender, perceptron


class LACDR(MappingRecommender):
    """Align the low-dimensional codes of both domains' user vectors.

    Two factorisations are trained apart. Each domain has an encoder E to ``code_size`` numbers and
    a decoder D back. The loss is the sum of

    - ``reconstruction_weight`` times |D_s(E_s(u_s)) - u_s|^2 + |D_t(E_t(u_t)) - u_t|^2 over the
      users of each domain,
    - ``alignment_weight`` times |E_s(u_s) - E_t(u_t)|^2 over the overlapping training users,
    - ``supervised_weight`` times |D_t(E_s(u_s)) - u_t|^2 over the same users,

    each the mean over users and dimensions. A cold user's target vector is D_t(E_s(u_s)): less can
    be overfitted in the low-dimensional space than in EMCDR's map of the whole one.

    Deviations:
        - The paper's loss has the first two terms only; with linear layers they leave the scale of
          the codes open, so that smaller codes and larger decoders make the alignment term vanish
          without any alignment. The supervised term is EMCDR's loss through the code;
          ``supervised_weight: 0.0`` takes it out.
        - Squared errors, as in EMCDR; the code of DiffCDR's comparison sums plain norms.
        - Reconstruction also uses the users of one domain only, as in the paper: for every
          overlapping user of a batch one user of each domain is drawn by (seed, epoch, sample).
          Target vectors are those of users with training rows alone; a held-out user's is noise.
          ``reconstruction_users: overlapping`` takes the batch itself (DiffCDR's comparison).
        - Linear encoders and decoders without bias, as in DiffCDR's comparison; perceptrons with
          ``autoencoder_hidden_sizes`` and ``autoencoder_bias``.
        - The base has biases and an L2 penalty, [p_u, b_u] is transferred, and vectors are
          standardised in each domain (``biases``, ``reg_weight``, ``standardize``), as in EMCDR.
        - The best epoch is chosen on validation users.
    """

    citation = ("Wang, Zhuang, Zhang, Wang, Zhou and He: Low-dimensional Alignment for Cross-Domain "
                "Recommendation. CIKM 2021.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.epochs = config["epochs"]
        self.weights = self._weights(config)
        self.reconstruction_users = one_of(
            "reconstruction_users", config["reconstruction_users"], ("all", "overlapping"))
        if config["code_size"] < 1:
            raise ConfigError(f"code_size: {config['code_size']!r} is too small, use 1 or more")
        sizes = [self.size, *config["autoencoder_hidden_sizes"], config["code_size"]]
        self.encoders, self.decoders = (
            nn.ModuleDict({domain: perceptron(order, nn.Tanh, bias=config["autoencoder_bias"])
                           for domain in ("source", "target")}) for order in (sizes, sizes[::-1]))
        source = dataset.source.inter_feat[dataset.source.uid_field]
        for domain, users in (("source", torch.unique(source)), ("target", dataset.users_with_rows())):
            self.register_buffer(f"{domain}_users", users, persistent=False)

    @staticmethod
    def _weights(config) -> tuple[float, float, float]:
        weights = (config["reconstruction_weight"], config["alignment_weight"],
                   config["supervised_weight"])
        if min(weights) < 0:
            raise ConfigError(f"reconstruction_weight, alignment_weight, supervised_weight: one of "
                              f"{weights} is negative, use 0 or more")
        if not weights[2] and not (weights[0] and weights[1]):
            raise ConfigError(f"reconstruction_weight, alignment_weight: {weights[:2]} with "
                              f"supervised_weight 0 trains no way from source to target; use both, "
                              f"or supervised_weight")
        return weights

    def stages(self) -> list[Stage]:
        """The two factorisations, then encoders and decoders over overlapping users."""
        parameters = [*self.encoders.parameters(), *self.decoders.parameters()]
        alignment = Stage("alignment", "overlap_users", (self.alignment_loss,), parameters,
                          self.epochs, prepare=self.freeze_spaces)
        return [*self.pretraining_stages(), alignment]

    def alignment_loss(self, interaction) -> Tensor:
        """Weighted sum of the three terms on a batch of overlapping users: a scalar."""
        user = interaction[self.USER_ID]
        source, target = self.source_vectors(user), self.target_vectors(user)
        code = self.encoders["source"](source)
        terms = (lambda: self.reconstruction(interaction),
                 lambda: functional.mse_loss(code, self.encoders["target"](target)),
                 lambda: functional.mse_loss(self.decoders["target"](code), target))
        return sum(weight * term() for weight, term in zip(self.weights, terms, strict=True)
                   if weight)

    def reconstruction(self, interaction) -> Tensor:
        """Mean squared error of D(E(u)), summed over the two domains: a scalar."""
        error = 0.0
        for domain, users in self.users_to_reconstruct(interaction).items():
            vectors = self._vectors(domain, users)
            decoded = self.decoders[domain](self.encoders[domain](vectors))
            error = error + functional.mse_loss(decoded, vectors)
        return error

    def users_to_reconstruct(self, interaction) -> dict[str, Tensor]:
        """(b,) users of each domain: those of the batch, or one drawn for each of them."""
        if self.reconstruction_users == "overlapping":
            return dict.fromkeys(("source", "target"), interaction[self.USER_ID])
        uniform = keyed_uniform(interaction["sample_id"], 2, fold_in(self.seed, self.epoch),
                                torch.float64)
        pools = {"source": self.source_users, "target": self.target_users}
        return {domain: pool[(uniform[:, column] * len(pool)).long()]
                for column, (domain, pool) in enumerate(pools.items())}

    def mapped(self, vectors: Tensor, user: Tensor) -> Tensor:
        """(b, size): D_t(E_s(u_s))."""
        return self.decoders["target"](self.encoders["source"](vectors))
