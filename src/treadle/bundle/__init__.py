"""A bundle's files on disk, and the base model that it names."""

from treadle.common.moved import names_of

__getattr__ = names_of("treadle.bundle", "treadle.bundle.bundle")
