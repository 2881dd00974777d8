"""A small convolutional classifier, trained on real handwritten digits, that scores images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from pipevault.demo import CLASSIFIER_FILE

IMAGE_SIZE_PX = 32


class DigitClassifier(nn.Module):
    """Ten logits for a batch of ink maps of shape ``(n, 1, 32, 32)``, with 0 for paper and 1 for ink."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(48 * 4 * 4, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )

    def forward(self, ink: Tensor) -> Tensor:
        logits: Tensor = self.layers(ink)
        return logits


def recognise(images: Sequence[Image.Image]) -> tuple[list[int], list[float]]:
    """Return the most likely digit of every image and the probability given to it (0 to 1)."""
    if not images:
        return [], []
    confidences, digits = _probabilities(images).max(dim=1)
    return digits.tolist(), confidences.tolist()


def confidences(images: Sequence[Image.Image], digits: Sequence[int]) -> list[float]:
    """Return the probability (0 to 1) that the classifier gives to ``digits[i]`` in ``images[i]``.

    ``ValueError``: not one digit from 0 to 9 for each image.
    """
    if len(images) != len(digits) or not all(0 <= digit < 10 for digit in digits):
        raise ValueError(f"{len(images)} images need as many digits from 0 to 9, not {list(digits)}")
    if not images:
        return []
    chosen: list[float] = _probabilities(images)[torch.arange(len(digits)), torch.tensor(list(digits))].tolist()
    return chosen


def _probabilities(images: Sequence[Image.Image]) -> Tensor:
    """The probability of each digit in each image of dark ink on light paper, shape ``(n, 10)``."""
    size_px = (IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    grey = [image.convert("L").resize(size_px, Image.Resampling.BILINEAR) for image in images]
    paper = np.stack([np.asarray(image, dtype=np.float32) for image in grey]) / 255.0
    with torch.inference_mode():
        logits: Tensor = _classifier()(torch.from_numpy(1.0 - paper).unsqueeze(1))
    return logits.softmax(dim=1)


@cache
def _classifier() -> DigitClassifier:
    """The shipped classifier in float32."""
    classifier = DigitClassifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(CLASSIFIER_FILE).items()})
    return classifier.eval()
