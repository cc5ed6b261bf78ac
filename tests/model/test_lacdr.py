"""LACDR: the contract, and its loss and gradient by hand."""

import numpy as np
import pytest
import torch
from contract import ModelContract
from recbole.data.interaction import Interaction
from running import BASES, LEARNING, PRETRAINING, ready_to_transfer, run_keys, slope
from torch import nn

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.diffusion import fold_in, keyed_uniform
from recbole_mmdiff.errors import ConfigError


class TestLACDR(ModelContract):
    """Two factorisations, then encoders and decoders."""

    model = "LACDR"
    keys = PRETRAINING
    accurate_keys = LEARNING
    best_rmse_ratio = 0.95


@pytest.fixture
def make(tiny_config):
    """``make(**keys)``: a model of random float64 weights, ready for the transfer stage."""

    def build(**keys):
        keys = {"embedding_size": 3, "code_size": 2, **keys}
        return ready_to_transfer(tiny_config("LACDR", **keys), std=2.0)[0]

    return build


def batch_of(model, count=4):
    return Interaction({"user_id": model.overlap_users[:count], "sample_id": torch.arange(9, 9 + count)})


def vectors_of(model, domain, users):
    """Standardised vectors of users (lists of numbers to an array), from the tables alone."""
    base = getattr(model, domain)
    tables = [base.user_embedding.weight] + ([base.user_bias.weight] if base.biases else [])
    table = np.concatenate([weight.detach().numpy() for weight in tables], 1)
    overlap = table[model.overlap_users.numpy()]
    if model.standardize:
        table = (table - overlap.mean(0)) / overlap.std(0, ddof=1)
    return [table[user] for user in users]


def slow_loss(model, weights, weighting, batch, drawn):
    """The three terms in loops; ``weights`` are E_s, D_s, E_t, D_t."""
    e_s, d_s, e_t, d_t = weights
    reconstruction, alignment, supervised = 0.0, [], []
    for domain, encoder, decoder in (("source", e_s, d_s), ("target", e_t, d_t)):
        errors = [(decoder @ (encoder @ u) - u)**2 for u in vectors_of(model, domain, drawn[domain])]
        reconstruction += np.mean(errors)
    users = batch["user_id"].tolist()
    for u_s, u_t in zip(vectors_of(model, "source", users), vectors_of(model, "target", users),
                        strict=True):
        alignment.append((e_s @ u_s - e_t @ u_t)**2)
        supervised.append((d_t @ (e_s @ u_s) - u_t)**2)
    terms = reconstruction, np.mean(alignment), np.mean(supervised)
    return sum(weight * term for weight, term in zip(weighting, terms, strict=True))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("users", ["all", "overlapping"])
def test_loss_and_gradient_by_hand(make, base, users):
    weighting = (0.7, 2.0, 0.4)
    model = make(reconstruction_users=users, reconstruction_weight=0.7, alignment_weight=2.0,
                 supervised_weight=0.4, **base)
    batch = batch_of(model)
    drawn = dict.fromkeys(("source", "target"), batch["user_id"].tolist())
    if users == "all":
        drawn = {domain: found.tolist() for domain, found in model.users_to_reconstruct(batch).items()}
    layers = [part[domain][0].weight for domain in ("source", "target")
              for part in (model.encoders, model.decoders)]
    weights = [layer.detach().clone().numpy() for layer in layers]
    loss = model.alignment_loss(batch)
    assert loss.item() == pytest.approx(slow_loss(model, weights, weighting, batch, drawn), rel=1e-9)
    loss.backward()
    for layer, weight in zip(layers, weights, strict=True):
        for index in np.ndindex(*weight.shape):
            expected = slope(lambda: slow_loss(model, weights, weighting, batch, drawn), weight, index)
            assert layer.grad[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)
    trained = {name for name, value in model.named_parameters() if value.grad is not None}
    assert trained == {name for name, _ in model.named_parameters()
                       if name.startswith(("encoders", "decoders"))}


def test_who_is_reconstructed_is_drawn_by_the_sample(make, tiny_pair):
    model = make()
    samples = torch.arange(3000)
    batch = Interaction({"user_id": model.overlap_users[:1].repeat(3000), "sample_id": samples})
    drawn = model.users_to_reconstruct(batch)
    uniform = keyed_uniform(samples, 2, fold_in(77, 2), torch.float64)
    for column, (domain, pool) in enumerate((("source", model.source_users),
                                             ("target", model.target_users))):
        assert drawn[domain].tolist() == [int(pool[int(u * len(pool))]) for u in uniform[:, column]]
        assert set(drawn[domain].tolist()) == set(pool.tolist())
    assert len(model.source_users) == len(tiny_pair.overlap) + len(tiny_pair.source_only)
    again = model.users_to_reconstruct(Interaction({"user_id": batch["user_id"][:2],
                                                    "sample_id": samples[[7, 5]]}))
    assert torch.equal(again["source"], drawn["source"][[7, 5]])
    model.epoch = 3
    assert not torch.equal(model.users_to_reconstruct(batch)["source"], drawn["source"])


def test_no_held_out_user_is_reconstructed_in_the_target(tiny_config):
    config = Config(config_dict=tiny_config("LACDR"))
    parts = prepare_parts(config)
    model = config.model_class(config, parts.train)
    held_out = torch.cat([parts.valid.users_with_rows(), parts.test.users_with_rows()])
    assert not torch.isin(held_out, model.target_users).any()
    assert torch.isin(held_out, model.source_users).all()


def test_a_weight_of_zero_takes_its_term_out(make):
    model = make(reconstruction_weight=0.0, alignment_weight=0.0)
    model.alignment_loss(batch_of(model)).backward()
    trained = {name for name, value in model.named_parameters() if value.grad is not None}
    assert trained == {"encoders.source.0.weight", "decoders.target.0.weight"}


def test_a_cold_user_goes_through_both_halves(make):
    model = make(biases=True, standardize=True)
    cold = model.is_transferred.nonzero().squeeze(-1)
    encoder, decoder = (part.detach().numpy() for part in (model.encoders["source"][0].weight,
                                                           model.decoders["target"][0].weight))
    center, scale = model.target_center.numpy(), model.target_scale.numpy()
    expected = [decoder @ (encoder @ u) * scale + center
                for u in vectors_of(model, "source", cold.tolist())]
    np.testing.assert_allclose(model.user_factors(cold).detach(), expected, rtol=1e-9)


def test_hidden_layers_are_mirrored(make):
    model = make(autoencoder_hidden_sizes=[7, 5], autoencoder_bias=True)
    sizes = [[layer.out_features for layer in part["target"] if isinstance(layer, nn.Linear)]
             for part in (model.encoders, model.decoders)]
    assert sizes == [[7, 5, 2], [5, 7, 4]]
    assert model.encoders["source"][0].bias is not None
    assert isinstance(model.encoders["source"][1], nn.Tanh)


def test_the_base_is_frozen_while_aligning(tiny_config, tmp_path):
    short, long = (run_keys(tiny_config("LACDR", epochs=epochs, eval_step=0, **PRETRAINING),
                            tmp_path / str(epochs)) for epochs in (1, 4))
    for name, value in short.model.state_dict().items():
        frozen = name.startswith(("source", "target"))
        assert not name.startswith(("encoders", "decoders")) or not frozen
        if frozen:
            assert torch.equal(value, long.model.state_dict()[name]), name
    assert not torch.equal(short.model.encoders["target"][0].weight,
                           long.model.encoders["target"][0].weight)


@pytest.mark.parametrize("keys, message", [
    ({"supervised_weight": 0.0, "alignment_weight": 0.0}, "supervised_weight 0 trains no way"),
    ({"supervised_weight": 0.0, "reconstruction_weight": 0.0}, "supervised_weight 0 trains no way"),
    ({"alignment_weight": -1.0}, "negative"), ({"code_size": 0}, "code_size: 0"),
    ({"reconstruction_users": "overlap"}, "did you mean 'overlapping'")])
def test_keys_that_cannot_be_used(make, keys, message):
    with pytest.raises(ConfigError, match=message):
        make(**keys)
