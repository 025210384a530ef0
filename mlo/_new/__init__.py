"""Write a problem, a graph and a test that run as they are, for a user to change."""

from mlo._new._write import new as new
