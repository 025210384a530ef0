"""Run a specification: the loop over iterations, what it writes, and how to go on with it or open it again."""

from mlo._run._open import Run as Run
from mlo._run._open import open_run as open_run
from mlo._run._run import resume as resume
from mlo._run._run import run as run
