"""Parts that the examples share. The scripts one folder up are the ones to run."""
