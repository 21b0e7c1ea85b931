"""Change the layers of an existing model to the fused kind and back (``fuse``, ``unfuse``, ``report``)."""

from fusedmlp.convert.fuse_model import fuse, report, unfuse
from fusedmlp.convert.fuse_report import Report, Row

__all__ = ["Report", "Row", "fuse", "report", "unfuse"]
