"""What stays in a vault and what goes."""
