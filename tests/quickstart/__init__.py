"""Tests of the quickstart's makers, rows and gates; the whole run is `bash quickstart.sh` itself."""
