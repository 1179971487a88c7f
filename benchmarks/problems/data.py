"""Image data sets as standardised arrays: what comes out is what the networks see."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.problems.files import Source, data_folder, locate, read
from benchmarks.problems.idx import DamagedFile, parse_idx

Folder = Path | str | None


class Dataset(NamedTuple):
    """Training and test images with their labels.

    Attributes:
        train_x: float32, shape ``(N, height, width, channels)``, standardised.
        train_y: int32 labels, shape ``(N,)``.
        test_x: Test images, standardised with the training set's mean and deviation.
        test_y: Test labels.
        classes: Number of classes.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: int


def standardised(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, *, scale: float = 255.0
) -> Dataset:
    """Images divided by ``scale``, then shifted and scaled by the training set's mean and deviation per channel.

    Raises:
        ValueError: There are no images, or a training channel is constant.
    """
    for name, images in (("train_x", train_x), ("test_x", test_x)):
        if len(images) == 0:
            raise ValueError(f"{name}: no images; wanted at least one")
    axes = (0, 1, 2)
    mean = train_x.mean(axes, dtype=np.float64) / scale
    deviation = train_x.std(axes, dtype=np.float64) / scale
    if not np.all(deviation > 0):
        raise ValueError(f"train_x: deviation {deviation.tolist()} per channel; wanted it positive")
    factor, shift = np.float32(1 / (scale * deviation)), np.float32(mean / deviation)
    return Dataset(
        train_x.astype(np.float32) * factor - shift,
        np.asarray(train_y, np.int32).reshape(-1),
        test_x.astype(np.float32) * factor - shift,
        np.asarray(test_y, np.int32).reshape(-1),
        10,
    )


def digits(seed: int = 0, test_fraction: float = 0.2) -> Dataset:
    """The 1,797 handwritten 8x8 digits that come with scikit-learn; no download.

    Args:
        seed: Of the split, which keeps the classes' shares (1,437 for training, 360 for testing).
        test_fraction: Share of the images kept for testing.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=test_fraction, random_state=seed, stratify=labels
    )
    return standardised(train_x, train_y, test_x, test_y, scale=16.0)


_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_IDX_SIZES = {
    "train-images-idx3-ubyte.gz": 16 + 60_000 * 28 * 28,
    "train-labels-idx1-ubyte.gz": 8 + 60_000,
    "t10k-images-idx3-ubyte.gz": 16 + 10_000 * 28 * 28,
    "t10k-labels-idx1-ubyte.gz": 8 + 10_000,
}


def _idx_sources(folder: str, address: str, hashes: tuple[tuple[str, str], ...]) -> tuple[Source, ...]:
    """Four files with the hashes of what is downloaded, and of what is in it."""
    return tuple(
        Source(folder, name, address + name, *both, size=size)
        for (name, size), both in zip(_IDX_SIZES.items(), hashes, strict=True)
    )


MNIST = _idx_sources(
    "mnist",
    _MNIST,
    (
        ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
        ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
        ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
        ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
    ),
)
FASHION_MNIST = _idx_sources(
    "fashion_mnist",
    _FASHION,
    (
        ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
        ("25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9"),
        ("bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a"),
        ("bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965"),
    ),
)


def mnist(data: Folder = None, *, verify: bool = True) -> Dataset:
    """MNIST: 60,000 training and 10,000 test images of 28x28, standardised by one mean and one deviation.

    Args:
        data: Folder that holds ``mnist/``; else ``EKI_JAX_DATA``; else the files are downloaded.
        verify: Check the hashes (switch it off for files you made yourself, with fewer images).

    Raises:
        MissingFile: A file is missing; it is named.
        DamagedFile: A file is truncated, damaged or another one.
    """
    return _idx_dataset(MNIST, data, verify)


def fashion_mnist(data: Folder = None, *, verify: bool = True) -> Dataset:
    """Fashion-MNIST, in MNIST's format and sizes, from the folder ``fashion_mnist/``; arguments as for ``mnist``."""
    return _idx_dataset(FASHION_MNIST, data, verify)


def _idx_dataset(sources: tuple[Source, ...], data: Folder, verify: bool) -> Dataset:
    arrays = []
    for source, ndim in zip(sources, (3, 1, 3, 1), strict=True):
        name = str(locate(source, data))
        arrays.append(parse_idx(read(source, data, verify=verify), name, ndim))
    train_x, train_y, test_x, test_y = arrays
    for images, labels, image_source, source in (
        (train_x, train_y, *sources[:2]),
        (test_x, test_y, *sources[2:]),
    ):
        if images.shape[1:] != (28, 28):
            raise DamagedFile(f"{locate(image_source, data)}: images of shape {images.shape[1:]}; wanted (28, 28)")
        _check_labels(labels, len(images), str(locate(source, data)))
    return standardised(train_x[..., None], train_y, test_x[..., None], test_y)


def _check_labels(labels: np.ndarray, images: int, name: str) -> None:
    if len(labels) != images:
        raise DamagedFile(f"{name}: {len(labels)} labels; wanted {images}, one for every image")
    if len(labels) and labels.max() > 9:
        raise DamagedFile(f"{name}: the label {labels.max()}; wanted 0 to 9")


_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
_CIFAR_RECORD = 1 + 3 * 32 * 32
_CIFAR_CONTENT = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
CIFAR10 = tuple(
    Source("cifar10", name, _CIFAR_URL, _CIFAR_MD5, md5, f"cifar-10-batches-bin/{name}", 10_000 * _CIFAR_RECORD)
    for name, md5 in _CIFAR_CONTENT.items()
)
_CIFAR_BEGINNING = CIFAR10[5]._replace(
    name="test_batch_first1000.bin", content_md5="371f65da31ad652f5e24b3699a3e6515", size=1_000 * _CIFAR_RECORD
)


def cifar10(data: Folder = None, *, verify: bool = True) -> Dataset:
    """CIFAR-10 in its binary version: 32x32 colour images, standardised per channel.

    From a folder, ``cifar10/`` may hold the whole set or its first training batches, and ``test_batch.bin`` or its
    beginning, ``test_batch_first1000.bin``; the sizes of what comes back say which. A download is the whole set
    (50,000 and 10,000 images).

    Args:
        data: Folder that holds ``cifar10/``; else ``EKI_JAX_DATA``; else the archive is downloaded.
        verify: Check the hashes (switch it off for files you made yourself, with fewer images).

    Raises:
        MissingFile: There is no first training batch or no test batch.
        DamagedFile: A file is not a whole number of records, or is another one.
    """
    train, test = list(CIFAR10[:5]), CIFAR10[5]
    folder = data_folder(data)
    if folder is not None:
        there = [source for source in train if (folder / source.folder / source.name).is_file()]
        train = there or train[:1]
        place = folder / test.folder
        if not (place / test.name).is_file() and (place / _CIFAR_BEGINNING.name).is_file():
            test = _CIFAR_BEGINNING
    parts = [_cifar_records(source, data, verify) for source in train]
    train_x, train_y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return standardised(train_x, train_y, *_cifar_records(test, data, verify))


def _cifar_records(source: Source, data: Folder, verify: bool) -> tuple[np.ndarray, np.ndarray]:
    content = read(source, data, verify=verify)
    name = str(locate(source, data))
    if not content or len(content) % _CIFAR_RECORD:
        raise DamagedFile(f"{name}: {len(content)} bytes; wanted a positive multiple of {_CIFAR_RECORD}")
    records = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_RECORD)
    _check_labels(records[:, 0], len(records), name)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


_SVHN = "http://ufldl.stanford.edu/housenumbers/"
SVHN = (
    Source("svhn", "train_32x32.mat", _SVHN + "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", size=182_040_794),
    Source("svhn", "test_32x32.mat", _SVHN + "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", size=64_275_384),
)
_SVHN_IMAGES = {"train_32x32.mat": 73_257, "test_32x32.mat": 26_032}


def svhn(data: Folder = None, *, verify: bool = True) -> Dataset:
    """SVHN, cropped: 73,257 training and 26,032 test colour images of 32x32, standardised per channel.

    Args:
        data: Folder that holds ``svhn/``; else ``EKI_JAX_DATA``; else the files are downloaded.
        verify: Check the hashes.

    Raises:
        MissingFile: A file is missing; it is named.
        DamagedFile: A file is not a MATLAB file with the images ``X`` and the labels ``y``, or is another one.
    """
    train, test = (_mat_arrays(source, data, verify) for source in SVHN)
    return standardised(*train, *test)


def _mat_arrays(source: Source, data: Folder, verify: bool) -> tuple[np.ndarray, np.ndarray]:
    import io

    from scipy.io import loadmat, whosmat

    name, most = str(locate(source, data)), _SVHN_IMAGES[source.name]
    file = io.BytesIO(read(source, data, verify=verify))
    try:
        shapes = {key: shape for key, shape, _ in whosmat(file)}  # before any of it is unpacked
        images_shape, labels_shape = shapes["X"], shapes["y"]
        wanted = (32, 32, 3, images_shape[-1])
        if images_shape != wanted or images_shape[-1] > most or labels_shape != (images_shape[-1], 1):
            shape = (images_shape[-1], *images_shape[:-1])
            raise DamagedFile(
                f"{name}: images of shape {shape[1:]}; wanted (32, 32, 3), {most} at most, and a label for each: "
                f"{shape[0]} images, labels of shape {labels_shape}"
            )
        content = loadmat(file, variable_names=("X", "y"))
        images, labels = content["X"].transpose(3, 0, 1, 2), content["y"].reshape(-1)
    except DamagedFile:
        raise
    except Exception as error:  # scipy raises many kinds for a broken file
        raise DamagedFile(f"{name}: not a MATLAB file with X and y ({type(error).__name__}: {error})") from error
    if images.dtype != np.uint8:
        raise DamagedFile(f"{name}: images of dtype {images.dtype}; wanted uint8")
    known = np.isin(labels, np.arange(1, 11))
    if not known.all():
        raise DamagedFile(f"{name}: the label {labels[~known][0]}; wanted 1 to 10, whole numbers")
    return images, labels.astype(np.int32) % 10  # zero is stored as 10
