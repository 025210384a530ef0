"""Hypergradient methods: how a cotangent on a response is pulled back. This namespace is the registry."""

from mlo.hypergradient._abstract import AbstractCross as AbstractCross
from mlo.hypergradient._abstract import AbstractHypergradient as AbstractHypergradient
from mlo.hypergradient._abstract import AbstractLinearisation as AbstractLinearisation
from mlo.hypergradient._abstract import AbstractResponse as AbstractResponse
from mlo.hypergradient._abstract import AbstractStep as AbstractStep
from mlo.hypergradient._abstract import Cost as Cost
from mlo.hypergradient._abstract import Nesting as Nesting
from mlo.hypergradient._abstract import Tape as Tape
from mlo.hypergradient._conjugate_gradient import ConjugateGradient as ConjugateGradient
from mlo.hypergradient._cross import CentralDifference as CentralDifference
from mlo.hypergradient._cross import ExactCross as ExactCross
from mlo.hypergradient._equilibrium import Equilibrium as Equilibrium
from mlo.hypergradient._exact import Exact as Exact
from mlo.hypergradient._finite_difference import FiniteDifference as FiniteDifference
from mlo.hypergradient._first_order import FirstOrder as FirstOrder
from mlo.hypergradient._forward import Forward as Forward
from mlo.hypergradient._gmres import GMRES as GMRES
from mlo.hypergradient._implicit import AbstractInverse as AbstractInverse
from mlo.hypergradient._implicit import Implicit as Implicit
from mlo.hypergradient._neumann import Neumann as Neumann
from mlo.hypergradient._nystrom import Nystrom as Nystrom
from mlo.hypergradient._preconditioned import Preconditioned as Preconditioned
from mlo.hypergradient._unroll import Unroll as Unroll
from mlo.hypergradient._zeroth_order import ZerothOrder as ZerothOrder
