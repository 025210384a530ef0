"""What asks a generative foundation model for images: latents mapped, and labels converted, by the classes wanted.

The conditional mapper M_φ and the label converter I_ξ of MP-SSL (Yamaguchi 2024, Eqs. 10 to 12), which are learned together.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import mlo
from problems.blocks.finders import perceptron

Form: TypeAlias = Literal["hard", "soft_gumbel", "soft"]
"""What a label converter gives: one label, drawn; weights of all, drawn; or the weights that are learned, not drawn."""

DEGENERATE = 1e-5
"""The temperature from which on the gradient of a label is zero for nearly all draws."""


@final
class ConditionalMapper(nn.Module):
    """M_φ(z, y) = MLP_φ(Concat(z, EMB_φ(y))) (MP-SSL, Eq. 10): latents [n, latent] and classes [n] to latents [n, latent].

    The multilayer perceptron has leaky ReLUs (§4.1). Its weights start with the variance that keeps mean squares from layer
    to layer (He et al. 2015), its biases at zero, so that standard normal latents become latents of mean square 1 about:
    the paper does not say, and torch's own start gives latents of mean square 0.015, for which a generator has next to one
    image a label.

    - `classes`: how many; None for the unconditional mapper M_φ(z) of Table 4, which is handed classes and ignores them.
    - `layers`, `hidden`: see `perceptron`.
    - `embedding`: the size of EMB_φ(y), which starts standard normal.
    """

    def __init__(
        self, *, latent: int, classes: int | None, layers: int = 3, hidden: int = 64, embedding: int = 16
    ) -> None:
        super().__init__()
        self.embedding = None if classes is None else nn.Embedding(classes, embedding)
        inputs = latent + (0 if classes is None else embedding)
        self.network = perceptron(inputs, latent, layers=layers, hidden=hidden)
        gain = 1.0
        for part in self.network:
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=gain / part.in_features**0.5)
                nn.init.zeros_(part.bias)
            gain = nn.init.calculate_gain("leaky_relu", 0.01)

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        """See the class."""
        return self.network(z if self.embedding is None else torch.cat((z, self.embedding(classes)), dim=1))


@final
class LabelConverter(nn.Module):
    r"""I_ξ: classes [n] to weights of the foundation's labels [n, labels], by Gumbel noise g (MP-SSL, Eqs. 11 and 12).

        soft = softmax((log EMB_ξ(y) + g)/τ),    hard = one-hot of argmax soft = argmax (log EMB_ξ(y) + g).

    EMB_ξ, which the logarithm wants positive, is a table of log-probabilities [classes, labels], each row up to a constant;
    it starts at zero: every label as likely. So `hard` is a draw from softmax(table[y]) (the Gumbel-max trick), whatever τ.

    - `temperature`: τ, for the derivative of `hard` and the value of `soft_gumbel`.
    - `form`: `hard`, one-hot with the derivative of soft (straight-through); `soft_gumbel`, soft itself; `soft`,
      softmax(table[y]) without noise, "EMB_ξ" of Table 5.

    The derivative of soft is up to 1/(4τ), where two labels are about equally likely after the noise, in a share of draws
    proportional to τ; elsewhere it vanishes. Raises UserError for a temperature that is not positive.
    """

    def __init__(self, *, classes: int, labels: int, temperature: float = 0.1, form: Form = "hard") -> None:
        super().__init__()
        if not temperature > 0:
            raise mlo.UserError(f"temperature={temperature}: it must be above 0")
        self.table = nn.Parameter(torch.zeros(classes, labels))
        self.temperature = temperature
        self.form: Form = form

    def forward(self, classes: Tensor, gumbel: Tensor) -> Tensor:
        """See the class. Gumbel noise [n, labels], from `gumbel_noise`."""
        rows = self.table[classes]
        if self.form == "soft":
            return rows.softmax(1)
        perturbed = rows + gumbel
        soft = (perturbed / self.temperature).softmax(1)
        if self.form == "soft_gumbel":
            return soft
        hard = one_hot(perturbed.detach().argmax(1), soft.shape[1]).to(soft.dtype)
        return hard + (soft - soft.detach())


@final
class MapperAndConverter(nn.Module):
    """M_φ and I_ξ as the variables of one level: (z, y, g) to latents M_φ(z, y) and label weights I_ξ(y)."""

    def __init__(self, mapper: ConditionalMapper, converter: LabelConverter) -> None:
        super().__init__()
        self.mapper = mapper
        self.converter = converter

    def forward(self, z: Tensor, classes: Tensor, gumbel: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [n, latent], classes [n] and Gumbel noise [n, labels] to [n, latent] and [n, labels]."""
        return self.mapper(z, classes), self.converter(classes, gumbel)


def mapper_and_converter(
    *,
    latent: int,
    classes: int,
    labels: int,
    temperature: float = 0.1,
    form: Form = "hard",
    conditional: bool = True,
    degenerate: bool = False,
    layers: int = 3,
    hidden: int = 64,
    embedding: int = 16,
) -> MapperAndConverter:
    """The sampler for `classes` classes above a generator of `labels` labels.

    - `conditional`: whether the mapper sees y.
    - `degenerate`: whether temperatures are accepted at which labels do not learn.

    Raises ValueError for a temperature that is not positive, and for one of 1e-5 or less: with 20 equally likely labels a
    share of 20 τ of all draws has a gradient worth the name, so that batches of 64 have none at all, or one of thousands.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if temperature <= DEGENERATE and form != "soft" and not degenerate:
        raise ValueError(
            f"temperature is {temperature:g}; at 1e-5 the gradient of a label is exactly zero in 94 of 100 batches of 64 in "
            "float32 (80 in float64) and up to 1/(4 temperature) in the others, so that labels do not learn; choose 1e-3 or "
            "above, 0.1 is the paper's, or say `degenerate: true` to see it"
        )
    mapper = ConditionalMapper(
        latent=latent, classes=classes if conditional else None, layers=layers, hidden=hidden, embedding=embedding
    )
    return MapperAndConverter(
        mapper, LabelConverter(classes=classes, labels=labels, temperature=temperature, form=form)
    )


def gumbel_noise(*shape: int, generator: torch.Generator, dtype: torch.dtype | None = None) -> Tensor:
    """−log(−log u) with u uniform in (0, 1): standard Gumbel numbers, finite ones (MP-SSL, below Eq. 12)."""
    exponential = torch.empty(shape, dtype=dtype).exponential_(generator=generator)
    return -exponential.clamp(min=torch.finfo(exponential.dtype).tiny).log()


def entropies(table: Tensor) -> Tensor:
    """−Σ_l p_l log p_l of each row's softmax, in nats, [classes]: log labels where all are alike, 0 where one is sure."""
    logs = table.log_softmax(1)
    return -(logs.exp() * logs).sum(1)
