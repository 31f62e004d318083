"""WHERE does a weight go: named, lazily sliceable tensors between HF folders, megatron-core checkpoints and live models."""
