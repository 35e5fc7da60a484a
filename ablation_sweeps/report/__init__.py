"""What people look at: figures, tables and report.html."""
