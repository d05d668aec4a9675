"""Training: from pictures to an exported model folder. It takes only the manifest from `service`."""
