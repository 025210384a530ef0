"""Labelled images from disk: `image_sets` splits a set by its name, `stream` draws batches from a part of it."""

from problems.blocks.image_sets._registry import DEVIATION as DEVIATION
from problems.blocks.image_sets._registry import MEAN as MEAN
from problems.blocks.image_sets._registry import SETS as SETS
from problems.blocks.image_sets._registry import ImageSet as ImageSet
from problems.blocks.image_sets._sets import ImageSets as ImageSets
from problems.blocks.image_sets._sets import Part as Part
from problems.blocks.image_sets._sets import image_sets as image_sets
from problems.blocks.image_sets._settings import ImageSettings as ImageSettings
from problems.blocks.image_sets._split import Share as Share
from problems.blocks.image_sets._split import stratified as stratified
from problems.blocks.image_sets._stream import in_order as in_order
from problems.blocks.image_sets._stream import stream as stream
