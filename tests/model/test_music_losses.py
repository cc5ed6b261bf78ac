"""MuSiC's losses, their gradients and what it generates, against loops in float64."""

import numpy as np
import pytest
import torch
from music_by_hand import ByHand
from recbole.data.interaction import Interaction
from running import slope

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.model import music

KEYS = {"modalities": None, "use_ids": True, "id_embedding_size": 2, "embedding_size": 5, "hidden_size": 4,
        "unet_sizes": [4, 3], "time_embedding_size": 6, "num_steps": 3, "dropout_prob": 0.3,
        "diffusion_weight": 0.3, "sampling_noise": True, "cold_item_rate": 0.2}


@pytest.fixture(scope="module")
def build(tiny_config, content):
    """``build(std=.6, **keys)``: a model with drawn weights inside of an epoch, its configuration and
    its training data."""

    def made(std=0.6, **keys):
        config = Config(config_dict=tiny_config("MuSiC", **{"data_path": content("t"), **KEYS, **keys}))
        train = prepare_parts(config).train
        torch.manual_seed(3)
        model = config.model_class(config, train).train()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std)
        model.fit_profiles()
        model.seed, model.epoch = 11, 2
        return model, config, train

    return made


def batch_of(config, train, data, users=3):
    """A batch of some users with their rows, and the rows."""
    batch = next(iter(stage_loader(config, train, data, users, seed=5, by_user=data != "side_users")))
    if data == "side_users":
        return batch, batch["user_id"].tolist()
    return batch, list(zip(*(batch[field].tolist() for field in ("user_id", "item_id", "rating")),
                           strict=True))


# ---- losses ------------------------------------------------------------------------------------

#: what it is: data, loss, keys
LOSSES = {
    "features": ("target", "feature_loss", {}),
    "side": ("side_users", "side_loss", {}),
    "transfer": ("overlap_ratings", "joint_loss", {}),
    "of all": ("target", "joint_loss", {"rating_users": "all_target"}),
    "joint": ("target", "joint_loss", {"joint": True}),
    "joint of all": ("target", "joint_loss", {"joint": True, "rating_users": "all_target"}),
    "one step": ("overlap_ratings", "joint_loss", {"rating_vector": "one_step"}),
    "without noise": ("overlap_ratings", "joint_loss", {"sampling_noise": False}),
    "w/o diffusion": ("overlap_ratings", "joint_loss", {"use_diffusion": False}),
    "bare": ("overlap_ratings", "joint_loss", {"biases": False, "cold_item_rate": 0.0}),
    "shared": ("overlap_ratings", "joint_loss", {"shared_user_extractor": True}),
    "relu": ("overlap_ratings", "joint_loss", {"activation": "relu", "num_steps": 2}),
    "softmax": ("overlap_ratings", "joint_loss", {"activation": "softmax", "num_steps": 5,
                                                  "rescale_schedule": False, "unet_sizes": [3]}),
}


@pytest.fixture(scope="module", params=LOSSES)
def losses(request, build):
    """The loss of a batch with its gradients, and the same by hand as a function."""
    data, name, keys = LOSSES[request.param]
    model, config, train = build(**keys)
    batch, rows = batch_of(config, train, data)
    hand = ByHand(model, config)
    loss = getattr(model, name)(batch)
    loss.backward()
    arguments = {"joint": True} if config["joint"] else {}
    return loss.item(), model, hand, lambda: getattr(hand, name)(rows, **arguments)


def test_loss_by_hand(losses):
    loss, _, _, by_hand = losses
    assert loss == pytest.approx(by_hand(), rel=1e-4)


def test_gradient_against_finite_differences(losses):
    """Of the loop in float64, in which x_0 does not follow its weights."""
    _, model, hand, by_hand = losses
    random, checked = np.random.default_rng(1), 0
    for name, parameter in model.named_parameters():
        if name.startswith("domains"):
            assert parameter.grad is None, "the base factorisations are constants"
            continue
        place = tuple(random.integers(size) for size in parameter.shape)
        if parameter.grad is not None and parameter.grad.any():
            place = np.unravel_index(int(parameter.grad.abs().argmax()), parameter.shape)
        expected = slope(by_hand, hand.weights[name], place)
        found = 0.0 if parameter.grad is None else parameter.grad[place].item()
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-5), name
        checked += abs(expected) > 1e-4
    assert checked >= 8


def test_no_gradient_of_the_diffusion_reaches_x0(build):
    model, config, train = build()
    model.side_loss(batch_of(config, train, "side_users")[0]).backward()
    moved = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    assert moved and all(name.startswith("denoiser") for name in moved)


def test_users_without_a_target_profile_do_not_teach_the_diffusion(build, content):
    """Their x_0 would be the features of nothing."""
    model, config, train = build(data_path=content("few"), modalities=["image"], use_ids=False)
    users = train.users_with_rows()
    known = model.domains["target"].profiles("image", users)[1]
    assert known.any() and not known.all()
    found = model.denoising_loss(users, None).item()
    assert found == pytest.approx(ByHand(model, config).side_loss(users[known].tolist()), rel=1e-4)
    assert model.denoising_loss(users[~known], None).item() == 0


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_lambda_mixes_diffusion_and_rating(share, build):
    """Eq. 13, from the losses at both ends."""
    ends = {}
    for weight in (0.0, 1.0, share):
        model, config, train = build(diffusion_weight=weight)
        ends[weight] = model.joint_loss(batch_of(config, train, "overlap_ratings")[0]).item()
    assert ends[share] == pytest.approx(share * ends[1.0] + (1 - share) * ends[0.0], rel=1e-5)


def test_a_batch_without_overlapping_users(build):
    """Eq. 14 of side users alone: no rating, no condition, and still a gradient."""
    model, config, train = build(joint=True)
    side = train.side_users()[:3]
    rows = Interaction({"user_id": side, "item_id": torch.tensor([1, 2, 3]), "rating": torch.ones(3)})
    loss = model.joint_loss(rows)
    assert loss.item() == pytest.approx(ByHand(model, config).side_loss(side.tolist()), rel=1e-4)
    loss.backward()


@pytest.mark.parametrize("activation", music.ACTIVATIONS)
def test_dropout_belongs_to_the_id(activation):
    torch.manual_seed(2)
    extractor = music.FeatureExtractor(6, 50, 3, activation, dropout=0.4)
    features, ids = torch.randn(9, 6), torch.arange(100, 109)
    found = extractor(features, ids, 7)
    torch.testing.assert_close(extractor(features[[4, 0]], ids[[4, 0]], 7), found[[4, 0]])
    assert not torch.isclose(extractor(features, ids, 8), found).all()
    plain = extractor(features, ids, None)
    assert torch.equal(plain, extractor.eval()(features, ids, None))
    mean = torch.stack([extractor(features, ids, seed) for seed in range(400)]).mean(0)
    assert (mean - plain).abs().max() < 0.25, "kept units are scaled up"


# ---- generation --------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"num_samples": 3}, {"sampling_noise": False},
                                  {"use_diffusion": False}, {"rating_vector": "one_step"}], ids=str)
def test_vectors_of_users_by_hand(keys, build):
    """Those in the source are generated by the whole chain, the mean of its samples; the others
    have the features of their own profile; nobody has dropout."""
    model, config, train = build(**keys)
    if not config["sampling_noise"]:
        config["num_samples"] = 1
    hand, users = ByHand(model.eval(), config), [0, 1, 7, 40, *train.side_users()[:2].tolist()]
    found = model.user_vectors(torch.tensor(users)).detach()
    assert model.in_source[users].tolist() == [False, True, True, True, False, False]
    for place, user in enumerate(users):
        np.testing.assert_allclose(found[place], hand.user_vector(user), rtol=1e-3, atol=1e-5)


def test_top_n_are_the_items_with_the_highest_ratings(build):
    """Section 3.4: by hand, for cold users."""
    model, config, train = build()
    hand = ByHand(model.eval(), config)
    cold = [user for user in range(1, train.num_overlap + 1)
            if user not in set(train.users_with_rows().tolist())][:3]
    scores = model.full_sort_predict(Interaction({"user_id": torch.tensor(cold)})).view(3, -1)
    for row, user in zip(scores, cold, strict=True):
        vector = hand.user_vector(user)
        ratings = [hand.rating(vector, item) for item in range(train.item_num)]
        np.testing.assert_allclose(row.detach(), ratings, rtol=1e-4, atol=1e-4)
        assert row.argsort(descending=True)[:10].tolist() == np.argsort(ratings)[::-1][:10].tolist()


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("keys", [{}, {"num_samples": 3}], ids=str)
def test_a_user_does_not_depend_on_the_others(keys, chunk, build):
    whole, pieces = (build(sampling_batch_size=size, **keys)[0].eval() for size in (1000, chunk))
    users = torch.randperm(whole.n_users, generator=torch.Generator().manual_seed(1))
    expected = whole.user_factors(torch.arange(whole.n_users))
    torch.testing.assert_close(pieces.user_factors(users), expected[users], rtol=1e-4, atol=1e-5)
    items = torch.arange(whole.n_items)
    torch.testing.assert_close(pieces.item_factors(items.flip(0)), whole.item_factors(items).flip(0),
                               rtol=1e-4, atol=1e-5)


def test_noise_of_an_epoch_and_of_a_run(build):
    """While learning by (seed of the stage, epoch); in an evaluation by the seed of the run."""
    model, users = build()[0].eval(), torch.tensor([1, 2, 3])

    def drawn(learning, seed=11, epoch=2):
        model.seed, model.epoch = seed, epoch
        return model.generated(users, torch.ones(3, 5), learning)

    assert torch.equal(drawn(True), drawn(True))
    assert not torch.isclose(drawn(True), drawn(True, epoch=3)).any()
    assert not torch.isclose(drawn(True), drawn(True, seed=12)).any()
    assert torch.equal(drawn(False), drawn(False, 12, 3))
    assert not torch.isclose(drawn(False), drawn(True)).any()
    before = drawn(False)
    model.run_seed += 1
    assert not torch.isclose(drawn(False), before).any()


def test_without_noise_there_is_none(build):
    """Users of the same condition have the same vector, in every epoch and run."""
    model = build(sampling_noise=False)[0]
    found = model.generated(torch.tensor([3, 9]), torch.ones(2, 5))
    assert torch.equal(found[0], found[1])
    model.run_seed, model.seed, model.epoch = 5, 6, 7
    for learning in (True, False):
        torch.testing.assert_close(model.generated(torch.tensor([4, 5]), torch.ones(2, 5), learning), found)


def test_without_noise_it_is_the_mean_where_samples_are_gaussian(build):
    """The chain of a linear network."""
    keys = {"unet_activation": "none", "num_steps": 10, "std": 0.4}
    noisy, still = (build(sampling_noise=noise, **keys)[0] for noise in (True, False))
    keys = torch.arange(4000)
    condition = torch.randn(1, 5, generator=torch.Generator().manual_seed(4)).expand(4000, 5)
    samples, mean = noisy.generated(keys, condition), still.generated(keys[:1], condition[:1])
    error = (samples.mean(0) - mean).abs() / samples.std(0)
    assert (samples.std(0) > 0.02).all() and error.max() < 4 / 4000**0.5


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50])
def test_any_number_of_steps(steps, rescale, build):
    model, config, train = build(std=0.3, num_steps=steps, rescale_schedule=rescale)
    loss = model.joint_loss(batch_of(config, train, "overlap_ratings")[0])
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value.grad).all() for value in model.denoiser.parameters())
    assert torch.isfinite(model.eval().user_factors(torch.arange(model.n_users))).all()
    assert (model.schedule.alpha_bar(steps) < 0.01) == (rescale and steps > 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_equals_eager(build):
    try:
        torch.compile(torch.sin)(torch.ones(2))
    except Exception as error:
        pytest.skip(f"nothing can be compiled here: {error}")
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, config, train = build(compile_networks=compiled)
        loss = model.joint_loss(batch_of(config, train, "overlap_ratings")[0])
        loss.backward()
        results.append([loss.detach(), *(value.grad.clone() for value in model.denoiser.parameters()),
                        model.eval().user_factors(torch.arange(20)).detach()])
    torch._dynamo.reset()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
