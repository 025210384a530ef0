"""The settings that say which images a problem works on."""

from __future__ import annotations

import mlo
from problems.blocks.image_sets._sets import ImageSets, image_sets


class ImageSettings(mlo.Settings):
    """Which images, how they are divided, and the size of the batches.

    - `source`, `root`, `complete`, `size`, `workers`: see `image_sets`.
    - `foundation`: the share of the set's training images that is taken away first, for a foundation model alone.
    - `fraction`: the share of the others that is used at all.
    - `validation`: the share of these that is set aside for validation; the others are for training.
    - `batch_size`: images a batch.
    """

    source: str = "digits"
    root: str | None = None
    complete: bool = True
    size: int | None = None
    workers: int = 0
    foundation: float = 0.0
    fraction: float = 1.0
    validation: float = 0.1
    batch_size: int = 64

    def sets(self, seed: int) -> ImageSets:
        """The images, divided by `seed`. Raises what `image_sets` raises, and ValueError for a batch of no image."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        return image_sets(
            self.source,
            root=self.root,
            seed=seed,
            validation=self.validation,
            fraction=self.fraction,
            foundation=self.foundation,
            size=self.size,
            complete=self.complete,
            workers=self.workers,
        )
