"""The plumbing behind the scripts, which a reader can skip: see README.md for who does what."""
