"""Bias: the contract, and the estimates by plain loops."""

from contract import ModelContract


class TestBias(ModelContract):
    """Closed form: nothing is trained."""

    model = "Bias"
    best_rmse_ratio = 0.9
