"""Differentiable optimizers: pure `init` and `update` over explicit state. This namespace is the registry."""

from mlo.optimizer._abstract import AbstractOptimizer as AbstractOptimizer
from mlo.optimizer._abstract import OptimizerState as OptimizerState
from mlo.optimizer._adam import Adam as Adam
from mlo.optimizer._adamw import AdamW as AdamW
from mlo.optimizer._apply import initial as initial
from mlo.optimizer._apply import is_decoupled as is_decoupled
from mlo.optimizer._apply import l2_decays as l2_decays
from mlo.optimizer._apply import updated as updated
from mlo.optimizer._pullback import has_closed_pullback as has_closed_pullback
from mlo.optimizer._pullback import multiple_of_cotangent as multiple_of_cotangent
from mlo.optimizer._pullback import pulled_back as pulled_back
from mlo.optimizer._read import Read as Read
from mlo.optimizer._read import options_read as options_read
from mlo.optimizer._rmsprop import RMSprop as RMSprop
from mlo.optimizer._sgd import SGD as SGD
