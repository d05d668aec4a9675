"""What training minimises: the margin loss of section 3 and the reconstruction loss of section 4.1."""

from torch import Tensor
from torch.nn import functional as F


def margin_loss(
    lengths: Tensor, target: Tensor, *, m_plus: float = 0.9, m_minus: float = 0.1, down_weight: float = 0.5
) -> Tensor:
    """Equation 4 for each image: capsule lengths (B, K) and labels (B,) -> loss (B,)."""
    present = F.one_hot(target, lengths.shape[1]).to(lengths.dtype)  # T_k
    missing = F.relu(m_plus - lengths).square()
    spurious = F.relu(lengths - m_minus).square()
    return (present * missing + down_weight * (1 - present) * spurious).sum(dim=-1)


def reconstruction_loss(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Summed squared error of each image, (B, H, W[, 3]) twice, both in [0, 1] -> loss (B,)."""
    return (reconstructions - images).square().flatten(1).sum(dim=-1)
