"""Public addresses that users write in scripts (`--spec MODULE ATTRIBUTE`); the code lies elsewhere."""
