"""Run a specification: the loop over iterations, what it writes, and how to open it again."""

from mlo._run._loop import run as run
from mlo._run._open import Run as Run
from mlo._run._open import open_run as open_run
