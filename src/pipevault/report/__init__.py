"""HTML reports: one file each, with its pictures inside, that asks for nothing from anywhere."""
