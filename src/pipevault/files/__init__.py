"""Files on disk, whatever is in them: how they are opened, and what may be believed of them."""
