"""The command line. Nothing here imports torch before a specification has been read without mistakes."""

from mlo.cli._app import main as main
