"""The version of the product, in one place: package metadata and `pangu-sigma --version` read it."""

VERSION = "0.2.0"
