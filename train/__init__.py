"""The trainer: `python -m train CONFIG`."""
