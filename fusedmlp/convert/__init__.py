"""Change the layers of an existing model to the fused kind and back (``fuse``, ``unfuse``, ``report``)."""

from fusedmlp.convert.fuse_model import Report, Row, fuse, report, unfuse

__all__ = ["Report", "Row", "fuse", "report", "unfuse"]
