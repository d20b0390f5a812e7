"""The sections of the report (bench/page/report.py), each computed from rows."""
