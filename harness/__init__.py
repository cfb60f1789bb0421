"""The runner: command line, checks of the settings, images to disk, several ranks, console and tracking."""
