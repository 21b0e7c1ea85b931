"""Show what ran and why (``explain``), and whether the results are right (``verify``)."""
