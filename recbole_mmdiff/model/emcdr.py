"""EMCDR: embedding and mapping."""

from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.model.base import Stage
from recbole_mmdiff.model.mapping import MappingRecommender, perceptron


class EMCDR(MappingRecommender):
    """Map source user vectors to target ones by least squares over the overlapping users.

    Two factorisations are trained apart; f minimises the mean of |f(u_s) - u_t|^2 over the
    overlapping training users (Man et al. 2017, Eq. 9), linear, or a perceptron with one hidden
    layer of tanh (their MLP) with ``mapping_hidden_sizes``.

    Deviations:
        - The base factorisation has biases and an L2 penalty, and the vector that is mapped is
          [p_u, b_u]: without it a cold user's bias, most of what can be known, is lost. The
          papers' plain form: ``biases: False, init_std: 1.0, reg_weight: 0.0, standardize: False``.
        - Vectors are standardised in each domain before the mapping (``standardize``), since the
          bias and the factors have different scales; False is the papers' form.
        - The best epoch of the mapping is chosen on validation users.
    """

    citation = ("Man, Shen, Jin and Cheng: Cross-Domain Recommendation: An Embedding and Mapping "
                "Approach. IJCAI 2017.")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.epochs = config["epochs"]
        sizes = [self.size, *config["mapping_hidden_sizes"], self.size]
        self.mapping = perceptron(sizes, nn.Tanh, bias=config["mapping_bias"])

    def stages(self) -> list[Stage]:
        """The two factorisations, then the mapping over overlapping users."""
        mapping = Stage("mapping", "overlap_users", (self.mapping_loss,),
                        self.mapping.parameters(), self.epochs, prepare=self.freeze_spaces)
        return [*self.pretraining_stages(), mapping]

    def mapping_loss(self, interaction) -> Tensor:
        """Eq. 9 on a batch of users."""
        user = interaction[self.USER_ID]
        return functional.mse_loss(self.transfer(user), self.target_vectors(user))

    def mapped(self, vectors: Tensor, user: Tensor) -> Tensor:
        """(b, size): f(u_s)."""
        return self.mapping(vectors)
