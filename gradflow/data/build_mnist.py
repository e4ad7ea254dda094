"""Make `mnist_moments.npz` from the MNIST training images:
`python -m gradflow.data.build_mnist FOLDER [--out FILE]`.

The same images give the same bytes. The format is described in `gradflow.data`.
"""

import argparse
import hashlib
import io
import lzma
import sys
from pathlib import Path

import numpy as np

from gradflow.datasets import mnist_images, MNIST_SHA256


# The low bytes are noise and are stored as they are; the high ones follow their
# neighbour, hence all four literal context bits on it (10 kB less than the default).
_FILTERS = [
    {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "dict_size": 2**23,
        "lc": 4,
        "lp": 0,
        "pb": 0,
    }
]


def build(images: np.ndarray, labels: np.ndarray) -> bytes:
    """The bytes of the file for images `(samples, 784)` and labels from 0 to 9."""
    members = {
        "count": np.bincount(labels, minlength=10).astype("<i8"),
        "support": np.zeros((10, 98), np.uint8),
    }
    for digit in range(10):
        # At most 6742 * 255^2 < 2^32, and float64 is exact for integers below 2^53.
        rows = images[labels == digit].astype(np.float64)
        sums = (rows.T @ rows).astype("<u4")
        support = np.flatnonzero(np.diag(sums))
        triangle = sums[np.ix_(support, support)][np.tril_indices(len(support))]
        planes = triangle.view(np.uint8).reshape(-1, 4).T
        packed = lzma.compress(
            planes.tobytes(),
            format=lzma.FORMAT_XZ,
            check=lzma.CHECK_CRC32,
            filters=_FILTERS,
        )
        members["support"][digit] = np.packbits(np.diag(sums) > 0)
        members[f"sums{digit}"] = np.frombuffer(packed, np.uint8)
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **members)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where the four MNIST files are, packed or not")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_name("mnist_moments.npz"),
        help="the file to write (default: the one in the package)",
    )
    arguments = parser.parse_args()
    data = build(*mnist_images(arguments.folder))
    arguments.out.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    verdict = "as expected" if digest == MNIST_SHA256 else f"not {MNIST_SHA256}"
    sys.stdout.write(
        f"{arguments.out}: {len(data)} bytes, sha256 {digest}, {verdict}\n"
    )


if __name__ == "__main__":
    main()
