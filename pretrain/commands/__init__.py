"""The commands of the pretraining half, for tools/*.py and the console entry points."""
