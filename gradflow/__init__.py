"""Where does gradient flow go? The public names are listed in `__init__.pyi`.

They are loaded at first use, so that `gradflow --help` need not wait for jax.
"""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
