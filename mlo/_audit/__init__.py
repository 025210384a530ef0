"""How far each hypergradient method is from the truth on the problem itself, and what it costs there."""

from mlo._audit._audit import audit as audit
from mlo._audit._report import Audit as Audit
from mlo._audit._table import print_audit as print_audit
