"""WHERE does a weight go: named, sliceable tensors between HF folders, megatron-core checkpoints and live models."""
