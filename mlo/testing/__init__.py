"""Test a hypergradient method by its theory: problems with known hypergradients, and a check of every property.

Needs hypothesis (`pip install 'mlo[testing]'`), which nothing else of `mlo` imports. See `docs/testing.md`.
"""

from mlo.testing._check import check_method as check_method
from mlo.testing._closed_form import ClosedForm as ClosedForm
from mlo.testing._families import Family as Family
from mlo.testing._promise import Answer as Answer
from mlo.testing._properties import PROPERTIES as PROPERTIES
from mlo.testing._strategies import chains as chains
from mlo.testing._strategies import dags as dags
from mlo.testing._strategies import diamonds as diamonds
from mlo.testing._strategies import ladders as ladders
from mlo.testing._strategies import logistic as logistic
from mlo.testing._strategies import problems as problems
from mlo.testing._strategies import quadratics as quadratics
from mlo.testing._strategies import ridge as ridge
from mlo.testing._strategies import shapes as shapes
from mlo.testing._strategies import two_levels as two_levels
