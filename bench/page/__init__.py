"""The sections of the report (bench/report.py), each computed from rows."""
