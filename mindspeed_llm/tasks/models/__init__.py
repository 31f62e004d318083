"""Public addresses of model parts."""
