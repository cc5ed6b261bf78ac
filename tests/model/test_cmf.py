"""CMF: the contract, and the union that it is trained on."""

from contract import ModelContract


class TestCMF(ModelContract):
    """MF on both domains."""

    model = "CMF"
    accurate_keys = {"epochs": 60, "learning_rate": 0.01, "reg_weight": 0.02}
    best_rmse_ratio = 0.85
