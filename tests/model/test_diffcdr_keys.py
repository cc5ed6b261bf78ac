"""Keys of DiffCDR that change the noise schedule, the precision, or what was computed before."""

import pytest
import torch

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.diffusion import VPSchedule, sinusoidal_embedding
from recbole_mmdiff.quick_start import build_model, run

SHORT = {"pretrain_epochs": 2, "pretrain_batch_size": 256}


def built(keys):
    config = Config(config_dict=keys)
    return build_model(config, prepare_parts(config))


@pytest.mark.parametrize("keys", [{}, {"num_steps": 100}, {"beta_end": 0.04, "beta_start": 1e-3}])
def test_training_and_sampling_agree_on_noise_and_time(tiny_config, keys):
    """Step n of T is time n / T: the same alpha up to the discretisation, and the same input."""
    model = built(tiny_config("DiffCDR", **keys))
    steps, config = model.schedule.num_steps, {"beta_start": 1e-4, "beta_end": 0.02, **keys}
    continuous = VPSchedule(1000 * config["beta_start"], 1000 * config["beta_end"])
    for n in range(1, steps + 1, steps // 10):
        assert model.schedule.alpha_bar(n) == pytest.approx(
            continuous.alpha(n / steps)**2, rel=0.2, abs=2e-3)
        seen = model.step_sinusoids[n - 1]
        time = torch.tensor([model._sampling_time(n / steps)])
        assert torch.allclose(sinusoidal_embedding(time, len(seen))[0], seen, atol=2e-3)


@pytest.mark.parametrize("keys", [{}, {"x_T": "noise"}, {"hidden_activation": "silu"}])
def test_mixed_precision_runs(tiny_config, tmp_path, keys):
    finished = run(config_dict=tiny_config("DiffCDR", enable_amp=True, epochs=1, **SHORT, **keys),
                   output=tmp_path / "run")
    assert finished.metrics["test"]["rating"]["rmse"] < 10


def test_loading_weights_forgets_what_was_computed_from_the_old_ones(tiny_config, tmp_path):
    first, second = (run(config_dict=tiny_config("DiffCDR", seed=seed, split_seed=1, epochs=1, **SHORT),
                         output=tmp_path / str(seed)).model for seed in (1, 2))
    users = torch.arange(1, 20)
    expected = first.user_factors(users)
    second.load_state_dict(first.state_dict())
    second.seed = first.seed
    assert torch.equal(second.user_factors(users), expected)


def test_mapping_models_share_their_base_factorisations(tiny_config, tmp_path):
    """The same seed gives EMCDR and DiffCDR the same vectors, although DiffCDR clips its gradients."""
    keys = {**SHORT, "embedding_size": 4, "epochs": 1}
    one, other = (run(config_dict=tiny_config(name, **keys), output=tmp_path / name).model
                  for name in ("EMCDR", "DiffCDR"))
    for domain in ("source", "target"):
        for mine, its in zip(getattr(one, domain).parameters(), getattr(other, domain).parameters(),
                             strict=True):
            assert torch.equal(mine, its)
