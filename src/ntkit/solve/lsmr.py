"""LSMR (Fong and Saunders 2011) for several right-hand sides at once, one iteration at a time.

It is SciPy's `lsmr` with its names and its rules for stopping, and with a state that can be written down between two
iterations and gone on with. Each right-hand side has steps of its own; those that are done stand still.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# (columns, R) to (rows, R), or back.
Product = Callable[[Tensor], Tensor]


@dataclass
class LSMR:
    """Where the solution of A x = b stands: float64, one column or number for each of R right-hand sides.

    Attributes:
        u: (rows, R), the left vector.
        v: (columns, R), the right vector; `h` and `hbar` are its combinations that x is made of.
        x: (columns, R), the solution so far.
        norm_b: ||b||.
        norm_r: ||b - A x||, by the recurrence.
        norm_a2: ||A||_F^2, as far as it has been seen.
        steps: iterations of each.
        done: which stand still: 1 for an answer within the tolerance, 2 where rounding allows no more.
    """

    u: Tensor
    v: Tensor
    h: Tensor
    hbar: Tensor
    x: Tensor
    alpha: Tensor
    zetabar: Tensor
    alphabar: Tensor
    rho: Tensor
    rhobar: Tensor
    cbar: Tensor
    sbar: Tensor
    zeta: Tensor
    betadd: Tensor
    betad: Tensor
    rhodold: Tensor
    tautildeold: Tensor
    thetatilde: Tensor
    norm_b: Tensor
    norm_r: Tensor
    norm_a2: Tensor
    steps: Tensor
    done: Tensor

    @classmethod
    def begin(cls, b: Tensor, transposed: Product) -> LSMR:
        """The state before the first iteration, by one product with A^T; b is (rows, R)."""
        norm_b = b.norm(dim=0)
        u = b / _safe(norm_b)
        v = transposed(u)
        alpha = v.norm(dim=0)
        v = v / _safe(alpha)
        zero, one = torch.zeros_like(norm_b), torch.ones_like(norm_b)
        # b = 0, or nothing of it can be reached: x = 0 is the answer
        done = (alpha * norm_b == 0).to(torch.int64)
        return cls(
            u=u, v=v, h=v.clone(), hbar=torch.zeros_like(v), x=torch.zeros_like(v), alpha=alpha,
            zetabar=alpha * norm_b, alphabar=alpha.clone(), rho=one.clone(), rhobar=one.clone(), cbar=one.clone(),
            sbar=zero.clone(), zeta=zero.clone(), betadd=norm_b.clone(), betad=zero.clone(), rhodold=one.clone(),
            tautildeold=zero.clone(), thetatilde=zero.clone(), norm_b=norm_b, norm_r=norm_b.clone(),
            norm_a2=alpha.square(), steps=torch.zeros_like(done), done=done,
        )  # fmt: skip

    def parts(self) -> dict[str, Tensor]:
        """Everything by name: `LSMR(**parts)` is the same state."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def step(self, product: Product, transposed: Product, *, atol: float, btol: float) -> None:
        """One iteration of those that are not done. Cost: a product with A and one with A^T for each."""
        going = (self.done == 0).nonzero()[:, 0]
        if len(going) == len(self.done):
            self._advance(product, transposed, atol, btol)
            return
        some = LSMR(**{name: part[..., going] for name, part in self.parts().items()})
        some._advance(product, transposed, atol, btol)
        for name, part in some.parts().items():
            getattr(self, name)[..., going] = part

    def _advance(self, product: Product, transposed: Product, atol: float, btol: float) -> None:
        # the next pair of the bidiagonalization; long vectors in place, which may have a number for each parameter
        self.u.mul_(-self.alpha).add_(product(self.v))
        beta = self.u.norm(dim=0)
        self.u.div_(_safe(beta))
        self.v.mul_(-beta).add_(transposed(self.u))
        self.alpha = self.v.norm(dim=0)
        self.v.div_(_safe(self.alpha))
        # two rotations make it upper bidiagonal, and once more
        rho_old, c, s, self.rho = self.rho, *_rotation(self.alphabar, beta)
        theta, self.alphabar = s * self.alpha, c * self.alpha
        rhobar_old, zeta_old, thetabar = self.rhobar, self.zeta, self.sbar * self.rho
        self.cbar, self.sbar, self.rhobar = _rotation(self.cbar * self.rho, theta)
        self.zeta, self.zetabar = self.cbar * self.zetabar, -self.sbar * self.zetabar
        self.hbar.mul_(-thetabar * self.rho / (rho_old * rhobar_old)).add_(self.h)
        self.x.add_(self.zeta / (self.rho * self.rhobar) * self.hbar)
        self.h.mul_(-theta / self.rho).add_(self.v)
        # ||r||, by a third one
        betahat, self.betadd = c * self.betadd, -s * self.betadd
        thetatilde_old, ctilde, stilde, rhotilde = self.thetatilde, *_rotation(self.rhodold, thetabar)
        self.thetatilde, self.rhodold = stilde * self.rhobar, ctilde * self.rhobar
        self.betad = -stilde * self.betad + ctilde * betahat
        self.tautildeold = (zeta_old - thetatilde_old * self.tautildeold) / rhotilde
        taud = (self.zeta - self.thetatilde * self.tautildeold) / self.rhodold
        self.norm_r = torch.hypot(self.betad - taud, self.betadd)
        self.steps = self.steps + 1
        # what SciPy calls test1, test2 and t1
        self.norm_a2 = self.norm_a2 + beta.square()
        norm_a = self.norm_a2.sqrt()
        self.norm_a2 = self.norm_a2 + self.alpha.square()
        reach = norm_a * self.x.norm(dim=0) / self.norm_b
        left = self.norm_r / self.norm_b
        normal = self.zetabar.abs() / _safe(norm_a * self.norm_r)
        tired = (1 + normal <= 1) | (1 + left / (1 + reach) <= 1)
        good = (normal <= atol) | (left <= btol + atol * reach)
        self.done = torch.where(good, 1, torch.where(tired, 2, 0))


def _rotation(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c, s and r with c a + s b = r and s a = c b."""
    r = torch.hypot(a, b)
    return torch.where(r > 0, a / _safe(r), 1.0), b / _safe(r), r


def _safe(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, 1.0)
