"""Files: each module reads or writes one format as named, lazily sliceable tensors. Needs torch and numpy only."""
