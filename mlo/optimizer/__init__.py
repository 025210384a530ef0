"""Differentiable optimizers: pure `init` and `update` over explicit state. This namespace is the registry."""

from mlo.optimizer._abstract import AbstractOptimizer as AbstractOptimizer
from mlo.optimizer._abstract import OptimizerState as OptimizerState
from mlo.optimizer._adam import Adam as Adam
from mlo.optimizer._sgd import SGD as SGD
