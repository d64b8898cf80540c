"""GaLore and GoLore: pytorch-optimizer's GaLore with projectors whose state can be saved and whose draws are keyed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zotune.baselines.baseline import Setting
from zotune.rng.directions import Directions, Key


def galore_optimizer(
    setting: Setting, rank: int, interval: int, random_share: float, *, scale: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """GaLore over the groups of a setting; GoLore with ``random_share`` above 0.

    Raises:
        ValueError: GoLore without the length of the run.
    """
    from pytorch_optimizer import GaLore
    from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

    class Projector(GaLoreProjector):
        """The library's, with a state of tensors and numbers, and random frames from ``random_from`` on."""

        def __init__(self, name: str) -> None:
            super().__init__(rank=rank, update_proj_gap=interval, scale=scale, projection_type="std")
            self.name = name
            self.calls = 0  # steps this projector has seen
            self.last_svd_step: int = -1
            self.ortho_matrix: Any = None

        def project(self, grad: Tensor, num_steps: int, *args: Any, **kwargs: Any) -> Tensor:
            self.calls = num_steps
            return super().project(grad, num_steps, *args, **kwargs)

        def update_ortho_matrix(self, x: Tensor, from_random_matrix: bool) -> None:
            if self.calls <= random_from:
                super().update_ortho_matrix(x, from_random_matrix)
                # Rounding of a product depends on the layout, and a file stores only one: a resumed run must have the same.
                self.ortho_matrix = self.ortho_matrix.contiguous()
                return
            frame = random_frame(min(x.shape), rank, Key(setting.seed, self.calls, 0, self.name, "subspace"), x.device)
            self.ortho_matrix = (frame.T if x.shape[0] >= x.shape[1] else frame).contiguous()

        def state(self) -> dict[str, Any]:
            return {"frame": self.ortho_matrix, "last": self.last_svd_step}

        def load(self, content: dict[str, Any]) -> None:
            self.ortho_matrix, self.last_svd_step = content["frame"], content["last"]

    random_from = math.inf
    if random_share:
        if setting.max_steps is None:
            raise ValueError("golore needs to know how long the run is: pass max_steps.")
        random_from = round((1 - random_share) * setting.max_steps)
    groups = []
    for group in setting.groups:
        low = [p for p in group["params"] if p.dim() == 2 and min(p.shape) > rank]
        rest = [p for p in group["params"] if not (p.dim() == 2 and min(p.shape) > rank)]
        projection = {"rank": rank, "update_proj_gap": interval, "scale": scale, "projection_type": "std"}
        groups += [{**group, **options, "params": chosen} for chosen, options in ((low, projection), (rest, {})) if chosen]
    optimizer = GaLore(groups, lr=setting.lr, betas=betas, eps=eps)
    for group in optimizer.param_groups:
        if "rank" in group:
            for p in group["params"]:
                optimizer.state[p]["projector"] = Projector(setting.names[id(p)])
    return optimizer


def random_frame(size: int, rank: int, key: Key, device: torch.device) -> Tensor:
    """An orthonormal frame (size, rank), uniform among all of them: the QR factor of a Gaussian, its signs made those of R's diagonal."""
    q, r = torch.linalg.qr(Directions("gaussian").draw(key, (size, rank), device))
    return q * r.diagonal().sign()
