"""Hypergradient methods: how a cotangent on a response is pulled back. This namespace is the registry."""

from mlo.hypergradient._abstract import AbstractHypergradient as AbstractHypergradient
from mlo.hypergradient._abstract import AbstractResponse as AbstractResponse
from mlo.hypergradient._abstract import AbstractStep as AbstractStep
from mlo.hypergradient._abstract import Cost as Cost
from mlo.hypergradient._finite_difference import FiniteDifference as FiniteDifference
from mlo.hypergradient._unroll import Unroll as Unroll
