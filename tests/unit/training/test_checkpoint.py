from pathlib import Path

import pytest
import torch

from training import checkpoint as checkpoints
from training.checkpoint import Checkpoint, CheckpointError
from training.config import ModelConfig, TrainConfig
from training.model import CapsNet


@pytest.fixture
def state(model_config: ModelConfig, train_config: TrainConfig) -> Checkpoint:
    return Checkpoint(
        model_config=model_config.as_dict(),
        train_config=train_config.as_dict(),
        dataset="shapes",
        dataset_checksums={},
        training_images=60,
        code_revision="abc",
        epoch=1,
        model=CapsNet(model_config).state_dict(),
        optimizer={},
        generators={},
        history=[],
    )


def test_round_trip(state: Checkpoint, model_config: ModelConfig, tmp_path: Path) -> None:
    """A checkpoint gives back the same network, in evaluation mode, and knows whether its run is finished."""
    checkpoints.save(state, tmp_path / "run" / "checkpoint.pt")
    loaded = checkpoints.read(tmp_path / "run")
    network = loaded.network()
    assert network.config == model_config
    assert not network.training
    assert all(torch.equal(weight, state.model[name]) for name, weight in network.state_dict().items())
    assert not loaded.finished
    loaded.epoch = 3
    assert loaded.finished


def test_a_failed_save_keeps_the_old_checkpoint(
    state: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that dies half-way leaves the previous checkpoint readable."""
    path = tmp_path / "checkpoint.pt"
    checkpoints.save(state, path)

    def die_half_way(_: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined] # an open file
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", die_half_way)
    state.epoch = 2
    with pytest.raises(CheckpointError, match="no space"):
        checkpoints.save(state, path)
    assert checkpoints.read(path).epoch == 1
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk(state: Checkpoint, tmp_path: Path) -> None:
    """A disk without room is named as the reason, with the file and what to do; the old checkpoint stays."""
    path = tmp_path / "checkpoint.pt"
    checkpoints.save(state, path)
    path.with_suffix(".partial").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"checkpoint.pt: .*No space left.* go on with --resume"):
        checkpoints.save(state, path)
    assert checkpoints.read(path).epoch == 1
    assert list(tmp_path.iterdir()) == [path]


def test_flipped_bit(state: Checkpoint, tmp_path: Path) -> None:
    """One wrong bit in the weights is found out."""
    path = tmp_path / "checkpoint.pt"
    checkpoints.save(state, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint.pt: damaged, the checksum of .* does not match"):
        checkpoints.read(path)


def test_checkpoint_of_other_code(state: Checkpoint) -> None:
    """A weight that is missing or a setting that is unknown is an error of the checkpoint, not a crash."""
    state.model.popitem()
    with pytest.raises(CheckpointError, match=r"(?s)other code than this: .*Missing key"):
        state.network()
    state.train_config["dropout"] = 0.5
    with pytest.raises(CheckpointError, match=r"other code than this: unknown settings \['dropout'\]"):
        state.settings()


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_run(state: Checkpoint, tmp_path: Path) -> None:
    """A checkpoint from elsewhere that holds a call is refused, and the call is not made."""
    state.optimizer = {"state": Touches(tmp_path / "made")}
    checkpoints.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint.pt: not a readable checkpoint"):
        checkpoints.read(tmp_path)
    assert not (tmp_path / "made").exists()


def test_missing(tmp_path: Path) -> None:
    """A checkpoint that is not there is named."""
    with pytest.raises(CheckpointError, match=r"checkpoint.pt: no such checkpoint"):
        checkpoints.read(tmp_path)


def test_damaged(state: Checkpoint, tmp_path: Path) -> None:
    """A truncated file and a file of another kind are refused by name."""
    path = tmp_path / "checkpoint.pt"
    checkpoints.save(state, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"checkpoint.pt: not a readable checkpoint"):
        checkpoints.read(path)
    for content in (b"", b"hello world\n"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"checkpoint.pt: not a readable checkpoint \(.+\)"):
            checkpoints.read(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=r"checkpoint format list, this code reads format 1"):
        checkpoints.read(path)


def test_other_format(state: Checkpoint, tmp_path: Path) -> None:
    """A checkpoint of another format is refused instead of guessed at."""
    state.format = 99
    checkpoints.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="checkpoint format 99, this code reads format 1"):
        checkpoints.read(tmp_path)
