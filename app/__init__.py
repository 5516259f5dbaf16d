"""The application: the command line, checkpoints on disk, and everything that knows processes and files."""
