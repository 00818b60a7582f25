"""Export a model to the formats that other programs run."""

from extract.export.exporting import FORMATS, export

__all__ = ["FORMATS", "export"]
