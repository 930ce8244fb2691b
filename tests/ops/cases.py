"""Routings that the tests of this folder share, and permute and unpermute written as loops in float64."""

import torch

# name -> (tokens, k, experts, how the ids are drawn)
ROUTINGS = {
    "plain": (37, 3, 8, "distinct"),
    "no tokens": (0, 2, 4, "distinct"),
    "one expert": (19, 1, 1, "distinct"),
    "every expert": (11, 6, 6, "distinct"),
    "one hot expert": (50, 2, 16, "hot"),
    "dropped slots": (41, 4, 8, "dropped"),
    "all dropped": (9, 2, 4, "all dropped"),
    "more experts than rows": (3, 2, 64, "distinct"),
    "many slots": (301, 8, 128, "dropped"),
}


def draw_ids(tokens, k, experts, kind, seed=0):
    """Expert ids int64 [tokens, k]."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :k]
    if kind == "hot":
        return torch.full_like(order, experts // 2)
    if kind == "dropped":
        return torch.where(torch.rand(order.shape, generator=generator) < 0.3, -1, order)
    if kind == "all dropped":
        return torch.full_like(order, -1)
    return order


def sorted_slots(ids_TK):
    """Slots that are not dropped, by expert, in order: what `slot_of_row` must be."""
    flat = ids_TK.reshape(-1).tolist()
    return sorted((slot for slot in range(len(flat)) if flat[slot] >= 0), key=lambda slot: flat[slot])


def oracle(x_TH, ids_TK, probs_TK, weight_NH, dy_TH):
    """rows = x[token] and y = sum of probs * (rows * weight), with gradients for dy, all in float64.

    -> dict of rows, y, dx, dprobs, dweight. The factor between permute and unpermute stands for the experts.
    """
    x_TH, weight_NH, dy_TH = x_TH.double(), weight_NH.double(), dy_TH.double()
    factors_TK = torch.ones(ids_TK.shape, dtype=torch.float64) if probs_TK is None else probs_TK.double()
    slots, k = sorted_slots(ids_TK), ids_TK.shape[1]
    out = {
        "rows": torch.zeros(len(slots), x_TH.shape[1], dtype=torch.float64),
        "y": torch.zeros_like(x_TH),
        "dx": torch.zeros_like(x_TH),
        "dprobs": torch.zeros(ids_TK.shape, dtype=torch.float64),
        "dweight": torch.zeros_like(weight_NH),
    }
    for row, slot in enumerate(slots):
        t, j = divmod(slot, k)
        out["rows"][row] = x_TH[t]
        out["y"][t] += factors_TK[t, j] * x_TH[t] * weight_NH[row]
        out["dx"][t] += factors_TK[t, j] * dy_TH[t] * weight_NH[row]
        out["dweight"][row] = factors_TK[t, j] * dy_TH[t] * x_TH[t]
        out["dprobs"][t, j] = dy_TH[t] @ (x_TH[t] * weight_NH[row])
    return out


def relative_error(a, b):
    """‖a − b‖ / ‖b‖, zero where both are empty or zero."""
    a, b = a.detach().double(), b.detach().double()
    difference = (a - b).norm()
    return float(difference / b.norm()) if difference else 0.0
