"""Formats that other tools load, one file per format; `formats.py` is the way in."""
