"""Commands of the command line that stand on their own, one file each."""
