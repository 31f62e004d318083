"""Tests of the option schema and of the command lines made from it."""
