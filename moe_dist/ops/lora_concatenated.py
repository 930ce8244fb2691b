"""A mixture of LoRA experts by two dense products for all of them: u = A·x, v = each expert's columns of u times its
weight, B·v. A form of `lora_mixture`; no autograd here."""

from __future__ import annotations

import torch


def forward(
    x_TH: torch.Tensor,
    a_RH: torch.Tensor,
    b_RO: torch.Tensor,
    mix_TN: torch.Tensor,
    ranks: tuple[int, ...],
    y_TO: torch.Tensor,
    *,
    keep: bool,
) -> torch.Tensor | None:
    """Add the mixture to y in place -> what the backward needs for the gradients of mix and b, if it is to be kept."""
    u_TR = torch.mm(x_TH, a_RH.t())
    v_TR = weigh(u_TR, mix_TN, ranks, out=torch.empty_like(u_TR) if keep else u_TR)
    y_TO.addmm_(v_TR, b_RO)
    return u_TR if keep else None


def backward(
    grad_TO: torch.Tensor,
    x_TH: torch.Tensor | None,
    a_RH: torch.Tensor,
    b_RO: torch.Tensor,
    mix_TN: torch.Tensor,
    ranks: tuple[int, ...],
    u_TR: torch.Tensor | None,
    grad_x_TH: torch.Tensor | None,
    *,
    needs: tuple[bool, bool, bool],
) -> list[torch.Tensor | None]:
    """Add to the gradient of x, where there is one -> the gradients of a, b and mix, None where `needs` says no."""
    a, b, mix = needs
    grad_a = grad_b = grad_mix = None
    if a or mix or grad_x_TH is not None:
        grad_TR = torch.mm(grad_TO, b_RO.t())
        if mix:
            grad_mix = sum_of_each(u_TR * grad_TR.to(mix_TN.dtype), ranks)
        weigh(grad_TR, mix_TN, ranks, out=grad_TR)
        if a:
            grad_a = torch.mm(grad_TR.t(), x_TH)
        if grad_x_TH is not None:
            grad_x_TH.addmm_(grad_TR, a_RH)
    if b:
        grad_b = torch.mm(weigh(u_TR, mix_TN, ranks, out=torch.empty_like(u_TR)).t(), grad_TO)
    return [grad_a, grad_b, grad_mix]


def weigh(u_TR: torch.Tensor, mix_TN: torch.Tensor, ranks: tuple[int, ...], *, out: torch.Tensor) -> torch.Tensor:
    """Each expert's columns of u, times its weight."""
    if len(set(ranks)) == 1:
        shape = (*mix_TN.shape, ranks[0])
        torch.mul(u_TR.view(shape), mix_TN[:, :, None], out=out.view(shape))
        return out
    ranks_N = torch.tensor(ranks, device=u_TR.device)
    return torch.mul(u_TR, mix_TN.repeat_interleave(ranks_N, dim=1, output_size=u_TR.shape[1]), out=out)


def sum_of_each(u_TR: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
    """The sum `[T,N]` over each expert's columns."""
    if len(set(ranks)) == 1:
        return u_TR.view(len(u_TR), len(ranks), ranks[0]).sum(dim=2)
    owner_R = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)).to(u_TR.device)
    return u_TR.new_zeros(len(u_TR), len(ranks)).index_add_(1, owner_R, u_TR)
