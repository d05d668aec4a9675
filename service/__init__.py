"""The HTTP service. It never imports torch or the training package."""
