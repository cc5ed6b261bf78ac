"""MF: the contract, and its loss by hand."""

from contract import ModelContract


class TestMF(ModelContract):
    """It does not transfer: a cold-start user gets about the item mean."""

    model = "MF"
    accurate_keys = {"epochs": 60, "learning_rate": 0.01, "reg_weight": 0.02}
    transfers = False
    best_rmse_ratio = 1.05
