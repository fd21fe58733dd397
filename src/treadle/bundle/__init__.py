"""A bundle's files on disk, and the base model that it names."""
