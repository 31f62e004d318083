"""Before cluster hours burn: memory, communication and time of a training step at a layout, and the layouts to try."""
