"""Architectures and switches: sizes, what they compute, and that each trains, is stored, and is exported."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from service.manifest import read_manifest
from training import checkpoint as checkpoints
from training.baseline import BaselineCNN
from training.compose import as_seen
from training.config import ModelConfig, TrainConfig
from training.data import Dataset, Split
from training.efficient import EfficientEncoder, SelfAttentionRouting, momentum, steep_squash
from training.evaluate import evaluate
from training.export import ExportError, Name, export
from training.losses import margin_loss, mistaken, named
from training.model import CapsNet, CapsuleLayer, PrimaryCapsules, as_channels, squash
from training.networks import build
from training.precision import convolutions_in
from training.predictor import OnnxPredictor, TorchPredictor
from training.train import TrainingError, train

Load = Callable[[Split], Dataset]
DIGITS = tuple("0123456789")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_sizes() -> None:
    """The baselines have the paper's 35.4 and 24.56 million parameters, Efficient-CapsNet's encoder 161,824.

    The network for affNIST has about as many as the CapsNet for it, of which the paper says no more.
    """
    with torch.device("meta"):
        assert parameters(build(ModelConfig(DIGITS, architecture="baseline-cnn"))) == 35_445_522
        pairs = build(ModelConfig(DIGITS, height=36, width=36, architecture="multimnist-cnn"))
        assert parameters(pairs) == 24_563_978
        canvas = build(ModelConfig(DIGITS, height=40, width=40, architecture="affnist-cnn"))
        assert parameters(canvas) == 12_767_498
        assert parameters(build(ModelConfig(DIGITS, height=40, width=40))) == 13_475_648
    efficient = build(ModelConfig(DIGITS, architecture="efficient-capsnet"))
    assert isinstance(efficient, CapsNet)
    assert parameters(efficient.encoder) == 161_824
    capsules, reconstructions = efficient.eval()(torch.zeros(2, 28, 28, dtype=torch.uint8))
    assert capsules.shape == (2, 10, 16)
    assert reconstructions.shape == (2, 28, 28)


def test_self_attention_by_hand() -> None:
    """Coupling is the softmax over the classes of each prediction's agreement with all, plus its bias."""
    layer = SelfAttentionRouting(4, 3, 5, 6).double()
    with torch.no_grad():
        layer.weight.mul_(5)
        layer.bias.normal_()
    u = torch.randn(2, 4, 3, dtype=torch.float64)
    found = layer(u).detach().numpy()
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    for image, v in zip(u.numpy(), found, strict=True):
        u_hat = np.einsum("knid,ni->knd", weight, image)
        a = np.array([[sum(u_hat[k, n] @ u_hat[k, m] for m in range(4)) for n in range(4)] for k in range(5)])
        c = np.exp(a / math.sqrt(6)) / np.exp(a / math.sqrt(6)).sum(axis=0) + bias
        s = np.einsum("kn,knd->kd", c, u_hat)
        n = np.linalg.norm(s, axis=1, keepdims=True)
        np.testing.assert_allclose(v, (1 - np.exp(-n)) * s / n, atol=1e-9)


def test_steep_squash_at_zero() -> None:
    """The zero vector stays zero and has a finite gradient."""
    zero = torch.zeros(2, 4, requires_grad=True)
    steep_squash(zero).sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_biases_count_in_every_iteration() -> None:
    """A digit capsule's bias is added before each squash: routing sees it too."""
    layer = CapsuleLayer(6, 4, 3, 5, biases=True, routing_iterations=2)
    assert layer.bias is not None
    assert (layer.bias == 0.1).all()
    layer.double()
    with torch.no_grad():
        layer.weight.mul_(10)
        layer.bias.normal_()
    u = torch.randn(1, 6, 4, dtype=torch.float64)
    u_hat = torch.einsum("kgid,bgi->kgd", layer.weight, u)
    first = squash(u_hat.mean(dim=1) * 6 / 3 + layer.bias[:, 0])
    c = torch.einsum("kgd,kd->kg", u_hat, first).softmax(dim=0)
    expected = squash((c.unsqueeze(-1) * u_hat).sum(dim=1) + layer.bias[:, 0])
    torch.testing.assert_close(layer(u)[0], expected)


def test_gradients_through_routing() -> None:
    """With the switch the gradient is that of the whole procedure; without, of its last weighted sum."""

    def gradient(through: bool) -> torch.Tensor:
        torch.manual_seed(1)
        layer = CapsuleLayer(6, 4, 3, 5, routing_gradients=through).double()
        u = torch.randn(2, 6, 4, dtype=torch.float64)
        layer.weight.data.mul_(5)
        layer(u)[..., 0].sum().backward()
        assert layer.weight.grad is not None
        if through:  # one number of the gradient, by differences
            with torch.no_grad():
                values = []
                for step in (1e-6, -2e-6):
                    layer.weight[1, 2, 3, 0] += step
                    values.append(float(layer(u)[..., 0].sum()))
            found = (values[0] - values[1]) / 2e-6
            assert float(layer.weight.grad[1, 2, 3, 0]) == pytest.approx(found, rel=1e-4, abs=1e-7)
        return layer.weight.grad

    assert not torch.allclose(gradient(True), gradient(False))


def test_scaled_votes() -> None:
    """What the convolution sums up is divided by the number of groups, its bias is not."""
    layer = PrimaryCapsules(ModelConfig(DIGITS, conv_channels=4, primary_groups=32, scaled_votes=True))
    features = torch.randn(1, 4, 20, 20)
    assert layer.conv.bias is not None
    votes = layer.conv(features) - layer.conv.bias[:, None, None]
    sums = votes / 32 + layer.conv.bias[:, None, None]
    assert (layer.conv.bias == 0.1).all()
    expected = squash(sums.flatten(2).unflatten(1, (32, 8)).transpose(2, 3).flatten(1, 2))
    torch.testing.assert_close(layer(features), expected, atol=1e-5, rtol=1e-4)


VARIANTS = {
    "authors": {"capsule_biases": True, "scaled_votes": True, "routing_gradients": True},
    "one iteration": {"routing_iterations": 1},
    "efficient": {"architecture": "efficient-capsnet"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_from_training_to_export(
    changes: dict[str, object],
    model_config: ModelConfig,
    train_config: TrainConfig,
    load_split: Load,
    tmp_path: Path,
) -> None:
    """Every switch and capsule architecture trains, is stored, exported, and agrees with PyTorch."""
    config = ModelConfig.from_dict({**model_config.as_dict(), **changes})
    state = train(
        load_split("train"),
        config,
        replace(train_config, epochs=2, schedule="authors"),
        tmp_path / "run",
        load_test=lambda: load_split("test"),
    )
    assert state.history[1]["margin_loss"] < state.history[0]["margin_loss"]
    manifest = export(
        checkpoints.read(tmp_path / "run"), Name(tmp_path / "models", "shapes", "1"), load_split
    )
    assert manifest.measured.parity_error < 1e-4
    assert read_manifest(tmp_path / "models/shapes/1").architecture == config.architecture


def test_a_short_run_is_judged_by_its_own_statistics(
    model_config: ModelConfig, train_config: TrainConfig, load_split: Load, tmp_path: Path
) -> None:
    """Of sixty steps the first ones' statistics have faded by the end; a long run has the authors' span."""
    state = train(
        load_split("train"),
        replace(model_config, architecture="efficient-capsnet"),
        replace(train_config, epochs=15, learning_rate=1e-3, final_learning_rate=1e-5),
        tmp_path,
        load_test=lambda: load_split("test"),
    )
    network = state.network()
    assert isinstance(network, CapsNet)
    encoder = network.encoder
    assert isinstance(encoder, EfficientEncoder)
    with torch.inference_mode():
        seen = encoder.features[:2](as_channels(load_split("train").images)).mean()
    kept = state.model["encoder.features.2.running_mean"].mean()
    assert 0.8 < kept / seen < 1.2, "it began at 0"
    assert [momentum(steps) for steps in (1, 60, 600, 3000, 100_000)] == [0.1, 0.1, 0.05, 0.01, 0.01]


def test_a_last_batch_of_one_image(
    model_config: ModelConfig, train_config: TrainConfig, load_split: Load, tmp_path: Path
) -> None:
    """Where only the batch is left to normalise over, one of a single image is refused at once."""
    small = replace(model_config, architecture="efficient-capsnet", height=12)
    dataset = load_split("train")
    dataset = replace(dataset, images=dataset.images[:, :12])
    settings = replace(train_config, validation_images=0, epochs=1)
    with pytest.raises(TrainingError, match="66 images in batches of 13 leave one of a single image"):
        train(dataset, small, replace(settings, batch_size=13), tmp_path / "run", load_test=lambda: dataset)
    assert not (tmp_path / "run").exists()
    train(dataset, small, settings, tmp_path / "run", load_test=lambda: dataset)


def test_baseline(
    model_config: ModelConfig, train_config: TrainConfig, load_split: Load, tmp_path: Path
) -> None:
    """The baseline trains and resumes to the last bit, is evaluated, and is not exported."""
    config = replace(model_config, architecture="baseline-cnn", conv_channels=8)
    schedule = replace(train_config, epochs=6, batch_size=4, learning_rate=1e-3, final_learning_rate=5e-4)

    def run(folder: str, stop: bool = False) -> checkpoints.Checkpoint:
        def interrupt(_: object) -> None:
            if stop:
                raise KeyboardInterrupt

        return train(
            load_split("train"), config, schedule, tmp_path / folder,
            load_test=lambda: load_split("test"), resume=True, after_epoch=interrupt,
        )  # fmt: skip

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop=True)
    torch.manual_seed(999)  # dropout must not depend on it
    parts = run("parts")
    assert all(torch.equal(weight, parts.model[name]) for name, weight in whole.model.items())
    assert whole.history[-1]["cross_entropy_loss"] < 0.9 * whole.history[0]["cross_entropy_loss"]
    result = evaluate(TorchPredictor(whole.network()), load_split("test"))
    assert result.images == 66
    assert len(result.reconstruction_errors) == 0
    with pytest.raises(ExportError, match="a baseline CNN has no capsules to serve"):
        export(whole, Name(tmp_path / "models", "cnn", "1"), load_split)


@pytest.mark.parametrize("architecture", ["multimnist-cnn", "affnist-cnn"])
def test_pooled_cnns_take_their_smallest_images(architecture: str) -> None:
    """The layer behind the convolutions is as large as what they leave, odd sizes included."""
    least = {"multimnist-cnn": 4, "affnist-cnn": 20}[architecture]
    for height, width in ((least, least + 3), (37, 42)):
        shape = {"architecture": architecture, "conv_channels": 4, "height": height, "width": width}
        network = build(ModelConfig.from_dict({"classes": DIGITS, **shape})).eval()
        assert network(torch.zeros(2, height, width, dtype=torch.uint8)).shape == (2, 10)
    with pytest.raises(ValueError, match=f"need at least {least}x{least}"):
        ModelConfig.from_dict({"classes": DIGITS, "architecture": architecture, "height": least - 1})


def test_losses_of_two_labels_by_hand() -> None:
    """Section 5's network shares certainty among the labels; section 6's asks for each class by itself."""
    logits = torch.tensor([[2.0, 0.0, -1.0]]).log_softmax(dim=-1)
    target = torch.tensor([[2, 0]])
    size = {"architecture": "baseline-cnn", "conv_channels": 2, "height": 4, "width": 4}
    with torch.device("meta"):
        shared = build(ModelConfig.from_dict({"classes": ("a", "b", "c"), **size}))
        apart = build(
            ModelConfig.from_dict({"classes": ("a", "b", "c"), **size, "architecture": "multimnist-cnn"})
        )
    assert isinstance(shared, BaselineCNN)
    assert isinstance(apart, BaselineCNN)
    torch.testing.assert_close(shared.loss(logits, target), -(logits[:, 0] + logits[:, 2]) / 2)
    p = 1 / (1 + (-logits[0]).exp())
    torch.testing.assert_close(
        apart.loss(logits, target), -(p[0].log() + (1 - p[1]).log() + p[2].log())[None]
    )
    torch.testing.assert_close(apart.loss(logits, target[:, 1]), -logits[:, 0])


def test_padded_convolutions_in_bf16(model_config: ModelConfig) -> None:
    """Mixed precision on the CPU keeps the baseline's padding, and leaves depthwise convolutions alone."""
    images = torch.randint(0, 256, (4, 13, 12), dtype=torch.uint8)
    for architecture in ("baseline-cnn", "efficient-capsnet"):
        changes = {"architecture": architecture, "conv_channels": 8}
        network = build(ModelConfig.from_dict({**model_config.as_dict(), **changes})).eval()
        plain = network(images)
        with convolutions_in(network, "bf16"):
            mixed = network(images)
        torch.testing.assert_close(mixed, plain, atol=0.05, rtol=0.05)


def test_two_labels() -> None:
    """Of two labels both must be found, in any order; the margin loss wants both capsules long."""
    lengths = torch.tensor([[0.9, 0.05, 0.9], [0.1, 0.9, 0.9], [0.9, 0.9, 0.1]])
    target = torch.tensor([[2, 0], [1, 0], [0, 1]])
    assert named(lengths, target).tolist() == [[0, 2], [1, 2], [0, 1]]
    assert mistaken(named(lengths, target), target).tolist() == [False, True, False]
    expected = [0.0, 0.8**2 + 0.5 * 0.8**2, 0.0]
    torch.testing.assert_close(margin_loss(lengths, target), torch.tensor(expected))


def test_each_digit_is_drawn_from_its_own_capsule(model_config: ModelConfig) -> None:
    """With two labels, two reconstructions come out, each from its label's capsule alone."""
    network = CapsNet(model_config).eval()
    images = torch.randint(0, 256, (3, 13, 12), dtype=torch.uint8)
    labels = torch.tensor([[0, 1], [2, 0], [1, 2]])
    capsules, drawn = network(images, labels)
    assert drawn.shape == (3, 2, 13, 12)
    for k in range(2):
        torch.testing.assert_close(drawn[:, k], network.decoder(capsules, labels[:, k]))


def test_images_of_two(
    model_config: ModelConfig, train_config: TrainConfig, load_split: Load, tmp_path: Path
) -> None:
    """Images of two digits train, are measured, exported and served as any other; the manifest says two."""

    def load(split: Split) -> Dataset:
        base = replace(load_split(split), layout="pairs", name="multimnist")
        return base if split == "train" else as_seen(base)

    state = train(
        load("train"),
        replace(model_config, height=21, width=20),
        replace(train_config, epochs=2, max_shift=4),
        tmp_path / "run",
        load_test=lambda: load("test"),
    )
    assert state.history[1]["reconstruction_loss"] < state.history[0]["reconstruction_loss"]
    place = Name(tmp_path / "models", "pairs", "1")
    manifest = export(state, place, load)
    assert manifest.labels_per_image == 2
    assert manifest.image.shape == (21, 20)
    found = evaluate(OnnxPredictor(place.folder), load("test"))
    assert found.predictions.shape == (66, 2)
    assert found.mistakes == manifest.measured.test_mistakes
    assert "show 2 classes each" in (place.folder / "MODEL_CARD.md").read_text()
