"""The asv suite, and the scripts that print the figures of the README. See README.md beside this file."""
