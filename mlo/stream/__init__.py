"""Streams: what a level draws its batches from. Every draw is keyed by (seed, stream, iteration, step)."""

from mlo.stream._abstract import AbstractStream as AbstractStream
from mlo.stream._abstract import Draw as Draw
from mlo.stream._balanced import Balanced as Balanced
from mlo.stream._constant import Constant as Constant
from mlo.stream._iterated import Iterated as Iterated
from mlo.stream._noise import Noise as Noise
from mlo.stream._shuffled import Shuffled as Shuffled
