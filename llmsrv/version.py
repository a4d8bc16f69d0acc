"""The product's version, read by setup.cfg, --version and GET /version."""

__version__ = "0.1.0"
