"""A loaded pipeline at work: its guard, its generations, and the records of them."""
