"""The benchmark: ``python -m bench --help``. Method and findings are in NOTES.md beside this file."""
