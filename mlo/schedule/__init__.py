"""Numbers that change from iteration to iteration, for options of objectives and optimizers. The registry of schedules."""

from mlo.schedule._abstract import AbstractSchedule as AbstractSchedule
from mlo.schedule._constant import Constant as Constant
from mlo.schedule._cosine import Cosine as Cosine
from mlo.schedule._epochs import Epochs as Epochs
from mlo.schedule._multi_step import MultiStep as MultiStep
from mlo.schedule._warm_up import WarmUp as WarmUp
