"""IS the result the same model: `--test-convert-precision`. Nothing here is imported unless it is asked for."""
