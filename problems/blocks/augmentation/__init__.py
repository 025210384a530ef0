"""The operations of automatic augmentation, differentiable in their magnitudes, and policies made of them."""

from problems.blocks.augmentation._operations import OPERATIONS as OPERATIONS
from problems.blocks.augmentation._operations import apply as apply
from problems.blocks.augmentation._operations import apply_each as apply_each
from problems.blocks.augmentation._policy import Policy as Policy
from problems.blocks.augmentation._policy import draws_for as draws_for
