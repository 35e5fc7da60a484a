"""The report of a sweep: figures, tables and report.html."""
