"""The papers built on `mlo`: one module a paper, and the `blocks` that they share. Imports mlo's public names only."""
