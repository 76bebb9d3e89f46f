"""The readable reference: every statistic as one einsum over unfolded tensors and the mask tensor T."""

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.convolution.unfold import mask_tensor, unfold
from growconv.statistics.problem import PairProblem


def expanded_patches(problem: PairProblem, x: Float[Tensor, "n c *size"]) -> Float[Tensor, "n m a b"]:
    """X_imab = Σ_l U_ial T_mbl, with the constant entry (legend: i sample, m output, a patch entry, b tap)."""
    u = problem.features(x).flatten(2)
    if problem.first_bias:
        constant = problem.constant(x.dtype, x.device).flatten().expand(x.shape[0], 1, -1)
        u = torch.cat([u, constant], dim=1)
    mask = mask_tensor(problem.hidden_size, problem.second, dtype=x.dtype, device=x.device)
    return torch.einsum("ial,mbl->imab", u, mask)


def consumer_patches(problem: PairProblem, h: Float[Tensor, "n c *size"]) -> Float[Tensor, "n m d"]:
    """Hp_imd: patches of the consumer's own input, with its constant entry."""
    hp = unfold(h, problem.second).transpose(1, 2)
    if problem.second_bias:
        hp = torch.cat([hp, torch.ones_like(hp[..., :1])], dim=2)
    return hp


def dense_sums(
    problem: PairProblem,
    quantities: frozenset[str],
    x: Float[Tensor, "n c *size"],
    h: Float[Tensor, "n d *grid"],
    v: Float[Tensor, "n e *out"],
) -> dict[str, Tensor]:
    """Sums over the samples of a batch of every statistic asked for (Verbockhaven et al. 2024).

    Args:
        quantities: names among S, S_full, N_raw, M, S2, P, patch_mean and patch_gram.
        x: input of the producer.
        h: input of the consumer.
        v: desired change of the consumer's output.

    Returns:
        Name to tensor, in the dtype of the inputs: S (a, a), S_full (ab, ab), N_raw (a, b, c), M (d, c), S2 (d, d),
        P (a, b, d).
    """
    flat_v = v.flatten(2).transpose(1, 2)
    patches = expanded_patches(problem, x)
    hp = consumer_patches(problem, h)
    a, b = patches.shape[2:]
    u = problem.first_patches(x)
    formulas = {
        "S": lambda: torch.einsum("imab,imdb->ad", patches, patches),
        "S_full": lambda: torch.einsum("imab,imde->abde", patches, patches).reshape(a * b, a * b),
        "N_raw": lambda: torch.einsum("imab,imc->abc", patches, flat_v),
        "M": lambda: torch.einsum("imd,imc->dc", hp, flat_v),
        "S2": lambda: torch.einsum("imd,ime->de", hp, hp),
        "P": lambda: torch.einsum("imab,imd->abd", patches, hp),
        "patch_mean": lambda: u.sum(dim=(0, 2)),
        "patch_gram": lambda: torch.einsum("ial,idl->ad", u, u),
    }
    return {name: formulas[name]() for name in formulas if name in quantities}
