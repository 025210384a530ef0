"""Graphs × seeds: run what is missing, in one process or several, and compare what came of it.

What is planned is known without torch; `mlo._table._make` is imported when there are no mistakes left to find.
"""

from mlo._table._plan import Plan as Plan
from mlo._table._plan import Request as Request
from mlo._table._plan import control_of as control_of
from mlo._table._plan import plan as plan
