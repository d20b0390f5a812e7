"""The instrument and the jobs on top of it: `python -m bench --help`."""
