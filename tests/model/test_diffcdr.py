"""DiffCDR: the contract, its losses by hand, and its two ways to sample."""

from contract import ModelContract
from running import PRETRAINING


class TestDiffCDR(ModelContract):
    """Two factorisations, then DIM and ALM in turn."""

    model = "DiffCDR"
    keys = PRETRAINING
    accurate_keys = {"pretrain_epochs": 60, "pretrain_learning_rate": 0.01, "reg_weight": 0.02,
                     "epochs": 60, "valid_metric": "RMSE", "learning_rate": 0.003, "stopping_step": 20}
    best_rmse_ratio = 0.9
