"""The command line. The entry point is :func:`pipevault.cli.app.main`; importing it imports no torch."""
