"""Generators of images from latents and labels, with their discriminators: `generators_for`, `discriminators_for`."""

from problems.blocks.generators._abstract import AbstractGenerator as AbstractGenerator
from problems.blocks.generators._biggan import BigGANGenerator as BigGANGenerator
from problems.blocks.generators._biggan import ProjectionDiscriminator as ProjectionDiscriminator
from problems.blocks.generators._conditional_norm import ConditionalBatchNorm as ConditionalBatchNorm
from problems.blocks.generators._convolutional import AuxiliaryDiscriminator as AuxiliaryDiscriminator
from problems.blocks.generators._convolutional import ConvolutionalDiscriminator as ConvolutionalDiscriminator
from problems.blocks.generators._convolutional import ConvolutionalGenerator as ConvolutionalGenerator
from problems.blocks.generators._ddim import ddim as ddim
from problems.blocks.generators._ddim import image_and_noise as image_and_noise
from problems.blocks.generators._ddim import noisy as noisy
from problems.blocks.generators._ddim import signal as signal
from problems.blocks.generators._diffusion import Diffusion as Diffusion
from problems.blocks.generators._elsewhere import Signature as Signature
from problems.blocks.generators._elsewhere import exported as exported
from problems.blocks.generators._elsewhere import imported as imported
from problems.blocks.generators._elsewhere import torchscript as torchscript
from problems.blocks.generators._judgement import generated_scores as generated_scores
from problems.blocks.generators._judgement import grid as grid
from problems.blocks.generators._registry import discriminators_for as discriminators_for
from problems.blocks.generators._registry import generators_for as generators_for
from problems.blocks.generators._spectral import SpectralNorm as SpectralNorm
from problems.blocks.generators._spectral import spectral as spectral
