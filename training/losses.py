"""What training minimises: the margin loss of section 3 and the reconstruction loss of section 4.1."""

from torch import Tensor
from torch.nn import functional as F


def margin_loss(
    lengths: Tensor, target: Tensor, *, m_plus: float = 0.9, m_minus: float = 0.1, down_weight: float = 0.5
) -> Tensor:
    """Equation 4 for each image: capsule lengths (B, K) and labels (B,) or (B, L) -> loss (B,)."""
    labels = target if target.ndim == 2 else target.unsqueeze(1)
    present = F.one_hot(labels, lengths.shape[1]).sum(dim=1).to(lengths.dtype)  # T_k
    missing = F.relu(m_plus - lengths).square()
    spurious = F.relu(lengths - m_minus).square()
    return (present * missing + down_weight * (1 - present) * spurious).sum(dim=-1)


def reconstruction_loss(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Summed squared error of each image, (B, [L,] H, W[, 3]) twice, both in [0, 1] -> loss (B,)."""
    return (reconstructions - images).square().flatten(1).sum(dim=-1)


def named(scores: Tensor, target: Tensor) -> Tensor:
    """The classes of the largest of `scores` (B, K), as many for each image as `target` has labels.

    (B,) for labels (B,); (B, L), in ascending order, for labels (B, L).
    """
    if target.ndim == 1:
        return scores.argmax(dim=-1)
    return scores.topk(target.shape[1]).indices.sort(dim=1).values


def mistaken(predictions: Tensor, target: Tensor) -> Tensor:
    """Whether an image's prediction is wrong, (B,): of several labels, in any order, all must be right."""
    if target.ndim == 1:
        return predictions != target
    return (predictions != target.sort(dim=1).values).any(dim=1)
