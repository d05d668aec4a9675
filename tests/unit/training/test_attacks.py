"""Attacks on functions whose gradients are known, and on a small network."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from training.attacks import ATTACKS, STEPS, _step, ascend, excess, likeness, open_to_attack
from training.config import ModelConfig, TrainConfig
from training.data import Dataset, Split
from training.losses import margin_loss
from training.model import CapsNet, length
from training.train import train

Load = Callable[[Split], Dataset]
WEIGHTS = torch.tensor([[2.0, -0.1, 0.0], [-1.0, 1.0, 5.0]])


def linear(x: Tensor) -> Tensor:
    return (x * WEIGHTS).flatten(1).sum(dim=1)


def test_one_step_on_a_linear_loss() -> None:
    """Each pixel goes 16 grey levels up or down, by its weight's sign alone, and stays a byte."""
    image = torch.tensor([[[100, 100, 100], [3, 250, 100]]], dtype=torch.uint8)
    found = ascend(image, [linear], 16, 16, 1)
    assert found.tolist() == [[[116, 84, 100], [0, 255, 116]]]
    assert found.dtype == torch.uint8
    assert linear(found.float()) > linear(image.float())


def test_small_steps_stop_at_the_bound() -> None:
    """Steps of 5 go 10 in two, and not beyond 16 in ten."""
    grey = torch.full((1, 2, 3), 100, dtype=torch.uint8)
    signs = WEIGHTS.sign()
    for steps, moved in ((2, 10), (10, 16)):
        assert torch.equal(ascend(grey, [linear], 16, 5, steps), (100 + moved * signs).byte()[None])


def test_steps_go_twice_as_far_as_a_pixel_may() -> None:
    """The steps together are twice the bound, or a little more, as they are of whole grey levels."""
    assert [_step(most, 10) for most in (4, 16, 64)] == [1, 4, 13]


def test_losses_take_turns() -> None:
    """Of two opposite losses the second undoes what the first did."""
    grey = torch.full((1, 2, 3), 100, dtype=torch.uint8)
    losses = [linear, lambda x: -linear(x)]
    assert torch.equal(ascend(grey, losses, 16, 5, 4), grey)
    assert torch.equal(ascend(grey, losses, 16, 5, 3), ascend(grey, [linear], 16, 5, 1))


@pytest.fixture(scope="module")
def trained(
    model_config: ModelConfig,
    train_config: TrainConfig,
    load_split: Load,
    tmp_path_factory: pytest.TempPathFactory,
) -> CapsNet:
    """A network that tells most bars, poles and dots apart, and draws them a little."""
    network = train(
        load_split("train"),
        model_config,
        replace(train_config, epochs=12),
        tmp_path_factory.mktemp("run"),
        load_test=lambda: load_split("test"),
    ).network()
    assert isinstance(network, CapsNet)
    open_to_attack(network)
    return network


def test_excess_by_hand(trained: CapsNet, load_split: Load) -> None:
    """The excess is the longest other capsule less the label's; likeness is of what that other one draws."""
    images, labels = load_split("test").images[:12], load_split("test").labels[:12]
    capsules = trained.encoder(images)
    lengths = length(capsules)
    found, drawn = excess(trained, labels)(images.float()), likeness(trained, labels)(images.float())
    for i, label in enumerate(labels.tolist()):
        others = [k for k in range(3) if k != label]
        longest = max(others, key=lambda k: float(lengths[i, k]))
        assert float(found[i]) == pytest.approx(float(lengths[i, longest] - lengths[i, label]), abs=1e-6)
        drawing = trained.decoder(capsules[i : i + 1], torch.tensor([longest]))[0]
        error = (drawing - images[i] / 255).square().sum()
        assert float(drawn[i]) == pytest.approx(-float(error), rel=1e-5)


def test_the_margin_loss_is_flat_where_the_network_is_sure() -> None:
    """A capsule above 0.9 beside others below 0.1 has no gradient that an attack could begin with."""
    lengths = torch.tensor([[0.95, 0.05, 0.02]], requires_grad=True)
    margin_loss(lengths, torch.tensor([0])).sum().backward()
    assert lengths.grad is not None
    assert (lengths.grad == 0).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str, trained: CapsNet, load_split: Load) -> None:
    """An attack keeps to its bound and raises the excess; a wider bound has more images mistaken."""
    dataset = load_split("test")
    right = length(trained.encoder(dataset.images)).argmax(dim=1) == dataset.labels
    assert right.sum() > 30
    images, labels = dataset.images[right], dataset.labels[right]
    mistaken = []
    for most in (4, 100):
        made = ATTACKS[name](trained, images, labels, most, STEPS)
        assert (made.int() - images.int()).abs().max() <= most
        excesses = excess(trained, labels)(made.float())
        assert excesses.mean() > excess(trained, labels)(images.float()).mean()
        mistaken.append(int((excesses > 0).sum()))
    assert mistaken[1] > mistaken[0]
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_fgsm_is_one_step(trained: CapsNet, load_split: Load) -> None:
    """It goes the whole way at once, and not again."""
    images, labels = load_split("test").images, load_split("test").labels
    once = ascend(images, [excess(trained, labels)], 30, 30, 1)
    assert torch.equal(ATTACKS["FGSM"](trained, images, labels, 30, STEPS), once)


def test_an_aware_attack_has_as_many_steps_for_either_aim(trained: CapsNet, load_split: Load) -> None:
    """Two steps of R-BIM are two towards another class, and two towards what its capsule draws."""
    images, labels = load_split("test").images, load_split("test").labels
    losses = [excess(trained, labels), likeness(trained, labels)]
    assert torch.equal(ATTACKS["R-BIM"](trained, images, labels, 30, 2), ascend(images, losses, 30, 30, 4))


def test_an_aware_attack_is_drawn_better(trained: CapsNet, load_split: Load) -> None:
    """What R-BIM makes is more like what the other class's capsule draws than what BIM makes."""
    dataset = load_split("test")
    drawn = likeness(trained, dataset.labels)
    plain, aware = (
        drawn(ATTACKS[name](trained, dataset.images, dataset.labels, 64, STEPS).float())
        for name in ("BIM", "R-BIM")
    )
    assert aware.mean() > plain.mean()


def test_gradients_pass_through_routing(model_config: ModelConfig) -> None:
    """Opened to attack, the gradient is that of the whole procedure: along it the excess grows as it says."""
    torch.manual_seed(0)
    network = CapsNet(model_config).eval()
    with torch.no_grad():
        network.encoder.digit_capsules.weight.mul_(20)  # so that routing matters
    x = 255 * torch.rand(1, 13, 12)
    loss = excess(network, torch.tensor([0]))

    def slope_and_promise() -> tuple[float, float]:
        (gradient,) = torch.autograd.grad(loss(x.requires_grad_()).sum(), x)
        step = 0.5 * gradient / gradient.norm()
        with torch.no_grad():
            return float(loss(x + step) - loss(x - step)), float(gradient.norm())

    slope, promise = slope_and_promise()
    assert slope != pytest.approx(promise, rel=0.1), "without, routing is taken for a constant"
    open_to_attack(network)
    slope, promise = slope_and_promise()
    assert slope == pytest.approx(promise, rel=0.02)
