"""Tests of what users hold on to: flags, paths, names, documents, recipes, and the shape of the source tree."""
