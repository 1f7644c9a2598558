"""Digit classifiers: the project's own, the course's LeNet and a published ResNet-34.

The LeNet is for MNIST-M, the ResNet-34 for SVHN.
"""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoint import load_config, load_strict, load_weights, save_model
from common.data.digits import NUM_DIGITS
from common.images import to_model_range
from common.metrics.small_resnet import SmallResNet
from common.weights import read_weights

KIND = "common.DigitClassifier"
CHANNELS = (40, 96, 160)
FEATURES = CHANNELS[-1]
SHIFTS = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
"""(row, column) offsets into an image padded by one pixel; the first gives the image itself."""
# Per-channel mean and standard deviation for pixels in [0, 1] that the published SVHN network was
# trained with (model card of edadaltocg/resnet34_svhn).
SVHN_MEAN, SVHN_STD = (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197)
SVHN_REPOSITORY = "edadaltocg/resnet34_svhn"


class Classifier(Protocol):
    """A function from images [N, 3, 28, 28] in [-1, 1] to logits [N, 10]."""

    def __call__(self, images: Tensor, /) -> Tensor: ...


class DigitClassifier(SmallResNet):
    """A small ResNet for the 28x28 digits of both datasets, with blocks at 14x14, 7x7 and 4x4."""

    def __init__(self) -> None:
        super().__init__(CHANNELS, patch=2)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(FEATURES, NUM_DIGITS)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 3, 28, 28] in [-1, 1].

        In evaluation mode they are log-probabilities, averaged over five views: the image and its
        four shifts by a pixel. The first convolution has stride 2, so its response to a thin stroke
        depends on the stroke's position, and the mean depends on it less (+0.3 % accuracy on
        held-out MNIST-M digits, +0.7 % on SVHN's).
        """
        if self.training:
            return self.head(self.dropout(self.features(images)))
        height, width = images.shape[-2:]
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        views = [padded[..., y : y + height, x : x + width] for y, x in SHIFTS]
        return torch.stack([self.head(self.features(view)).log_softmax(1) for view in views]).mean(
            0
        )

    def save(self, folder: Path) -> None:
        """Writes the model folder."""
        save_model(folder, self, KIND, {})

    @classmethod
    def load(cls, folder: Path) -> "DigitClassifier":
        """Reads the network from its model folder, in evaluation mode."""
        load_config(folder, KIND)
        model = cls()
        load_weights(folder, model)
        return model.eval().to(memory_format=torch.channels_last)


class LeNet(nn.Module):
    """The course's MNIST-M classifier: images [N, 3, 28, 28] in [-1, 1] to logits [N, 10].

    Its state dict has the keys of the course's `Classifier.pth`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 4 * 4, 128)
        self.fc2 = nn.Linear(128, 64)
        self.fc3 = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 3, 28, 28] in [-1, 1]."""
        h = F.max_pool2d(F.relu(self.conv1(images)), 2)  # [N, 6, 12, 12]
        h = F.max_pool2d(F.relu(self.conv2(h)), 2)  # [N, 16, 4, 4]
        h = F.relu(self.fc2(F.relu(self.fc1(h.flatten(1)))))
        return self.fc3(h)


def load_lenet(path: Path) -> LeNet:
    """The course's LeNet from `Classifier.pth`, in evaluation mode.

    The file holds a dict with `state_dict`, or the state dict itself. Raises InputError if the
    weights do not fit.
    """
    model = LeNet()
    load_strict(model, read_weights(path), path)
    return model.eval()


class PublishedSVHN(nn.Module):
    """timm's ResNet-34 as published for 32x32 SVHN: images in [-1, 1] to logits [N, 10].

    Its first convolution is 3x3 with stride 1, and it has no first pooling.
    """

    def __init__(self) -> None:
        super().__init__()
        import timm  # a slow import that only this class needs

        self.network = timm.create_model("resnet34", num_classes=10)
        self.network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        self.network.maxpool = nn.Identity()
        self.register_buffer("mean", torch.tensor(SVHN_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(SVHN_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 3, H, W] in [-1, 1]."""
        return self.network(((images + 1.0) / 2.0 - self.mean) / self.std)


def load_published_svhn(path: Path) -> PublishedSVHN:
    """The published SVHN network from its weight file, `.bin`, `.pth` or `.safetensors`."""
    model = PublishedSVHN()
    load_strict(model.network, read_weights(path), path)
    return model.eval()


def find_published_svhn() -> Path | None:
    """The published SVHN network's weight file in the local Hugging Face cache, or None.

    Nothing is downloaded.
    """
    from huggingface_hub import try_to_load_from_cache

    for name in ("model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(SVHN_REPOSITORY, name)
        if isinstance(found, str):
            return Path(found)
    return None


@torch.no_grad()
def log_probabilities(classifier: Classifier, images: Tensor, batch_size: int = 200) -> Tensor:
    """Log-probabilities of the digits, [N, 10], of uint8 images [N, 3, 28, 28]."""
    parts = images.split(batch_size)
    return torch.cat([classifier(to_model_range(part)).log_softmax(1) for part in parts])


@torch.no_grad()
def classify(classifier: Classifier, images: Tensor, batch_size: int = 200) -> Tensor:
    """Predicted digits, long [N], of uint8 images [N, 3, 28, 28]."""
    return torch.cat(
        [classifier(to_model_range(part)).argmax(1) for part in images.split(batch_size)]
    )
