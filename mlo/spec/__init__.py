"""Graph files: YAML with positions, merged, checked and frozen. Nothing here imports torch but `build`."""

from mlo.spec._faults import Fault as Fault
from mlo.spec._files import shipped_graphs as shipped_graphs
from mlo.spec._frozen import Frozen as Frozen
from mlo.spec._levels import Choice as Choice
from mlo.spec._levels import Epochs as Epochs
from mlo.spec._levels import LevelSpec as LevelSpec
from mlo.spec._load import load as load
from mlo.spec._models import CheckpointSpec as CheckpointSpec
from mlo.spec._models import EvaluationSpec as EvaluationSpec
from mlo.spec._models import Spec as Spec
from mlo.spec._models import Start as Start
from mlo.spec._nodes import Place as Place
from mlo.spec._options import check_options as check_options
from mlo.spec._options import construct as construct
from mlo.spec._problems import problem_names as problem_names
from mlo.spec._registry import hypergradient_of as hypergradient_of
from mlo.spec._registry import optimizer_of as optimizer_of
