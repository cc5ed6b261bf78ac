"""EMCDR: the contract, and the loss of the mapping by hand."""

from contract import ModelContract
from running import PRETRAINING


class TestEMCDR(ModelContract):
    """Two factorisations and a linear map."""

    model = "EMCDR"
    keys = PRETRAINING
    accurate_keys = {"pretrain_epochs": 60, "pretrain_learning_rate": 0.01, "reg_weight": 0.02,
                     "epochs": 60}
    best_rmse_ratio = 0.95
