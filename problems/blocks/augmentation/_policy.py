"""Policies of augmentation: stages of operations, each drawn, applied or not, and as strong as has been learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

import mlo
from problems.blocks.augmentation._operations import OPERATIONS, apply_each


@final
class Policy(nn.Module):
    r"""K stages of one operation each, drawn for every image (Hataya et al. 2022, Eqs. 8 and 9):

        x ← u_i/SG(u_i) · (x + b (O_i(x; μ_i) − x)),    i = argmax u,    u = softmax((log π + g)/τ),
        b = σ((log p_i − log(1 − p_i) + log v − log(1 − v))/τ),

    with Gumbel noise g, uniform v and the gradient stopped at SG. A stage's 14 probabilities p, magnitudes μ and selection
    probabilities π (Σ π = 1) are its own. Only the operation that was drawn is computed. u_i/SG(u_i) is 1: images stay
    in [0, 1], where it belongs, and the gradient in π is that of ⟨∂L/∂x, x⟩ log u_i, the estimate that the paper
    defines. It is not unbiased for the derivative of the expected loss in π.

    A pure function of images, parameters and draws. p → 0 makes it the identity, bit for bit.

    - `stages`: K.
    - `temperature`: τ, of both relaxations. As τ → 0, b is 1 with probability p and 0 otherwise.
    - `initial`: p and μ at the start; π is the same for all operations.

    Raises UserError for a setting out of range.
    """

    def __init__(self, *, stages: int = 2, temperature: float = 0.1, initial: float = 0.5) -> None:
        super().__init__()
        if stages < 1:
            raise mlo.UserError(f"stages={stages}: a policy has at least one stage")
        if not temperature > 0:
            raise mlo.UserError(f"temperature={temperature}: it must be above 0")
        if not 0 < initial < 1:
            raise mlo.UserError(f"initial={initial}: probabilities and magnitudes start between 0 and 1")
        self.stages = stages
        self.temperature = temperature
        shape, start = (stages, len(OPERATIONS)), math.log(initial / (1 - initial))
        self.probability = nn.Parameter(torch.full(shape, start))  # before the sigmoid
        self.magnitude = nn.Parameter(torch.full(shape, start))  # before the sigmoid
        self.selection = nn.Parameter(torch.zeros(shape))  # before the softmax

    def probabilities(self) -> Tensor:
        """p, [K, 14] in [0, 1]."""
        return self.probability.sigmoid()

    def magnitudes(self) -> Tensor:
        """μ, [K, 14] in [0, 1]."""
        return self.magnitude.sigmoid()

    def selections(self) -> Tensor:
        """π, [K, 14] in [0, 1], with Σ π = 1 in each stage."""
        return self.selection.softmax(1)

    def choices(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Which operation each image gets in each stage, i of Eq. 9, [n, K]."""
        return (self.selection + draws["selection"].to(self.selection.dtype)).detach().argmax(2)

    def forward(self, images: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """The augmented images [n, channels, height, width], from images in [0, 1] and what `draws_for` draws for n."""
        gumbel = draws["selection"].to(self.selection.dtype)
        if gumbel.shape != (len(images), self.stages, len(OPERATIONS)):
            raise mlo.UserError(
                f"{len(images)} images and {self.stages} stages need selection noise of shape "
                f"{[len(images), self.stages, len(OPERATIONS)]}, and these draws have {list(gumbel.shape)}"
            )
        chosen = self.choices(draws)[..., None]  # [n, K, 1]
        relaxed = ((self.selection + gumbel) / self.temperature).softmax(2).gather(2, chosen)
        unit = relaxed / relaxed.detach()
        logits = self.probability.expand_as(gumbel).gather(2, chosen)
        uniform = draws["application"].to(logits.dtype)[..., None]
        applied = torch.sigmoid((logits + uniform.log() - torch.log1p(-uniform)) / self.temperature)
        magnitudes = self.magnitudes().expand_as(gumbel).gather(2, chosen)
        for stage in range(self.stages):
            changed = apply_each(
                images, chosen[:, stage, 0], magnitudes[:, stage, 0], draws["signs"][:, stage].to(images.dtype)
            )
            weight = applied[:, stage, :, None, None].to(images.dtype)
            images = unit[:, stage, :, None, None].to(images.dtype) * (images + weight * (changed - images))
        return images


def draws_for(count: int, *, stages: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What a policy draws for `count` images, as plain data.

    - `application`: uniform in (0, 1), [count, stages].
    - `selection`: Gumbel noise, [count, stages, 14].
    - `signs`: −1 or 1 with equal probability, [count, stages].
    """
    application = _uniform(count, stages, generator=generator)
    selection = -(-_uniform(count, stages, len(OPERATIONS), generator=generator).log()).log()
    signs = 2.0 * torch.randint(2, (count, stages), generator=generator) - 1
    return {"application": application, "selection": selection, "signs": signs}


def _uniform(*shape: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers, in neither end of (0, 1), where logarithms are infinite."""
    numbers = torch.rand(shape, generator=generator)
    limits = torch.finfo(numbers.dtype)
    return numbers.clamp(limits.tiny, 1 - limits.eps / 2)
