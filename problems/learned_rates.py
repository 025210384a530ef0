"""Learned learning rates and weight decays: what an optimizer reads from a level is trained as that level is.

A network of two layers is trained on few digits; each of its tensors has a rate and a decay of its own, which descend
the validation loss through the network's last steps (Maclaurin et al. 2015, §3, learn them by unrolling a whole run; Baydin
et al. 2018, Eq. 5, through one step).

A graph names its levels `classifier` and, where rates are learned, `rates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import mlo
from problems.blocks.digits import FewDigits, whole_parts
from problems.blocks.networks import TwoLayers
from problems.blocks.scores import classification_scores


def build(settings: FewDigits, context: mlo.Context) -> mlo.Problem:
    """A network on flattened digits; all of a split is one batch."""
    parts = whole_parts(context, settings.train_per_class, settings.validation_per_class, settings.test_per_class)

    def evaluate(
        values: Mapping[str, Any],
        split: mlo.Split,
        *,
        model: tuple[str, ...],
        totals: Mapping[str, Mapping[str, Tensor]],
        complete: bool,
    ) -> mlo.Evaluation:
        scores = classification_scores(values[model[0]](parts[split]["images"], training=False), parts[split]["labels"])
        tables = (_table(values["rates"]),) if complete and "rates" in values else ()
        return mlo.Evaluation(metrics=scores.metrics, tables=tables)

    return mlo.Problem(
        variables={"two_layers": TwoLayers, "rates": rates},
        objectives={"classification": classification},
        streams={name: mlo.stream.Constant(part) for name, part in parts.items() if name != "test"},
        evaluate=evaluate,
    )


def rates(*, learning_rate: float = 0.1, weight_decay: float = 1e-3) -> dict[str, Tensor]:
    """`learning_rate.<parameter>` and `weight_decay.<parameter>`, zero-dimensional, for each of `two_layers`."""
    starts = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    names = [name for name, _ in TwoLayers().named_parameters()]
    return {f"{option}.{name}": torch.tensor(start) for option, start in starts.items() for name in names}


def classification(values: mlo.Values, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of level `classifier`."""
    return cross_entropy(values["classifier"](batch["images"]), batch["labels"])


def _table(learned: Mapping[str, Tensor]) -> mlo.Table:
    """What has been learned, a row a tensor of the network."""
    options = tuple(dict.fromkeys(name.partition(".")[0] for name in learned))
    tensors = dict.fromkeys(name.partition(".")[2] for name in learned)
    rows = tuple((name, *(float(learned[f"{option}.{name}"]) for option in options)) for name in tensors)
    return mlo.Table(title="learned", columns=("tensor", *(option.replace("_", " ") for option in options)), rows=rows)
