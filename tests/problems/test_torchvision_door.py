"""torchvision imports beside any build of torch, through one door."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

import problems
from problems.blocks.torchvision_door import torchvision

ROOT = Path(problems.__file__).parent


def test_models_datasets_and_transforms_work():
    images = torch.rand(2, 3, 32, 32)
    assert torchvision("models").resnet18(num_classes=7)(images).shape == (2, 7)
    assert issubclass(torchvision("datasets").CIFAR10, torch.utils.data.Dataset)
    assert torch.equal(torchvision("transforms.functional").hflip(images), images.flip(-1))


def test_nothing_else_imports_it():
    importing = {
        path.name
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(
            name.partition(".")[0] == "torchvision"
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        )
    }
    assert importing == set()
