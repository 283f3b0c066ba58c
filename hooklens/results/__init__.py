"""What every method returns, how it is kept, and what may be claimed of it."""
