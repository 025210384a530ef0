"""Networks: those of the papers, for images in [0, 1] behind `normalised`, and small ones for digits in [−1, 1]."""

from problems.blocks.networks._densenet import DenseNet as DenseNet
from problems.blocks.networks._digits import CLASSES as CLASSES
from problems.blocks.networks._digits import Classifier as Classifier
from problems.blocks.networks._digits import Encoder as Encoder
from problems.blocks.networks._digits import Generator as Generator
from problems.blocks.networks._digits import LastTwoLayers as LastTwoLayers
from problems.blocks.networks._digits import TwoLayers as TwoLayers
from problems.blocks.networks._divided import Divided as Divided
from problems.blocks.networks._divided import divided as divided
from problems.blocks.networks._for_images import networks_for as networks_for
from problems.blocks.networks._normalise import Normalise as Normalise
from problems.blocks.networks._normalise import normalised as normalised
from problems.blocks.networks._resnet import resnet as resnet
from problems.blocks.networks._small import SmallCNN as SmallCNN
from problems.blocks.networks._smooth import SmoothCNN as SmoothCNN
from problems.blocks.networks._wide_resnet import WideResNet as WideResNet
