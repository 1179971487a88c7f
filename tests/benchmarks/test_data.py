"""The data files: formats, hashes and errors, on small files written here."""

from __future__ import annotations

import gzip
import hashlib
import io

import jax
import numpy as np
import pytest
import scipy.io

from benchmarks import methods
from benchmarks.problems import data, files, registry, tables
from benchmarks.problems.files import MissingFile, Source
from benchmarks.problems.idx import DamagedFile, parse_idx, read_bytes

pytestmark = pytest.mark.benchmarks

RNG = np.random.default_rng(0)


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_mnist(folder, labels=(3, 9, 0, 1, 1), packed=True):
    """Five training and three test images of 28x28 in MNIST's files."""
    folder.mkdir(parents=True)
    train, test = RNG.integers(0, 256, (5, 28, 28)), RNG.integers(0, 256, (3, 28, 28))
    for source, array in zip(data.MNIST, (train, np.array(labels), test, np.array([7, 8, 9])), strict=True):
        if packed:
            (folder / source.name).write_bytes(gzip.compress(idx(array)))
        else:
            (folder / source.name.removesuffix(".gz")).write_bytes(idx(array))
    return train, test


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_standardised(tmp_path, packed):
    """MNIST is standardised by one mean and deviation."""
    train, test = write_mnist(tmp_path / "mnist", packed=packed)
    dataset = data.mnist(tmp_path, verify=False)
    mean, deviation = (train / 255).mean(), (train / 255).std()
    np.testing.assert_allclose(dataset.train_x[..., 0], (train / 255 - mean) / deviation, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dataset.test_x[..., 0], (test / 255 - mean) / deviation, rtol=1e-4, atol=1e-5)
    assert (dataset.train_x.dtype, dataset.train_y.dtype) == (np.float32, np.int32)
    assert dataset.train_y.tolist() == [3, 9, 0, 1, 1]
    assert dataset.test_y.tolist() == [7, 8, 9]
    assert dataset.classes == 10


def test_fashion_mnist_has_its_own_folder(tmp_path):
    """Fashion-MNIST is read from its own folder."""
    train, _ = write_mnist(tmp_path / "fashion_mnist")
    dataset = data.fashion_mnist(tmp_path, verify=False)
    assert dataset.train_x.shape == (*train.shape, 1)
    with pytest.raises(DamagedFile, match=r"fashion_mnist/train-images.*MD5 .*wanted f4a8712d"):
        data.fashion_mnist(tmp_path)


def test_folder_by_argument_then_environment(tmp_path, monkeypatch):
    """The folder comes from the argument then the environment."""
    write_mnist(tmp_path / "here" / "mnist", labels=(1, 1, 1, 1, 1))
    write_mnist(tmp_path / "there" / "mnist", labels=(2, 2, 2, 2, 2))
    monkeypatch.setenv(files.ENVIRONMENT_VARIABLE, str(tmp_path / "there"))
    assert data.mnist(verify=False).train_y[0] == 2
    assert data.mnist(tmp_path / "here", verify=False).train_y[0] == 1


def test_wrong_hash_names_file_and_both_hashes(tmp_path):
    write_mnist(tmp_path / "mnist")
    content = gzip.decompress((tmp_path / "mnist" / data.MNIST[0].name).read_bytes())
    found = hashlib.md5(content).hexdigest()
    with pytest.raises(DamagedFile, match=rf"train-images.*MD5 {found}; wanted 6bbc9ace898e44ae57da46a324031adb"):
        data.mnist(tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "svhn", "cifar10"])
def test_missing_file_is_named_with_its_address(tmp_path, name):
    with pytest.raises(MissingFile, match=rf"{name}/\w.* is missing; it is published at http"):
        getattr(data, name)(tmp_path)


def test_one_missing_file_of_four_is_named(tmp_path):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(MissingFile, match=r"t10k-labels-idx1-ubyte\.gz is missing"):
        data.mnist(tmp_path, verify=False)


def test_idx_round_trip():
    array = RNG.integers(0, 256, (4, 3, 2)).astype(np.uint8)
    assert np.array_equal(parse_idx(idx(array), "images", 3), array)


@pytest.mark.parametrize(
    ("content", "ndim", "message"),
    [
        (b"\0\0\x08", 1, r"labels: 3 bytes; wanted a header of 8 bytes"),
        (b"\0\0\x08\x03" + bytes(12), 1, r"labels: magic number 0x00000803; wanted 0x00000801"),
        (b"\0\0\x0d\x01" + bytes(4), 1, r"labels: magic number 0x00000d01; wanted 0x00000801"),
        (idx(np.arange(5))[:-1], 1, r"labels: 4 values; its header wants 5"),
        (idx(np.arange(5)) + b"x", 1, r"labels: 6 values; its header wants 5"),
        (idx(np.zeros((2, 3, 4)))[:-5], 3, r"labels: 19 values; its header wants 24, the shape \(2, 3, 4\)"),
    ],
)
def test_damaged_idx_is_named(content, ndim, message):
    """Damaged IDX says what it was and what was wanted."""
    with pytest.raises(DamagedFile, match=message):
        parse_idx(content, "labels", ndim)


@pytest.mark.parametrize(
    "damage", [lambda packed: packed[:-12], lambda packed: b"not gzip", lambda packed: b"\x1f\x8b"]
)
def test_damaged_gzip_is_named(tmp_path, damage):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(gzip.compress(idx(RNG.integers(0, 256, 100)))))
    with pytest.raises(DamagedFile, match=r"train-images-idx3-ubyte.gz: \d+ bytes that are not a whole gzip stream"):
        read_bytes(path)


def test_no_more_is_unpacked_than_the_format_has(tmp_path, monkeypatch):
    """Of a file that grows when it is unpacked, no more than the published size is held, whatever its hash."""
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / data.MNIST[1].name
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(2**20))
    held = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size=-1: held.append(size) or read(file, size))
    for verify in (True, False):
        with pytest.raises(DamagedFile, match=r"train-labels.*: more than 60008 bytes; wanted 60008 at most"):
            files.read(data.MNIST[1], tmp_path, verify=verify)
    assert held == [60009] * 2
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(bytes(10_009))
    (tmp_path / "mnist" / data.MNIST[3].name).unlink()
    with pytest.raises(DamagedFile, match=r"t10k-labels-idx1-ubyte: more than 10008 bytes"):
        files.read(data.MNIST[3], tmp_path, verify=False)


def test_images_have_the_sets_size(tmp_path):
    """Other images than MNIST's are refused, hashes or not."""
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / data.MNIST[2].name).write_bytes(gzip.compress(idx(np.zeros((3, 8, 8)))))
    with pytest.raises(DamagedFile, match=r"t10k-images.*: images of shape \(8, 8\); wanted \(28, 28\)"):
        data.mnist(tmp_path, verify=False)


def test_every_cifar_file_has_a_hash(tmp_path):
    """Seven records, or a flipped label, are no batch of CIFAR-10."""
    sources = [*data.CIFAR10, data._CIFAR_BEGINNING]
    images = RNG.integers(0, 256, (7, 32, 32, 3))
    for source in sources:
        write_cifar(tmp_path / "cifar10" / source.name, images, range(7))
        with pytest.raises(DamagedFile, match=rf"{source.name}: MD5 .*; wanted {source.content_md5}"):
            files.read(source, tmp_path)
        assert len(files.read(source, tmp_path, verify=False)) == 7 * 3073
    assert len({source.content_md5 for source in sources}) == 7
    assert all(len(source.content_md5) == 32 for source in sources)


def test_labels_are_checked(tmp_path):
    """Labels must match the images and be digits."""
    write_mnist(tmp_path / "few" / "mnist", labels=(1, 2, 3))
    with pytest.raises(DamagedFile, match=r"train-labels.*: 3 labels; wanted 5"):
        data.mnist(tmp_path / "few", verify=False)
    write_mnist(tmp_path / "large" / "mnist", labels=(1, 2, 3, 4, 10))
    with pytest.raises(DamagedFile, match=r"train-labels.*: the label 10; wanted 0 to 9"):
        data.mnist(tmp_path / "large", verify=False)


def test_images_without_spread_are_named():
    """Images that cannot be standardised are named."""
    flat, labels = np.full((2, 4, 4, 1), 7, np.uint8), np.zeros(2)
    with pytest.raises(ValueError, match=r"train_x: deviation \[0.0\] per channel"):
        data.standardised(flat, labels, flat, labels)
    with pytest.raises(ValueError, match="train_x: no images"):
        data.standardised(flat[:0], labels[:0], flat, labels)


def write_cifar(path, images, labels):
    """Records of one label and the red, green and blue planes."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(np.hstack([np.asarray(labels)[:, None], planes]).astype(np.uint8).tobytes())


def test_cifar10_is_standardised_per_channel(tmp_path):
    """CIFAR-10 is standardised per channel, and takes what is there."""
    images = RNG.integers(0, 256, (4, 32, 32, 3))
    images[..., 2] //= 4
    write_cifar(tmp_path / "cifar10" / "data_batch_1.bin", images[:2], [1, 2])
    write_cifar(tmp_path / "cifar10" / "data_batch_2.bin", images[2:], [3, 4])
    write_cifar(tmp_path / "cifar10" / "test_batch_first1000.bin", images[:1], [9])
    dataset = data.cifar10(tmp_path, verify=False)
    mean, deviation = (images / 255).mean((0, 1, 2)), (images / 255).std((0, 1, 2))
    np.testing.assert_allclose(dataset.train_x, (images / 255 - mean) / deviation, rtol=1e-4, atol=1e-5)
    assert dataset.train_y.tolist() == [1, 2, 3, 4]
    assert (dataset.test_x.shape, dataset.test_y.tolist()) == ((1, 32, 32, 3), [9])
    with pytest.raises(DamagedFile, match=r"data_batch_1.bin: MD5 .*wanted 5dd7e06a"):
        data.cifar10(tmp_path)
    write_cifar(tmp_path / "cifar10" / "test_batch.bin", images, [0, 1, 2, 3])
    assert len(data.cifar10(tmp_path, verify=False).test_y) == 4


def test_truncated_cifar10_is_named(tmp_path):
    (tmp_path / "cifar10").mkdir()
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (tmp_path / "cifar10" / name).write_bytes(bytes(3073 + 100))
    with pytest.raises(DamagedFile, match=r"data_batch_1.bin: 3173 bytes; wanted a positive multiple of 3073"):
        data.cifar10(tmp_path, verify=False)


def write_svhn(path, images, labels):
    path.parent.mkdir(exist_ok=True)
    content = {"X": images.transpose(1, 2, 3, 0).astype(np.uint8), "y": np.asarray(labels, np.uint8)[:, None]}
    scipy.io.savemat(path, content)


def test_svhn_reads_matlab_files(tmp_path):
    """SVHN's reader takes MATLAB files and calls ten zero."""
    images = RNG.integers(0, 256, (3, 32, 32, 3))
    write_svhn(tmp_path / "svhn" / "train_32x32.mat", images, [10, 1, 9])
    write_svhn(tmp_path / "svhn" / "test_32x32.mat", images[:1], [5])
    dataset = data.svhn(tmp_path, verify=False)
    mean, deviation = (images / 255).mean((0, 1, 2)), (images / 255).std((0, 1, 2))
    np.testing.assert_allclose(dataset.train_x, (images / 255 - mean) / deviation, rtol=1e-4, atol=1e-5)
    assert dataset.train_y.tolist() == [0, 1, 9]
    with pytest.raises(DamagedFile, match=r"train_32x32.mat: MD5 .*wanted e26dedcc434d2e4c54c9b2d4a06d8373"):
        data.svhn(tmp_path)


def test_damaged_svhn_is_named(tmp_path):
    write_svhn(tmp_path / "svhn" / "train_32x32.mat", RNG.integers(0, 256, (3, 32, 32, 3)), [1, 2, 3])
    (tmp_path / "svhn" / "test_32x32.mat").write_bytes(b"nothing of the kind")
    with pytest.raises(DamagedFile, match=r"test_32x32.mat: not a MATLAB file with X and y"):
        data.svhn(tmp_path, verify=False)
    write_svhn(tmp_path / "svhn" / "test_32x32.mat", RNG.integers(0, 256, (3, 16, 16, 3)), [1, 2, 3])
    with pytest.raises(DamagedFile, match=r"test_32x32.mat: images of shape \(16, 16, 3\); wanted \(32, 32, 3\)"):
        data.svhn(tmp_path, verify=False)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.array([1.5, 2, 3]), "the label 1.5; wanted 1 to 10"),
        (np.array([11, 2, 3]), "the label 11; wanted 1 to 10"),
        (np.array([np.nan, 2, 3]), "the label nan"),
        (np.array([1, 2]), "3 images, labels of shape"),
    ],
)
def test_svhn_labels_are_whole(tmp_path, labels, words):
    images = RNG.integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    write_svhn(tmp_path / "svhn" / "train_32x32.mat", images, [1, 2, 3])
    content = {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None]}
    scipy.io.savemat(tmp_path / "svhn" / "test_32x32.mat", content)
    with pytest.raises(DamagedFile, match=rf"test_32x32.mat: .*{words}"):
        data.svhn(tmp_path, verify=False)


def test_digits_split():
    """The digits' split keeps the classes and depends on the seed."""
    first, again, other = data.digits(), data.digits(), data.digits(seed=1)
    assert (len(first.train_y), len(first.test_y)) == (1437, 360)
    assert np.array_equal(first.test_x, again.test_x)
    assert not np.array_equal(first.test_y, other.test_y)
    assert set(np.bincount(first.test_y)) <= {34, 35, 36, 37}
    assert abs(first.train_x.mean()) < 1e-5
    assert abs(first.train_x.std() - 1) < 1e-4


def test_votes_are_plus_minus_one_and_zero(tmp_path):
    (tmp_path / "votes").mkdir()
    path = tmp_path / "votes" / "house-votes-84.data"
    rows = ["republican," + "n,y,?,y," * 3 + "n,y,?,y\n"] * 168 + ["democrat," + ",".join("y" * 16) + "\n"] * 267
    path.write_text("".join(rows))
    votes = tables.votes(tmp_path, verify=False)
    assert votes.labels.tolist() == [-1] * 168 + [1] * 267
    assert votes.records[0, :4].tolist() == [-1, 1, 0, 1]
    assert votes.records.shape == (435, 16)
    path.write_text("".join(rows[1:]))
    with pytest.raises(DamagedFile, match=r"434 rows, .*'republican': 167.*; wanted 435"):
        tables.votes(tmp_path, verify=False)
    path.write_text("republican,n,y\n")
    with pytest.raises(DamagedFile, match=r"row 1 is 'republican,n,y'; wanted a party, then 16"):
        tables.votes(tmp_path, verify=False)


def test_series_is_scaled_and_paired():
    """A series is scaled by its training part and paired one step ahead."""
    series = tables.one_step_ahead(np.array([2.0, 4.0, 6.0, 8.0, 1.0, 3.0]), 3)
    np.testing.assert_allclose(series.train_x[:, 0], [0, 0.5])
    np.testing.assert_allclose(series.train_y[:, 0], [0.5, 1])
    np.testing.assert_allclose(series.test_x[:, 0], [1.5, -0.25])
    np.testing.assert_allclose(series.test_y[:, 0], [-0.25, 0.25])
    with pytest.raises(ValueError, match="train: 5 of 6 values"):
        tables.one_step_ahead(np.arange(6.0), 5)
    with pytest.raises(ValueError, match="constant"):
        tables.one_step_ahead(np.ones(6), 3)


def test_damaged_series_is_named(tmp_path):
    (tmp_path / "time_series").mkdir()
    (tmp_path / "time_series" / "monthly-sunspots.csv").write_text('"Month","Sunspots"\n"1749-01",many\n')
    with pytest.raises(DamagedFile, match=r"monthly-sunspots.csv: a row that is not a date and a number"):
        tables.sunspots(tmp_path, verify=False)
    for values, words in ((["1.0"] * 2819, "2819 values"), (["1.0"] * 2819 + ["nan"], "2819 of them numbers")):
        lines = "".join(f'"1749-01",{value}\n' for value in values)
        (tmp_path / "time_series" / "monthly-sunspots.csv").write_text(f'"Month","Sunspots"\n{lines}')
        with pytest.raises(DamagedFile, match=f"{words}.*; wanted 2820 numbers"):
            tables.sunspots(tmp_path, verify=False)


def test_download_checks_the_hash(tmp_path, monkeypatch):
    """A download goes through pooch with the hash."""
    pooch = pytest.importorskip("pooch")
    monkeypatch.delenv(files.ENVIRONMENT_VARIABLE, raising=False)
    calls = []

    def retrieve(url, known_hash, fname, path, processor):
        calls.append((url, known_hash, fname))
        (tmp_path / fname).write_bytes(b"content")
        return str(tmp_path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    source = Source("folder", "file.bin", "https://example.org/a/file.bin", hashlib.md5(b"content").hexdigest())
    assert files.read(source) == b"content"
    assert calls == [("https://example.org/a/file.bin", f"md5:{source.md5}", "file.bin")]


@pytest.mark.parametrize(("error", "kind"), [(OSError("no network"), MissingFile), (ValueError("hash"), DamagedFile)])
def test_failed_download_is_named(monkeypatch, error, kind):
    """A failed download names the file and the address."""
    pooch = pytest.importorskip("pooch")
    monkeypatch.delenv(files.ENVIRONMENT_VARIABLE, raising=False)

    def retrieve(*arguments, **options):
        raise error

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(kind, match=r"https://example.org/file.bin"):
        files.locate(Source("folder", "file.bin", "https://example.org/file.bin", "0" * 32))


def test_member_of_an_archive_is_taken_out(tmp_path, monkeypatch):
    import tarfile

    pooch = pytest.importorskip("pooch")
    monkeypatch.delenv(files.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache")
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
        for name in ("inside/a.bin", "inside/b.bin"):
            entry = tarfile.TarInfo(name)
            entry.size = 12
            archive.addfile(entry, io.BytesIO(name.encode()))
    md5 = hashlib.md5((tmp_path / "set.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(pooch, "retrieve", _retrieve_from(pooch.retrieve, tmp_path / "set.tar.gz"))
    source = Source("folder", "b.bin", "https://example.org/set.tar.gz", md5, member="inside/b.bin")
    assert files.read(source) == b"inside/b.bin"


def _retrieve_from(retrieve, file):
    """pooch's own ``retrieve``, with a downloader that copies a file."""

    def copy(url, output, pooch):
        from pathlib import Path

        Path(output).write_bytes(file.read_bytes())

    return lambda url, known_hash, **options: retrieve(url, known_hash, downloader=copy, **options)


def test_problem_is_model_loss_and_data():
    import jax

    problem = registry.get("digits-dnn")
    assert problem.train[0].shape == (1437, 8, 8, 1)
    leaves, structure = jax.tree.flatten(problem.template)
    params = structure.unflatten([np.ones(leaf.shape, leaf.dtype) for leaf in leaves])
    probabilities = problem.forward(params, problem.test[0][:4])
    np.testing.assert_allclose(probabilities, 0.1, rtol=1e-5)
    np.testing.assert_allclose(jax.nn.softmax(problem.logits(params, problem.test[0][:4])), probabilities, rtol=1e-5)
    assert float(problem.loss(probabilities, problem.test[1][:4])) > 0


def test_rows_of_an_image_are_a_sequence(tmp_path, monkeypatch):
    """The rows of an image are the recurrent network's sequence."""
    write_mnist(tmp_path / "mnist")
    monkeypatch.setattr(registry.datasets, "mnist", lambda data_: data.standardised(*_raw(tmp_path)))
    assert registry.get("mnist-rnn", tmp_path).train[0].shape == (5, 28, 28)


def test_a_stacked_network_is_as_in_frameworks(tmp_path, monkeypatch):
    """Pixels from 0 to 1, and a start within one over the root of its units, from which every single mean begins."""
    monkeypatch.setattr(registry.datasets, "mnist", lambda data_: data.standardised(*_raw(tmp_path)))
    problem = registry.get("mnist-stacked-rnn", tmp_path)
    assert (problem.train[0].min(), problem.train[0].max()) == (0, 1)
    drawn = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(problem.start.sample(jax.random.key(0)))])
    bound = 32**-0.5
    assert 0.99 * bound < np.abs(drawn).max() < bound
    assert drawn.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert problem.prior is not problem.start
    assert registry.get("mnist-rnn", tmp_path).train[0].min() < 0
    for name in ("sgd", "natural-eki-per-sample", "natural-eki-lowrank"):
        state = methods.get(name, problem, 4).init(jax.random.key(0))
        begun = methods.get(name, problem, 4).estimate(state)
        assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(begun)) < bound


def _raw(folder):
    images = RNG.integers(0, 256, (5, 28, 28, 1))
    return images, np.arange(5), images, np.arange(5)


def test_unknown_problem_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"name: 'cifar100'; wanted one of digits-dnn, mnist-dnn1"):
        registry.get("cifar100")
    expected = {"digits-dnn", "cnn-mnist", "mnist-rnn", "cifar10-cnn3", "svhn-cnn1", "fashion-dnn2", "mnist-dnn4"}
    assert expected <= set(registry.names())


@pytest.mark.skipif(files.data_folder(None) is None, reason="EKI_JAX_DATA names no folder with the real files")
@pytest.mark.parametrize(
    ("load", "train", "test"),
    [(data.mnist, 60_000, 10_000), (tables.temperatures, 3_000, 648), (tables.sunspots, 2_300, 518)],
)
def test_published_files_have_their_sizes(load, train, test):
    """The published files have the paper's sizes."""
    dataset = load()
    assert (len(dataset.train_x), len(dataset.train_y)) == (train, train)
    assert (len(dataset.test_x), len(dataset.test_y)) == (test, test)


@pytest.mark.skipif(files.data_folder(None) is None, reason="EKI_JAX_DATA names no folder with the real files")
def test_the_published_votes_have_435_rows():
    votes = tables.votes()
    assert votes.records.shape == (435, 16)
    assert (votes.labels == 1).sum() == 267


@pytest.mark.slow
def test_convolutions_of_an_ensemble(tmp_path, monkeypatch):
    """Convolutions of an ensemble are those of its particles."""
    import jax

    images = RNG.integers(0, 256, (3, 28, 28, 1))
    dataset = data.standardised(images, np.arange(3), images, np.arange(3))
    monkeypatch.setitem(registry.PROBLEMS, "cnn-mnist", (lambda folder: dataset, registry.PROBLEMS["cnn-mnist"][1]))
    problem = registry.get("cnn-mnist")
    draw = lambda leaf: 0.1 * RNG.standard_normal((2, *leaf.shape)).astype(leaf.dtype)
    ensemble = jax.tree.map(draw, problem.template)
    together = jax.jit(jax.vmap(problem.forward, (0, None)))(ensemble, problem.test[0])
    for j in range(2):
        particle = jax.tree.map(lambda leaf, j=j: leaf[j], ensemble)
        np.testing.assert_allclose(together[j], problem.forward(particle, problem.test[0]), rtol=1e-4, atol=1e-6)
    assert not np.allclose(together[0], together[1])
