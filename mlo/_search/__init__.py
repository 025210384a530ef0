"""The values of some keys that are best by a validation metric: trials × seeds, on the cells of a table.

optuna, which chooses the trials, and torch are imported when there are no mistakes left to find.
"""

from mlo._search._asked import Asked as Asked
from mlo._search._asked import Sampler as Sampler
from mlo._search._asked import asked as asked
from mlo._search._plan import check_space as check_space
from mlo._search._space import space_of as space_of
