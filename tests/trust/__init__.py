"""What happens under abuse. `python -m pytest -m trust --trust-cases 20000` is all of it, a smaller number a slice."""
