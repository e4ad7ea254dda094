"""Data shipped with the package.

`mnist_moments.npz` holds, for each digit class of the 60 000 MNIST training images
(LeCun, Bottou, Bengio and Haffner 1998, Gradient-based learning applied to document
recognition), the exact integer sums over the images of products of two pixels:

- `count`: the number of images of each digit;
- `support`: for each digit the 784 bits of which pixels are ever non-zero;
- `sums0` to `sums9`: an xz stream of the lower triangle, row by row, of the matrix of
    sums on that support; unsigned 32-bit integers, all their lowest bytes first, then
    all their second bytes, and so on.

`python -m gradflow.data.build_mnist FOLDER` makes it from the published images.
"""
