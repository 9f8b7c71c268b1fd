"""The version of the package, which `setup.cfg` reads too."""

__version__ = "0.2.0"
