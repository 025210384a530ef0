"""Pictures of a graph, from its specification alone: text, Mermaid and SVG. Nothing here imports torch or a problem."""

from mlo._draw._mermaid import mermaid as mermaid
from mlo._draw._svg import svg as svg
from mlo._draw._text import text as text
