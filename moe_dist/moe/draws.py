"""Which experts a token draws, as a distribution: what the expectations of `traffic_model` rest on.

A token has K *different* experts of E. Where all are equally likely, all K of them miss a set of m experts with
probability

    C(E−m, K) / C(E, K) = (E−m)/E · (E−m−1)/(E−1) · …      (K factors)

Drawn with replacement it would be (1 − m/E)^K, which is more: P (1 − (1 − 1/P)^K) ranks, 5.25 for 8 of 64 experts on 8
ranks, where it is 5.43.

Where they are not equally likely, their loads alone do not tell which of them are drawn together. Of all distributions
over K different experts with these loads, the one that assumes nothing else (the largest entropy) gives a set A of K
experts a probability proportional to the product of w_e over A. The weights w follow from the loads; a set S is missed
with probability e_K(w outside S) / e_K(w), with e_K the elementary symmetric polynomial of degree K. Equal weights give
the formula above again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Uniform:
    """K different experts of E, all sets equally likely."""

    def __init__(self, experts: int, top_k: int):
        if not 0 < top_k <= experts:
            raise ValueError(f"a token cannot have {top_k} different experts of {experts}")
        self.experts, self.top_k = experts, top_k
        self.inclusion_E = np.full(experts, top_k / experts)

    def hit(self, sets_GE: np.ndarray) -> np.ndarray:
        """Probability that at least one of the K lies in each set of experts (bool `[G,E]`)."""
        outside_G = self.experts - sets_GE.sum(axis=1)
        missed_G = np.ones(len(sets_GE))
        for drawn in range(self.top_k):
            missed_G *= np.maximum(outside_G - drawn, 0) / (self.experts - drawn)
        return 1 - missed_G


class MostEntropy:
    """K different experts of E with given loads, and nothing else assumed (see above).

    Experts that every token has are set apart, since their weight would be infinite.
    """

    def __init__(self, load_E: Sequence[float], top_k: int):
        load_E = np.asarray(load_E, dtype=np.float64)
        if not (np.isfinite(load_E).all() and (load_E >= 0).all() and load_E.any()):
            raise ValueError("loads must be finite, not negative, and not all zero")
        self.inclusion_E = top_k * load_E / load_E.sum()
        if self.inclusion_E.max() > 1 + 1e-9:
            expert = int(self.inclusion_E.argmax())
            raise ValueError(f"expert {expert} has more than one slot of each token: {self.inclusion_E[expert]:.3f}")
        self.certain_E = self.inclusion_E > 1 - 1e-9
        self.drawn = top_k - int(self.certain_E.sum())
        self.weight_E = self._fit(np.where(self.certain_E, 0.0, self.inclusion_E))

    def hit(self, sets_GE: np.ndarray) -> np.ndarray:
        """As `Uniform.hit`."""
        if self.drawn == 0:
            return (sets_GE @ self.certain_E).astype(np.float64)
        everything = np.ones((1, len(self.weight_E)), dtype=bool)
        missed_G = self._polynomials(~sets_GE)[:, -1] / self._polynomials(everything)[:, -1]
        return np.where(sets_GE @ self.certain_E, 1.0, 1 - missed_G)

    def _fit(self, wanted_E: np.ndarray) -> np.ndarray:
        """Weights whose inclusion probabilities w_e · e_{K−1}(w without e) / e_K(w) are the wanted ones.

        Each step sets w_e to what the formula asks for, given the other weights (Chen, Dempster and Liu 1994).
        """
        self.weight_E = wanted_E.copy()
        others_EE = ~np.eye(len(wanted_E), dtype=bool)
        for _ in range(1000 if self.drawn else 0):
            without = self._polynomials(others_EE)
            chosen_E = self.weight_E * without[:, -2]
            found_E = chosen_E / (chosen_E + without[:, -1])
            if np.abs(found_E - wanted_E).max() < 1e-12:
                break
            odds_E = wanted_E / np.maximum(1 - wanted_E, 1e-300)
            self.weight_E = odds_E * without[:, -1] / np.where(without[:, -2] > 0, without[:, -2], 1.0)
            self.weight_E /= self.weight_E.max()
        return self.weight_E

    def _polynomials(self, sets_GE: np.ndarray) -> np.ndarray:
        """e_0 .. e_K of the weights in each set, `[G, K+1]`."""
        found = np.zeros((len(sets_GE), self.drawn + 1))
        found[:, 0] = 1
        for weight, inside_G in zip(self.weight_E, sets_GE.T, strict=True):
            found[:, 1:] += np.where(inside_G, weight, 0.0)[:, None] * found[:, :-1]
        return found
